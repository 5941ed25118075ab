"""Optional source separation: extracts the melodic stems of a recording with HT-Demucs before computing chroma.

Drums and bass blur the melody; the released melody models were trained on vocals and the other stem only. Independent
of chroma and the language model; imports demucs on first use.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from musicgen.errors import InvalidRequestError, MissingDependencyError
from musicgen.waveform import convert_audio, resample, validate_waveform

MELODY_STEMS = ("vocals", "other")
_DEMUCS_CHANNELS = 2
_INSTALL = "pip install 'musicgen-serve[stems]'"


class Separator(Protocol):
    """A model that splits audio into stems, with the interface of demucs' models."""

    sources: Sequence[str]
    """Stem names, in output order."""
    samplerate: int

    def separate(self, mix: Tensor) -> Tensor:
        """`[2, N]` float32 at `samplerate` → `[len(sources), 2, N]`."""
        ...


def check_installed() -> None:
    """Raises: MissingDependencyError: the package of the default separator is not installed."""
    if importlib.util.find_spec("demucs") is None:
        raise MissingDependencyError(f"stem separation: expected the package demucs to be installed; run: {_INSTALL}")


class _HTDemucs:
    """demucs' `htdemucs` behind the `Separator` protocol."""

    def __init__(self, device: torch.device) -> None:
        try:
            from demucs.apply import apply_model
            from demucs.pretrained import get_model
        except ImportError as error:
            raise MissingDependencyError(
                f"stem separation: expected the package demucs, got an import error ({error}); run: {_INSTALL}"
            ) from error
        self._apply = apply_model
        self._model = get_model("htdemucs").to(device).eval()
        self._device = device
        self.sources: Sequence[str] = list(self._model.sources)
        self.samplerate = int(self._model.samplerate)

    def separate(self, mix: Tensor) -> Tensor:
        """Normalises by the mean and standard deviation of the channels' mean, as demucs' own command does."""
        mono = mix.mean(dim=0)
        mean, deviation = mono.mean(), mono.std().clamp_min(1e-8)
        batch = ((mix - mean) / deviation)[None].to(self._device)
        # `shifts` would average over random offsets; 0 keeps the result reproducible.
        stems: Tensor = self._apply(self._model, batch, shifts=0, device=self._device)[0]
        return stems.cpu() * deviation + mean


class MelodyStems:
    """Reduces recordings to the mono sum of their melodic stems.

    Args:
        sample_rate: output rate in Hz.
        separator: default: HT-Demucs, loaded on first use.
        device: of the default separator.
    """

    def __init__(
        self, sample_rate: int, separator: Separator | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.sample_rate = sample_rate
        self._separator = separator
        self._device = torch.device(device)

    @torch.no_grad()
    def __call__(self, wav: Tensor, sample_rate: int) -> Tensor:
        """`[N]` or `[C, N]` at `sample_rate` Hz → `[1, N']` float32 at `self.sample_rate`.

        Raises:
            MissingDependencyError: demucs is not installed; the message contains the install command.
            InvalidRequestError: invalid audio, or a separator that lacks the stems.
        """
        samples = validate_waveform(wav, "melody")
        if self._separator is None:
            self._separator = _HTDemucs(self._device)
        separator = self._separator
        missing = [stem for stem in MELODY_STEMS if stem not in separator.sources]
        if missing:
            expected = "a separator with the stems " + " and ".join(MELODY_STEMS)
            raise InvalidRequestError(expected, ", ".join(separator.sources), param="separator")
        mix = convert_audio(_stereo_or_mono(samples), sample_rate, separator.samplerate, _DEMUCS_CHANNELS)
        stems = separator.separate(mix.contiguous())
        melody = stems[[list(separator.sources).index(stem) for stem in MELODY_STEMS]].sum(dim=0)
        return resample(melody.mean(dim=0, keepdim=True), separator.samplerate, self.sample_rate)


def _stereo_or_mono(samples: Tensor) -> Tensor:
    """More than two channels have no standard stereo downmix: take their mean."""
    return samples if samples.shape[0] <= _DEMUCS_CHANNELS else samples.mean(dim=0, keepdim=True)
