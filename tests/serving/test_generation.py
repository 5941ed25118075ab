"""The service's core against the in-process API: equal audio, one settlement each, and replicas that are lost."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from musicgen_serving import running_requests
from musicgen_serving.admission import AdmissionRequest, Settlement, Ticket
from musicgen_serving.components import BrokenError, Components, LostError
from musicgen_serving.deployments.gatekeeper import LocalGatekeeper
from musicgen_serving.deployments.language_model import LanguageModelEvent
from musicgen_serving.errors import (
    CLIENT_CODES,
    DeadlineExceededError,
    NotFoundError,
    NotOfferedError,
    ReplicaLostError,
    SupersededError,
    UnauthenticatedError,
    report,
)
from musicgen_serving.generation import GenerationService
from musicgen_serving.service import Readiness
from musicgen_serving.settings import FailoverSettings, HttpSettings, ServeSettings
from musicgen_serving.types import GenerationEnd, GenerationRequest, Piece, PieceAudio, Started
from serving.in_process import InProcess, small_settings
from torch import Tensor

from musicgen import MusicGen
from musicgen.audio_encode import encode_audio
from musicgen.codec_stream import StreamPiece, StreamState
from musicgen.errors import (
    DeadlineTooShortError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    RequestCancelledError,
)
from musicgen.types import ChunkPolicy, EngineRequest, FinishReason, SamplingParams

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own code uses what pydantic deprecates
    from musicgen_serving.ingress import Ingress

DURATION_S = 3.0
TEXTS, SEEDS = ("happy rock", "sad jazz"), (3, 4)


class Lossy:
    """Parts that can be told to be lost: each call takes a number off what is planned for its kind."""

    def __init__(self, parts: Components) -> None:
        self._parts = parts
        self.num_codec_losses = self.num_text_losses = self.num_text_failures = self.num_silences = 0
        self.is_lost = False
        self.lost_after_events: list[int] = []
        """For each coming attempt of the language model: events until it is lost."""
        self.deadline_s: float | None = None
        """Of the last call of the language model."""
        self.urgent_frames: list[int] = []
        """Of each call of the codec that was urgent, up to which frame."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parts, name)

    async def check(self) -> None:
        if self.is_lost:
            raise LostError("planned")
        await self._parts.check()

    async def encode_text(self, prompt: str) -> Tensor:
        if self.num_text_failures:
            self.num_text_failures -= 1
            raise BrokenError("ValueError: planned")
        if self.num_text_losses:
            self.num_text_losses -= 1
            raise LostError("planned")
        return await self._parts.encode_text(prompt)

    async def check_prompt(self, prompt: str) -> None:
        """The embedded model's own tokenizer cuts every text off; T5's does not."""
        assert len(prompt) > 500
        raise InvalidRequestError("a prompt of at most 512 tokens", "more", param="prompt")

    async def decode(self, piece: StreamPiece, *, urgent: bool) -> tuple[Tensor, StreamState]:
        if self.num_codec_losses:
            self.num_codec_losses -= 1
            raise LostError("planned")
        if urgent:
            self.urgent_frames.append(piece.state.num_frames + piece.codes.shape[-1])
        return await self._parts.decode(piece, urgent=urgent)

    @asynccontextmanager
    async def generate(self, request: EngineRequest) -> AsyncIterator[AsyncIterator[LanguageModelEvent]]:
        self.deadline_s = request.deadline_s
        async with self._parts.generate(request) as events:
            yield self._until_lost(events)

    async def _until_lost(self, events: AsyncIterator[LanguageModelEvent]) -> AsyncIterator[LanguageModelEvent]:
        left = self.lost_after_events.pop(0) if self.lost_after_events else None
        async for event in events:
            if left == 0:
                if self.num_silences:
                    self.num_silences -= 1
                    await asyncio.sleep(3600)
                raise LostError("planned")
            left = None if left is None else left - 1
            yield event


@pytest.fixture(scope="module")
def lossy() -> list[Lossy]:
    return []


