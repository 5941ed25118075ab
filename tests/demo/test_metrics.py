"""musicgen.metrics against cases worked by hand and against transformers' chroma."""

import math

import pytest
import torch
from transformers import MusicgenMelodyFeatureExtractor

from musicgen.metrics import (
    chroma_cosine_similarity,
    chromagram,
    one_hot_chroma,
    spectral_distance,
)
from musicgen.models.chroma import chroma_filter_bank

RATE_HZ, HOP = 32000, 4096


def tone(frequency_hz: float, num_samples: int) -> torch.Tensor:
    return 0.5 * torch.sin(2 * math.pi * frequency_hz * torch.arange(num_samples) / RATE_HZ)


@pytest.mark.parametrize(("frequency_hz", "pitch_class"), [(440.0, 9), (261.63, 0), (554.37, 1), (987.77, 11)])
def test_a_tone_is_its_pitch_class(frequency_hz: float, pitch_class: int) -> None:
    classes = chromagram(tone(frequency_hz, 64000)[None]).argmax(dim=-1)
    assert classes.shape == (1, 64000 // HOP + 1)
    assert (classes == pitch_class).all()


def test_similarity_worked_by_hand() -> None:
    # 40 chroma frames of A against 20 of A followed by 20 of C: the change lies in the middle of a frame's window,
    # the frame centred on it (number 20) hears both equally, so 20 or 21 of 40 frames agree.
    num_samples = 40 * HOP
    a, c = tone(440.0, num_samples), tone(523.25, num_samples)
    mixed = torch.cat([a[: num_samples // 2], c[num_samples // 2 :]])
    result = chroma_cosine_similarity(a[None], mixed[None]).item()
    assert round(result * 40) in (20, 21)
    assert result == pytest.approx(round(result * 40) / 40, abs=1e-6)


def test_equal_is_one_and_other_pitch_class_is_zero() -> None:
    a, c = tone(440.0, 65536)[None], tone(523.25, 65536)[None]
    assert chroma_cosine_similarity(a, a).item() == pytest.approx(1.0)
    assert chroma_cosine_similarity(a, c).item() == 0.0
    # An octave higher is the same pitch class.
    assert chroma_cosine_similarity(a, tone(880.0, 65536)[None]).item() == pytest.approx(1.0)


def test_soft_similarity_of_a_chord() -> None:
    # A alone against A + E of equal power: (1, 0)·(1, 1)/√2 = 0.707, up to what leaks into neighbours.
    a = tone(440.0, 65536)[None]
    chord = a + tone(659.26, 65536)[None]
    assert chroma_cosine_similarity(a, chord, argmax=False).item() == pytest.approx(math.sqrt(0.5), abs=0.06)


@pytest.mark.filterwarnings("ignore")
def test_chroma_is_the_one_of_transformers() -> None:
    torch.manual_seed(0)
    wav = torch.randn(100_000) * 0.1 + tone(392.0, 100_000)
    theirs = MusicgenMelodyFeatureExtractor()(wav.numpy(), sampling_rate=RATE_HZ, return_tensors="pt").input_features
    ours = one_hot_chroma(chromagram(wav[None]))
    assert torch.equal(ours, theirs.float())


def test_short_recordings_are_padded() -> None:
    assert chromagram(tone(440.0, 1000)[None]).shape[-1] == 12
    with pytest.raises(ValueError, match=r"\[B, samples\]"):
        chromagram(torch.zeros(10))


def test_filter_bank_columns_name_their_pitch_class() -> None:
    bank = torch.from_numpy(chroma_filter_bank(RATE_HZ, 16384, 12)).float()
    assert bank.shape == (12, 8193)
    for midi in range(60, 84):
        column = round(440 * 2 ** ((midi - 69) / 12) * 16384 / RATE_HZ)
        assert bank[:, column].argmax().item() == midi % 12


def test_spectral_distance_orders_recordings() -> None:
    torch.manual_seed(0)
    wav = tone(440.0, 32000)[None]
    near, far = wav + 0.001 * torch.randn_like(wav), torch.randn_like(wav)
    assert spectral_distance(wav, wav).item() == 0.0
    assert 0 < spectral_distance(wav, near).item() < spectral_distance(wav, far).item()
    # Twice the amplitude: convergence 1, log distance ln 2 where the tone stands above the floor, at every resolution.
    loud = spectral_distance(torch.ones_like(wav) * torch.randn_like(wav), wav * 0)
    assert torch.isfinite(loud).all()
    with pytest.raises(ValueError, match="equal shape"):
        spectral_distance(wav, wav[:, :-1])


def test_spectral_distance_of_twice_the_amplitude() -> None:
    torch.manual_seed(0)
    noise = torch.randn(1, 32000)
    # ‖2X − X‖/‖X‖ = 1 and |ln 2X − ln X| = ln 2 in every bin.
    assert spectral_distance(noise, 2 * noise).item() == pytest.approx(1 + math.log(2), abs=1e-3)
