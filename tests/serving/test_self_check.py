"""Health checks that can fail: a part that is broken says so, one that was given nonsense does not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
from musicgen_serving.deployments.chroma import ChromaExtractor, Recording
from musicgen_serving.deployments.codec import CodecDecoder
from musicgen_serving.deployments.self_check import MAX_IN_A_ROW, SelfCheck
from musicgen_serving.deployments.text_encoder import TextEncoder
from musicgen_serving.settings import LimitSettings, ModelSettings

from musicgen.errors import InvalidRequestError
from musicgen.types import Window


class Part:
    """Fails as it is told."""

    def __init__(self) -> None:
        self.is_broken = True
        self.num_proofs = 0
        self.check = SelfCheck("part", self.prove)

    async def prove(self) -> None:
        self.num_proofs += 1
        if self.is_broken:
            raise RuntimeError("broken")

    def call(self, error: Exception | None) -> None:
        with nullcontext() if error is None else pytest.raises(type(error)), self.check.watching():
            if error is not None:
                raise error


def test_a_part_that_fails_and_cannot_prove_itself_is_ill(caplog: pytest.LogCaptureFixture) -> None:
    part = Part()
    for index in range(MAX_IN_A_ROW):
        asyncio.run(part.check.check())
        part.call(ValueError(f"failure {index}"))
    assert part.num_proofs == 0
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"):
            asyncio.run(part.check.check())
    assert [record.exc_info is not None for record in caplog.records] == [True] * MAX_IN_A_ROW


def test_a_part_that_was_given_nonsense_is_well() -> None:
    part = Part()
    part.is_broken = False
    for _ in range(MAX_IN_A_ROW):
        part.call(ValueError("nonsense"))
    asyncio.run(part.check.check())
    asyncio.run(part.check.check())
    assert part.num_proofs == 1


def test_mistakes_of_callers_count_for_nothing_and_success_begins_anew() -> None:
    part = Part()
    for _ in range(MAX_IN_A_ROW - 1):
        part.call(ValueError("a bug"))
    part.call(InvalidRequestError("words", "none"))
    asyncio.run(part.check.check())
    part.call(None)
    part.call(ValueError("a bug"))
    asyncio.run(part.check.check())
    assert part.num_proofs == 0


def broken(*_: object, **__: object) -> Any:
    raise RuntimeError("the device is gone")


async def _encode_text(part: TextEncoder) -> None:
    await part.encode("words")


async def _decode(part: CodecDecoder) -> None:
    await part.warm_up()


async def _extract(part: ChromaExtractor) -> None:
    await part.extract(Recording(b"", (Window(0, 50),), False))


@pytest.mark.parametrize(
    ("make", "work", "inner"),
    [
        (lambda: TextEncoder(ModelSettings()), _encode_text, "_encoder"),
        (lambda: CodecDecoder(ModelSettings(), LimitSettings()), _decode, "_codec"),
        (lambda: ChromaExtractor(ModelSettings(), LimitSettings()), _extract, "_extractor"),
    ],
    ids=["text encoder", "codec", "chroma extractor"],
)
def test_every_part_notices_that_it_is_broken(
    make: Callable[[], Any], work: Callable[[Any], Any], inner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = make()

    async def run() -> None:
        await part.warm_up()
        await part._self_check._prove()
        await part.check_health()
        if inner == "_extractor":
            monkeypatch.setattr(part, "_extract_one", broken)
            monkeypatch.setattr(part, inner, broken)
        elif inner == "_codec":
            monkeypatch.setattr(part._codec, "decode_batch", broken)
        else:
            monkeypatch.setattr(part._encoder, "encode", broken)
        for _ in range(MAX_IN_A_ROW):
            with pytest.raises(RuntimeError):
                await work(part)
        with pytest.raises(RuntimeError, match="the device is gone"):
            await part.check_health()

    asyncio.run(run())
