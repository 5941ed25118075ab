"""Chroma features against transformers' extractor on audio of real length."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import MusicgenMelodyFeatureExtractor
from transformers.audio_utils import chroma_filter_bank as peer_filter_bank

from musicgen.config import ChromaConfig
from musicgen.errors import InvalidRequestError
from musicgen.models.chroma import ChromaExtractor, chroma_filter_bank

EXTRACTOR = ChromaExtractor(ChromaConfig())
PEER = MusicgenMelodyFeatureExtractor()


def melody(seconds: float, sample_rate: int = 32000) -> Tensor:
    """`[N]`: decaying harmonic notes of a tune with chords and a little noise."""
    generator = torch.Generator().manual_seed(1)
    t = torch.arange(int(seconds * sample_rate)) / sample_rate
    note = (t / 0.37).long()
    wav = 0.01 * torch.randn(t.shape, generator=generator)
    for steps, level in ((torch.tensor([0, 4, 7, 9, 5, 2, 11, 3]), 0.3), (torch.tensor([7, 0, 2, 5]), 0.12)):
        phase = 2 * torch.pi * torch.cumsum(196 * 2 ** (steps[note % len(steps)] / 12), 0) / sample_rate
        wav += level * torch.exp(-3 * (t - note * 0.37)) * sum(torch.sin(n * phase) / n for n in (1, 2, 3))
    return wav


def peer_features(wav: Tensor) -> Tensor:
    """transformers' features, repeated to 235 frames as its model does."""
    features = PEER(wav.numpy(), sampling_rate=32000, return_tensors="pt")["input_features"][0]
    return features.repeat(-(-235 // features.shape[0]), 1)[:235]


@pytest.mark.parametrize(
    ("sample_rate", "n_fft", "num_chroma"), [(32000, 16384, 12), (22050, 2048, 12), (16000, 512, 24)]
)
def test_filter_bank_equals_transformers(sample_rate: int, n_fft: int, num_chroma: int) -> None:
    expected = peer_filter_bank(n_fft, num_chroma, sample_rate, tuning=0)
    ours = chroma_filter_bank(sample_rate, n_fft, num_chroma)
    assert ours.shape == (num_chroma, n_fft // 2 + 1)
    np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("seconds", [0.3, 0.512, 5.0, 29.99, 30.0, 40.0])
def test_features_equal_transformers(seconds: float) -> None:
    wav = melody(seconds)
    (ours,) = EXTRACTOR([(wav, 32000)])
    assert ours.shape == (235, 12)
    assert torch.equal(ours.sum(dim=1), torch.ones(235))
    assert torch.equal(ours, peer_features(wav))
    if seconds >= 5:
        assert len(ours.argmax(dim=1).unique()) >= 5


def test_each_recording_is_on_its_own() -> None:
    recordings = [(melody(5.0), 32000), (melody(12.3)[None], 32000), (melody(3.0, 44100), 44100)]
    together = EXTRACTOR(recordings)
    for recording, features in zip(recordings, together, strict=True):
        assert torch.equal(features, EXTRACTOR([recording])[0])
    assert not torch.equal(together[0], together[2])


def test_stereo_is_averaged_and_short_ones_repeat() -> None:
    wav = melody(5.0)
    (mono,) = EXTRACTOR([(wav, 32000)])
    (stereo,) = EXTRACTOR([(torch.stack([wav * 1.5, wav * 0.5]), 32000)])
    assert torch.equal(stereo, mono)
    num_frames = 5 * 32000 // 4096 + 1
    assert torch.equal(mono[num_frames : 2 * num_frames], mono[:num_frames])


def test_other_sample_rates_give_nearly_the_same() -> None:
    (reference,) = EXTRACTOR([(melody(20.0), 32000)])
    for sample_rate in (44100, 48000, 44099):
        (features,) = EXTRACTOR([(melody(20.0, sample_rate), sample_rate)])
        assert (features.argmax(1) == reference.argmax(1)).float().mean() > 0.9


def test_a_pure_note_is_its_pitch_class() -> None:
    t = torch.arange(64000) / 32000
    for pitch_class, frequency_hz in ((9, 440.0), (0, 261.63), (6, 369.99)):
        (features,) = EXTRACTOR([(torch.sin(2 * torch.pi * frequency_hz * t), 32000)])
        # the padding at the ends of the recording is no note
        assert (features.argmax(1)[2:13] == pitch_class).all()


def test_silence_is_the_first_class() -> None:
    (features,) = EXTRACTOR([(torch.zeros(32000), 32000)])
    assert (features.argmax(1) == 0).all()


def test_only_the_models_length_is_looked_at() -> None:
    wav = melody(31.0)
    changed = torch.cat([wav[:960_000], torch.zeros(32000)])
    assert torch.equal(EXTRACTOR([(wav, 32000)])[0], EXTRACTOR([(changed, 32000)])[0])
    assert EXTRACTOR.max_samples == 960_000
    assert ChromaExtractor(ChromaConfig(num_frames=3)).max_samples == 3 * 4096 - 1


def test_cutting_the_recording_or_its_features_differs_in_the_last_two_frames_only() -> None:
    """As transformers and audiocraft do it: the windows of the other frames end before the cut, at 30 s."""
    wav = melody(40.0)
    wav[960_000:] = 0.3 * torch.sin(2 * torch.pi * 311.13 * torch.arange(320_000) / 32000)
    whole = (EXTRACTOR.filters @ EXTRACTOR.spectrogram(wav)).argmax(dim=0)[:235]
    cut = EXTRACTOR([(wav, 32000)])[0].argmax(dim=1)
    assert torch.equal(cut[:233], whole[:233])
    assert not torch.equal(cut, whole)


@pytest.mark.parametrize(
    ("wav", "sample_rate"),
    [(torch.zeros(0), 32000), (torch.zeros(1, 2, 100), 32000), (torch.zeros(100, dtype=torch.int16), 32000),
     (torch.zeros(100), 0), (torch.zeros(100), 10**7)],
)  # fmt: skip
def test_bad_recordings_are_refused(wav: Tensor, sample_rate: int) -> None:
    with pytest.raises(InvalidRequestError):
        EXTRACTOR([(wav, sample_rate)])