@pytest.fixture(scope="module")
def service(lossy: list[Lossy]) -> Iterator[InProcess]:
    def wrap(parts: Components) -> Components:
        lossy.append(Lossy(parts))
        return lossy[0]  # type: ignore[return-value]

    failover = FailoverSettings(first_answer_s=2, silence_s=2, max_attempts=3, backoff_s=0.01)
    running = InProcess(small_settings(failover=failover), wrap)
    yield running
    running.close()


@pytest.fixture(scope="module")
def wanted() -> Tensor:
    """`[2, C, N]`: what the API in this process makes."""
    model = MusicGen.get_pretrained("demo")
    model.set_generation_params(duration=DURATION_S)
    wav = model.generate(list(TEXTS), seed=list(SEEDS))
    model.close()
    assert isinstance(wav, Tensor)
    return wav


def recording(duration_s: float) -> bytes:
    """A file of noise."""
    return encode_audio(torch.rand(1, round(32_000 * duration_s)) - 0.5, 32_000, "wav")


def request(request_id: str, **fields: Any) -> GenerationRequest:
    pieces = tuple(Piece(text, seed) for text, seed in zip(TEXTS, SEEDS, strict=True))
    values = {"pieces": pieces, "duration_s": DURATION_S, "chunks": ChunkPolicy(), **fields}
    return GenerationRequest(request_id, "demo", **values)


async def collect(service: InProcess, asked: GenerationRequest) -> tuple[Started, list[Tensor], GenerationEnd]:
    """Everything of one request, checked for order and gaps."""
    tenant = await service.service.authenticate(None)
    made: list[list[Tensor]] = [[] for _ in asked.pieces]
    async with service.service.generate(tenant, asked) as events:
        got = [event async for event in events]
    started, *audio, end = got
    assert isinstance(started, Started)
    assert isinstance(end, GenerationEnd)
    positions = [asked.first_sample] * len(made)
    for event in audio:
        assert isinstance(event, PieceAudio)
        assert event.sample_offset == positions[event.piece]
        positions[event.piece] += event.samples.shape[-1]
        made[event.piece].append(event.samples)
    return started, [torch.cat(parts, dim=-1) for parts in made if parts], end


async def at_rest(service: InProcess) -> None:
    """Every page is back, and every admitted request settled once."""
    for _ in range(200):
        load, counts = await service.engine.load(), await service.gatekeeper.counts()
        if load.num_running == load.num_waiting == load.pages_held == counts.running == 0:
            break
        await asyncio.sleep(0.01)
    else:
        raise AssertionError(f"not at rest: {load}, {counts.running} running")
    await service.gatekeeper.check()


@pytest.mark.parametrize("chunks", [ChunkPolicy(), ChunkPolicy(5, 9, 1.0), None])
def test_audio_equals_that_of_the_api_however_it_is_sent(
    service: InProcess, wanted: Tensor, chunks: ChunkPolicy | None
) -> None:
    started, made, end = service.run(collect(service, request(f"equal-{chunks}", chunks=chunks)))
    assert all(torch.equal(piece, want) for piece, want in zip(made, wanted, strict=True))
    assert started.num_samples == wanted.shape[-1]
    assert end.reason is FinishReason.FINISHED
    assert end.billed_s == 2 * DURATION_S
    service.run(at_rest(service))


def test_an_empty_text_is_no_text(service: InProcess) -> None:
    made = [
        service.run(collect(service, request(f"empty-{text!r}", pieces=(Piece(text, 1),))))[1][0]
        for text in ("", None, "x")
    ]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_a_resumed_request_begins_where_it_was_cut(service: InProcess, wanted: Tensor) -> None:
    first = 40_001
    _, made, end = service.run(collect(service, request("resumed", first_sample=first)))
    assert all(torch.equal(piece, want[:, first:]) for piece, want in zip(made, wanted, strict=True))
    assert [report.num_samples for report in end.pieces] == [wanted.shape[-1] - first] * 2


@pytest.mark.parametrize(
    ("fields", "urgent_frames"),
    [
        ({}, [12]),
        ({"first_sample": 40_001}, [12, 30, 57, 98]),
        ({"chunks": None}, []),
    ],
    ids=["stream", "resumed", "whole"],
)
def test_audio_is_urgent_until_its_listener_hears_some(
    service: InProcess, lossy: list[Lossy], fields: dict[str, Any], urgent_frames: list[int]
) -> None:
    lossy[0].urgent_frames.clear()
    service.run(collect(service, request(f"urgent-{fields}", pieces=(Piece("x", 1),), **fields)))
    assert lossy[0].urgent_frames == urgent_frames


