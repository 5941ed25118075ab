"""Optional: take the melody-bearing stems out of a recording with HT-Demucs before the chroma is computed.

Drums and bass blur the melody; the released melody models were trained on vocals and the rest without them. Knows
nothing of chroma or of the language model, and imports demucs only when a separation is asked for.
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
    """A model that splits audio into stems, as demucs' models do it."""

    sources: Sequence[str]
    """Names of the stems, in the order of the output."""
    samplerate: int

    def separate(self, mix: Tensor) -> Tensor:
        """`[2, N]` float32 at `samplerate` → `[len(sources), 2, N]`."""
        ...


def check_installed() -> None:
    """Raises: MissingDependencyError: the package of the default separator is not there."""
    if importlib.util.find_spec("demucs") is None:
        raise MissingDependencyError(
            f"stem separation: expected the package demucs, got none; install it with: {_INSTALL}"
        )


class _HTDemucs:
    """demucs' `htdemucs` behind the `Separator` protocol."""

    def __init__(self, device: torch.device) -> None:
        try:
            from demucs.apply import apply_model
            from demucs.pretrained import get_model
        except ImportError as error:
            raise MissingDependencyError(
                f"stem separation: expected the package demucs, got {error}; install it with: {_INSTALL}"
            ) from error
        self._apply = apply_model
        self._model = get_model("htdemucs").to(device).eval()
        self._device = device
        self.sources: Sequence[str] = list(self._model.sources)
        self.samplerate = int(self._model.samplerate)

    def separate(self, mix: Tensor) -> Tensor:
        """Normalised as demucs' own command does: mean and deviation of the channels' mean."""
        mono = mix.mean(dim=0)
        mean, deviation = mono.mean(), mono.std().clamp_min(1e-8)
        batch = ((mix - mean) / deviation)[None].to(self._device)
        # `shifts` averages over random offsets: 0 keeps the result reproducible.
        stems: Tensor = self._apply(self._model, batch, shifts=0, device=self._device)[0]
        return stems.cpu() * deviation + mean


class MelodyStems:
    """Recordings to the mono sum of their melody-bearing stems.

    Args:
        sample_rate: of the result, in Hz.
        separator: default: HT-Demucs, loaded when first used.
        device: where the default separator runs.
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
            MissingDependencyError: demucs is not installed; names the command that installs it.
            InvalidRequestError: bad audio, or a separator without the stems.
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
    """More than two channels have no agreed stereo mix: take their mean."""
    return samples if samples.shape[0] <= _DEMUCS_CHANNELS else samples.mean(dim=0, keepdim=True)
