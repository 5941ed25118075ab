"""The evaluation's own measures: similarity pairs, collapse, the style classifier."""

import json
import math
from pathlib import Path

import pytest
import torch

from musicgen.demo.evaluate import collapse, moved_classes, similarities
from musicgen.demo.plot import plot, plot_chroma
from musicgen.demo.style import features, fit_classifier


def tone(frequency_hz: float, seconds: float = 2.0) -> torch.Tensor:
    return 0.5 * torch.sin(2 * math.pi * frequency_hz * torch.arange(int(32000 * seconds)) / 32000)


def test_right_pairs_are_told_from_wrong_ones() -> None:
    melodies = torch.stack([tone(440.0), tone(523.25), tone(622.25)])
    pairs = similarities(melodies, melodies)
    assert pairs.right == pytest.approx(1.0)
    assert pairs.wrong == 0.0
    assert pairs.right_soft > 0.99 > pairs.wrong_soft


def test_collapse() -> None:
    tune = torch.cat([tone(440.0), tone(523.25), tone(622.25)])
    wav = torch.stack([tune, tone(440.0, 6.0), 0.001 * tune, tune])
    assert collapse(wav) == {"silent": 0.25, "one_note": 0.25}


def test_moved_classes() -> None:
    wav = torch.stack([tone(440.0)] * 4)
    decoded = torch.stack([tone(440.0), tone(466.16), tone(415.3), tone(659.26)])  # itself, up, down, a fifth up
    assert moved_classes(wav, decoded) == {"semitone": 0.5, "fourth_or_fifth": 0.25}


def test_classifier_separates_timbres() -> None:
    torch.manual_seed(0)

    def example(style: str) -> torch.Tensor:
        pitch = 200 * 2 ** torch.rand(()).item()
        wav = tone(pitch, 1.0)
        return wav.sign() * 0.3 if style == "square" else wav + 0.2 * torch.randn(32000) * (style == "noisy")

    styles = ["pure", "square", "noisy"] * 8
    wav = torch.stack([example(style) for style in styles])
    classifier = fit_classifier(features(wav), styles)
    fresh = ["square", "noisy", "pure"] * 4
    assert classifier.predict(torch.stack([example(style) for style in fresh])) == fresh


def test_loss_curves_are_drawn(tmp_path: Path) -> None:
    names = ("right", "wrong_melody", "no_melody", "wrong_text")
    records = [{"step": step, "train": [6.0 - step, 6.0, 6.0, 6.0]} for step in (1, 2)]
    records += [{"step": 2, "held_out": {name: [5.0, 6.0, 6.0, 6.0] for name in names}}]
    (tmp_path / "log.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    plot(tmp_path / "log.jsonl", tmp_path / "loss.png")
    plot_chroma([("a", tone(440.0)), ("c", tone(523.25))], tmp_path / "chroma.png")
    for name in ("loss", "chroma"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