@pytest.fixture
def settled(service: InProcess, monkeypatch: pytest.MonkeyPatch) -> list[Settlement]:
    """What the gatekeeper is told from now on."""
    told: list[Settlement] = []
    settle = service.gatekeeper.settle

    async def noted(settlement: Settlement) -> None:
        told.append(settlement)
        await settle(settlement)

    monkeypatch.setattr(service.gatekeeper, "settle", noted)
    return told


def test_what_was_made_is_billed_wherever_it_is_to_begin(service: InProcess, settled: list[Settlement]) -> None:
    _, _, end = service.run(collect(service, request("from-the-end", first_sample=95_999)))
    assert end.billed_s == settled[0].progress.billed_s == 2 * DURATION_S
    assert settled[0].progress.done_s == pytest.approx(2 / 32_000)


def test_going_on_with_the_same_key_is_billed_once(service: InProcess, settled: list[Settlement]) -> None:
    async def both() -> GenerationEnd:
        tenant = await service.service.authenticate(None)
        same: dict[str, Any] = {"idempotency_key": "k", "fingerprint": "f"}
        async with service.service.generate(tenant, request("begun", **same)) as events:
            async for event in events:
                if isinstance(event, PieceAudio):
                    break
        while not settled:
            await asyncio.sleep(0.01)
        return (await collect(service, request("gone-on", first_sample=5_000, **same)))[2]

    end = service.run(both())
    first, second = (settlement.progress.billed_s for settlement in settled)
    assert 0 < first < 2 * DURATION_S
    assert second == end.billed_s
    assert first + second == pytest.approx(2 * DURATION_S)


def test_what_was_made_ahead_of_a_caller_that_leaves_is_billed(service: InProcess, settled: list[Settlement]) -> None:
    async def leave() -> None:
        tenant = await service.service.authenticate(None)
        async with service.service.generate(tenant, request("ahead", duration_s=20.0)) as events:
            async for event in events:
                if isinstance(event, PieceAudio):
                    break
            (running,) = service.service._running._running
            while running.progress().made_s < 40.0:  # the engine may have ended, with the last frames on their way
                await asyncio.sleep(0.05)
        while not settled:
            await asyncio.sleep(0.01)

    service.run(leave())
    assert settled[0].progress.done_s < 1.0
    assert settled[0].progress.billed_s == 40.0
    service.run(at_rest(service))


def test_the_end_does_not_wait_for_a_gatekeeper_that_is_away(
    service: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running_requests, "SETTLE_WAIT_S", 0.1)
    settle, back = service.gatekeeper.settle, asyncio.Event()
    told: list[Settlement] = []

    async def away(settlement: Settlement) -> None:
        await back.wait()
        told.append(settlement)
        await settle(settlement)

    monkeypatch.setattr(service.gatekeeper, "settle", away)

    async def run() -> GenerationEnd:
        end = (await collect(service, request("unsettled")))[2]
        assert not told
        assert (await service.gatekeeper.counts()).running == 1
        back.set()
        await at_rest(service)
        return end

    assert service.run(run()).reason is FinishReason.FINISHED
    assert [settlement.reason for settlement in told] == [FinishReason.FINISHED]


@pytest.mark.parametrize("losses", [[0], [1], [2], [4, 1, 3], [1, 1]])
def test_a_lost_language_model_is_not_heard(
    service: InProcess, lossy: list[Lossy], wanted: Tensor, losses: list[int]
) -> None:
    lossy[0].lost_after_events = list(losses)
    _, made, end = service.run(collect(service, request(f"lost-{losses}")))
    assert all(torch.equal(piece, want) for piece, want in zip(made, wanted, strict=True))
    assert end.reason is FinishReason.FINISHED
    assert sum(report.num_failovers for report in end.pieces) == len(losses)
    service.run(at_rest(service))


