"""Delay points: inert unless told, readable from a file, strict about what they are told."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from musicgen_serving import delay_points

from musicgen.errors import InvalidRequestError


def test_nothing_waits_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(delay_points.VARIABLE, raising=False)
    assert all(delay_points.seconds_at(point) == 0 for point in delay_points.POINTS)


def test_only_the_named_points_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(delay_points.VARIABLE, "lm.step=0.05,edge.send=0.06")
    began = time.monotonic()
    asyncio.run(delay_points.pause(delay_points.CODEC_LAST))
    assert time.monotonic() - began < 0.05
    asyncio.run(delay_points.pause(delay_points.EDGE_SEND))
    delay_points.hold(delay_points.LM_STEP)
    assert time.monotonic() - began >= 0.11


def test_a_file_is_read_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "delays"
    monkeypatch.setenv(delay_points.VARIABLE, f"@{path}")
    assert delay_points.seconds_at(delay_points.LM_STEP) == 0
    path.write_text("lm.step=0.5\n")
    assert delay_points.seconds_at(delay_points.LM_STEP) == 0.5
    path.write_text("")
    assert delay_points.seconds_at(delay_points.LM_STEP) == 0


@pytest.mark.parametrize("text", ["lm.stop=1", "lm.step", "lm.step=soon", "lm.step=-1", "lm.step=nan"])
def test_what_cannot_be_meant_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="MUSICGEN_DELAY_POINTS"):
        delay_points.parse(text)
