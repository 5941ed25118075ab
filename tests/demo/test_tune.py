"""The project's own melody is what it says, as the chroma hears it; the file check finds what is wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from musicgen.config import ChromaConfig
from musicgen.demo import check, tune
from musicgen.models.chroma import ChromaExtractor


def _notes(text: str) -> list[str]:
    return text.split()


CLASSES = ("C", "Db", "D", "Eb", "E", "F", "Gb", "G", "Ab", "A", "Bb", "B")
_START = [note for note in _notes("G G Ab Bb Bb Ab G F Eb Eb F G") for _ in range(2)]
_OPEN = [*_START, *_notes("G G G F F F F F")]
_CLOSED = [*_START, *_notes("F F F Eb Eb Eb Eb Eb")]
_MIDDLE = _notes("F F F F G G Eb Eb F F G Ab G G Eb Eb F F G Ab G G F F Eb Eb F F Bb Bb Bb Bb")
TUNE = [*_OPEN, *_CLOSED, *_MIDDLE, *_CLOSED]
"""The Ode to Joy in E flat, a note for each half beat."""


def test_the_chroma_hears_the_notes() -> None:
    wav = torch.from_numpy(tune.melody())[None]
    assert wav.shape == (1, 30 * tune.SAMPLE_RATE_HZ)
    (chroma,) = ChromaExtractor(ChromaConfig())([(wav, tune.SAMPLE_RATE_HZ)])
    half_s = tune.BEAT_S / 2
    times_s = np.arange(len(chroma)) * 4096 / 32000
    halves = np.minimum(times_s // half_s, len(TUNE) - 1).astype(int)
    expected = [CLASSES.index(TUNE[half]) for half in halves]
    heard = np.mean(chroma.argmax(dim=1).numpy() == np.array(expected))
    assert heard > 0.85  # a window of half a second blurs the joints


@pytest.mark.parametrize(
    ("samples", "rate", "words"),
    [
        (np.full(32000, 0.5), 32000, None),
        (np.full(32000, 0.5), 44100, "44100 Hz (WRONG)"),
        (np.full(16000, 0.5), 32000, "0.50 s (WRONG)"),
        (np.zeros(32000), 32000, "rms 0.000 (WRONG)"),
        (np.full(32000, np.nan), 32000, "not finite (WRONG)"),
    ],
)
def test_check(samples: np.ndarray, rate: int, words: str | None, tmp_path: Path) -> None:
    path = tmp_path / "file.wav"
    soundfile.write(path, samples, rate, subtype="FLOAT")
    line, good = check.check(path, 32000, 1.0)
    assert good is (words is None)
    assert str(path) in line
    assert ("WRONG" in line) is not good
    assert words is None or words in line


def test_check_fails_if_one_file_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tmp_path / "good.wav"
    soundfile.write(good, np.full(32000, 0.5), 32000)
    command = ["check", "--rate", "32000", "--seconds", "1", str(good)]
    monkeypatch.setattr(sys, "argv", command)
    assert check.main() == 0
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "absent.wav")])
    assert check.main() == 1
    assert "absent.wav: cannot be read" in capsys.readouterr().out