def test_a_language_model_that_falls_silent_is_replaced(service: InProcess, lossy: list[Lossy], wanted: Tensor) -> None:
    lossy[0].lost_after_events, lossy[0].num_silences = [2], 1
    _, made, _ = service.run(collect(service, request("silent")))
    assert all(torch.equal(piece, want) for piece, want in zip(made, wanted, strict=True))
    service.run(at_rest(service))


def test_lost_codecs_and_encoders_are_not_heard(service: InProcess, lossy: list[Lossy], wanted: Tensor) -> None:
    lossy[0].num_codec_losses, lossy[0].num_text_losses = 2, 1
    _, made, end = service.run(collect(service, request("codec")))
    assert all(torch.equal(piece, want) for piece, want in zip(made, wanted, strict=True))
    assert sum(report.num_failovers for report in end.pieces) >= 3


def test_a_model_that_stays_lost_fails_the_request_once(service: InProcess, lossy: list[Lossy]) -> None:
    lossy[0].lost_after_events = [2] + [0] * 40
    _, _, end = service.run(collect(service, request("gone", pieces=(Piece("x", 1),))))
    lossy[0].lost_after_events = []
    assert end.reason is FinishReason.FAILED
    assert isinstance(end.error, ReplicaLostError)
    service.run(at_rest(service))


def test_an_encoder_that_stays_lost_refuses_before_anything_is_given_out(
    service: InProcess, lossy: list[Lossy]
) -> None:
    lossy[0].num_text_losses = 40
    with pytest.raises(ReplicaLostError):
        service.run(collect(service, request("no-text")))
    lossy[0].num_text_losses = 0
    service.run(at_rest(service))


def test_a_caller_that_leaves_frees_everything(service: InProcess) -> None:
    async def leave() -> None:
        tenant = await service.service.authenticate(None)
        async with service.service.generate(tenant, request("left", duration_s=60.0)) as events:
            async for event in events:
                if isinstance(event, PieceAudio):
                    break
        assert (await service.service.status(tenant, "left")).state in {"running", "cancelled"}
        await at_rest(service)
        assert (await service.service.status(tenant, "left")).state == "cancelled"

    service.run(leave())


def test_a_cancelled_request_says_so(service: InProcess) -> None:
    async def cancel() -> GenerationEnd:
        tenant = await service.service.authenticate(None)
        async with service.service.generate(tenant, request("cancelled", duration_s=60.0)) as events:
            async for event in events:
                if isinstance(event, PieceAudio) and event.sample_offset == 0 and event.piece == 0:
                    await service.service.cancel(tenant, "cancelled")
        assert isinstance(event, GenerationEnd)
        await at_rest(service)
        return event

    assert service.run(cancel()).reason is FinishReason.CANCELLED


def test_a_request_that_its_retry_replaces_says_so(service: InProcess) -> None:
    async def run() -> GenerationEnd:
        same: dict[str, Any] = {"idempotency_key": "twice", "fingerprint": "f"}
        older = asyncio.create_task(collect(service, request("older", duration_s=60.0, **same)))
        while (await service.gatekeeper.counts()).running == 0:
            await asyncio.sleep(0.01)
        end = (await collect(service, request("newer", **same)))[2]
        with pytest.raises(SupersededError):
            raise (await older)[2].error or AssertionError("it is not to end well")
        await at_rest(service)
        return end

    assert service.run(run()).reason is FinishReason.FINISHED


def test_a_deadline_ends_it(service: InProcess) -> None:
    async def run() -> GenerationEnd | None:
        try:
            _, _, end = await collect(service, request("late", duration_s=100.0, deadline_s=0.4))
        except (DeadlineExceededError, DeadlineTooShortError):  # before the first audio, or foreseen by the engine
            return None
        return end

    end = service.run(run())
    assert end is None or isinstance(end.error, DeadlineExceededError)
    service.run(at_rest(service))


def test_a_deadline_counts_from_the_beginning(
    service: InProcess, lossy: list[Lossy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gatekeeper that does not answer holds nobody beyond it; an engine gets what others have left of it."""
    admit = service.gatekeeper.admit

    async def never(_: AdmissionRequest) -> Ticket:
        await asyncio.sleep(3600)
        raise AssertionError

    async def late(asked: AdmissionRequest) -> Ticket:
        await asyncio.sleep(0.3)
        return await admit(asked)

    monkeypatch.setattr(service.gatekeeper, "admit", never)
    with pytest.raises(DeadlineExceededError):
        service.run(collect(service, request("unanswered", deadline_s=0.2)), timeout_s=10)
    monkeypatch.setattr(service.gatekeeper, "admit", late)
    _, _, end = service.run(collect(service, request("in-time", deadline_s=60.0)))
    assert end.reason is FinishReason.FINISHED
    left_s = lossy[0].deadline_s
    assert left_s is not None
    assert 30 < left_s <= 59.7


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"duration_s": 0.01}, InvalidRequestError),
        ({"melody": b"not audio"}, InvalidRequestError),
        ({"prompt_audio": b"not audio"}, InvalidRequestError),
        ({"stems": True}, InvalidRequestError),
        ({"first_sample": 96_000}, InvalidRequestError),
        ({"prompt_audio": recording(3.0)}, InvalidRequestError),
        ({"pieces": (Piece("la " * 600, 1),)}, InvalidRequestError),
        ({"melody": recording(1.0), "stems": True}, NotOfferedError),
        ({"extend_stride_s": 30.0}, InvalidRequestError),
    ],
)
def test_what_cannot_be_made_is_refused(service: InProcess, fields: dict[str, Any], error: type[Exception]) -> None:
    """Before admission, unless only the work shows it: then it has failed, for a reason that is the caller's."""
    counted = dict(service.recorder.counted)
    with pytest.raises(error) as caught:
        service.run(collect(service, request("refused", **fields)))
    service.run(at_rest(service))
    code = report(caught.value).code
    is_damaged = b"not audio" in fields.values()
    for name in ("requests_admitted", "requests_failed", "requests_rejected"):
        reason = "" if name == "requests_admitted" else code
        is_counted = is_damaged != (name == "requests_rejected")
        assert service.recorder.counted.get((name, reason), 0) - counted.get((name, reason), 0) == is_counted, name
    assert code in CLIENT_CODES
    assert report(caught.value).param in {"prompt" if name == "pieces" else name for name in fields}
    assert "pip install" not in str(caught.value)


def test_a_deadline_that_cannot_be_met_is_no_failure_of_the_service(service: InProcess) -> None:
    before = service.recorder.counted.get(("requests_cancelled", "deadline_too_short"), 0)
    with pytest.raises(DeadlineTooShortError) as caught:
        service.run(collect(service, request("too-short", duration_s=100.0, deadline_s=0.5)))
    seen = report(caught.value)
    assert (seen.http_status, seen.grpc_code, seen.retry_after_s) == (504, "DEADLINE_EXCEEDED", None)
    assert service.recorder.counted[("requests_cancelled", "deadline_too_short")] == before + 1
    service.run(at_rest(service))


def test_what_fails_alike_in_every_replica_is_not_tried_for_long(service: InProcess, lossy: list[Lossy]) -> None:
    lossy[0].num_text_failures = 10
    with pytest.raises(InternalError):
        service.run(collect(service, request("broken", pieces=(Piece("x", 1),))))
    assert lossy[0].num_text_failures == 8
    lossy[0].num_text_failures = 0
    service.run(at_rest(service))


def test_readiness_follows_the_parts(service: InProcess, lossy: list[Lossy]) -> None:
    async def seen() -> dict[str, str]:
        service.service._look_again_at = 0.0  # now, whatever the health service of gRPC has just asked for
        readiness = await service.service.readiness()
        assert readiness.ready == (set(readiness.details.values()) == {"ready"})
        return readiness.details

    assert service.run(seen()) == {"gatekeeper": "ready", "demo": "ready"}
    lossy[0].is_lost = True
    assert service.run(seen()) == {"gatekeeper": "ready", "demo": "not reached"}
    lossy[0].is_lost = False
    assert service.run(seen()) == {"gatekeeper": "ready", "demo": "ready"}


def test_a_replica_that_leaves_is_not_ready_before_it_stops_listening() -> None:
    """So that balancers turn to others: then what is under way ends, and what is to be settled is settled."""
    seen: list[str] = []
    service = GenerationService(ServeSettings(), {}, LocalGatekeeper(ServeSettings()), None)  # type: ignore[arg-type]

    async def stop(grace_s: float) -> None:
        readiness = await service.readiness()
        assert not readiness.ready
        assert readiness.details == {"edge": "leaving"}
        seen.append(f"stop {grace_s:g}")

    async def close() -> None:
        seen.append("close")

    async def run() -> float:
        service.close = close  # type: ignore[method-assign]
        edge, settings = HttpSettings(lame_duck_s=0.2), ServeSettings()
        replica = SimpleNamespace(service=service, edge=edge, settings=settings, _server=SimpleNamespace(stop=stop))
        began = asyncio.get_running_loop().time()
        await Ingress.__del__(replica)  # type: ignore[arg-type]
        return asyncio.get_running_loop().time() - began

    assert asyncio.run(run()) >= 0.2
    assert seen == [f"stop {ServeSettings().drain_s:g}", "close"]


class Whole:
    """A model's parts that answer, or do not."""

    def __init__(self, is_there: bool) -> None:
        self.components, self.is_there = self, is_there

    async def check(self) -> None:
        if not self.is_there:
            raise LostError("planned")


def test_one_model_that_is_whole_is_enough_but_not_without_a_gatekeeper_that_takes_requests() -> None:
    keeper = LocalGatekeeper(ServeSettings())

    async def seen(*are_there: bool) -> Readiness:
        parts: Any = {str(index): Whole(is_there) for index, is_there in enumerate(are_there)}
        return await GenerationService(ServeSettings(), parts, keeper, None).readiness()  # type: ignore[arg-type]

    async def run() -> None:
        one = await seen(False, True)
        assert (one.ready, one.details) == (True, {"gatekeeper": "ready", "0": "not reached", "1": "ready"})
        assert not (await seen(False, False)).ready
        assert await keeper.drain() == 0
        draining = await seen(True, True)
        assert (draining.ready, draining.details["gatekeeper"]) == (False, "draining")
        with pytest.raises(OverloadedError):
            await keeper.admit(AdmissionRequest("r", "anonymous", "demo", 1.0))

    asyncio.run(run())
    keeper.close()


def test_unknown_keys_and_names_are_counted_without_them(service: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(_: object) -> None:
        raise UnauthenticatedError("expected a known API key, got another")

    monkeypatch.setattr(service.gatekeeper, "authenticate", refuse)
    labels: list[dict[str, str]] = []
    count = service.recorder.count

    def noted(name: str, amount: float, of: dict[str, str]) -> None:
        labels.extend([of] * (name == "requests_rejected"))
        count(name, amount, of)

    monkeypatch.setattr(service.recorder, "count", noted)
    with pytest.raises(UnauthenticatedError):
        service.run(service.service.authenticate("no such key"))
    monkeypatch.undo()
    monkeypatch.setattr(service.recorder, "count", noted)
    with pytest.raises(NotFoundError):
        service.run(collect(service, GenerationRequest("unknown", "no such model", (Piece(None, 1),), 1.0)))
    assert labels == [
        {"model": "", "tenant_class": "", "reason": "invalid_api_key"},
        {"model": "", "tenant_class": "default", "reason": "not_found"},
    ]


def test_an_unknown_model_is_not_found(service: InProcess) -> None:
    asked = GenerationRequest("unknown", "other", (Piece(None, 1),), 1.0, SamplingParams())
    with pytest.raises(NotFoundError):
        service.run(collect(service, asked))


def test_what_runs_is_settled_when_the_replica_stops() -> None:
    running = InProcess(small_settings())

    async def run() -> tuple[GenerationEnd, int]:
        task = asyncio.create_task(collect(running, request("stopped", duration_s=60.0)))
        while not (await running.engine.load()).num_running:
            await asyncio.sleep(0.01)
        await running.service.close()
        num_running = (await running.gatekeeper.counts()).running
        try:
            return (await task)[2], num_running
        except RequestCancelledError as error:  # nothing had been given out yet
            return GenerationEnd("stopped", FinishReason.CANCELLED, (), 0.0, error), num_running

    try:
        end, num_running = running.run(run())
    finally:
        running.close()
    assert (end.reason, num_running) == (FinishReason.CANCELLED, 0)
