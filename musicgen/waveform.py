"""Audio tensors: validation, resampling, channel conversion. Independent of files and models."""

from __future__ import annotations

import math
import os
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musicgen.arguments import checked_int
from musicgen.errors import InvalidRequestError

Array = np.ndarray[Any, Any]
Waveform = Tensor | Array
"""`[C, N]`, as supplied by a caller; see `validate_waveform`."""

MAX_CHANNELS = 8
MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 1000, 768_000
MAX_SAMPLES_PER_S = 2 * 96_000
"""Limit on a recording's samples over all channels, per second of the maximum duration. The duration alone does not
bound memory: a 3 MB file can hold ten minutes of silence at 655 kHz in eight channels (12 GB)."""
_CHECKED_SAMPLES = 2**18
_MAX_TERM = 2000
"""The size of a filter bank for a ratio p/q is about p · q: rates without a common factor would need gigabytes. Ratios
with terms up to this approximate any other to within 1e-6, which is inaudible."""
_ZERO_CROSSINGS = 24
_ROLLOFF = 0.945
_EXPECTED_DTYPE = "float samples, or 16- or 32-bit PCM"
LOAD_IT_FIRST = "read a file with `musicgen.audio.load_audio` first"


def check_sample_rate(sample_rate: object, param: str = "sample_rate") -> int:
    """The rate as a plain integer. Raises: InvalidRequestError: not an integer, or outside the supported range."""
    expected = f"an integer rate in Hz, {MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE}"
    return checked_int(sample_rate, expected, param=param, low=MIN_SAMPLE_RATE, high=MAX_SAMPLE_RATE)


def resample(wav: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """`[..., N]` float32 at `from_rate` Hz → `[..., ⌊N · to_rate / from_rate⌋]` at `to_rate`, to within 1e-6 of that.

    A windowed sinc with 24 zero crossings and a rolloff of 0.945: the filter that MusicGen was trained with (julius),
    with the torchaudio parameters of transformers' melody features. torchaudio rounds the length up, julius down: the
    additional sample could become a whole frame of a prompt.

    Raises:
        InvalidRequestError: invalid rate.
    """
    from torchaudio.functional import resample as torchaudio_resample

    ratio = _ratio(from_rate, to_rate)
    if ratio == 1 or wav.shape[-1] == 0:
        return wav
    resampled: Tensor = torchaudio_resample(
        wav, ratio.denominator, ratio.numerator, rolloff=_ROLLOFF, lowpass_filter_width=_ZERO_CROSSINGS
    )
    return resampled[..., : resampled_len(wav.shape[-1], from_rate, to_rate)]


def resampled_len(num_samples: int, from_rate: int, to_rate: int) -> int:
    """The output length of `resample` for `num_samples` samples. Raises: see `resample`."""
    return math.floor(num_samples * _ratio(from_rate, to_rate))


def _ratio(from_rate: int, to_rate: int) -> Fraction:
    """Output samples per input sample, with terms up to `_MAX_TERM`. Raises: InvalidRequestError: invalid rate."""
    ratio = Fraction(check_sample_rate(to_rate), check_sample_rate(from_rate))
    if max(ratio.numerator, ratio.denominator) <= _MAX_TERM:
        return ratio
    small = Fraction(min(ratio, 1 / ratio)).limit_denominator(_MAX_TERM)
    return small if ratio < 1 else 1 / small


class StreamResampler:
    """Streaming `resample`: the concatenated results equal those for the whole recording, up to float rounding.

    At a ratio of q/p, each step turns p samples into q, using those p and `_reach` more on either side. Buffered are
    the steps that the next one reaches back to, and the samples that still lack their right context.

    Args:
        from_rate, to_rate: in Hz. Raises: InvalidRequestError: invalid rate.
    """

    def __init__(self, from_rate: int, to_rate: int) -> None:
        self._rates = from_rate, to_rate
        ratio = _ratio(from_rate, to_rate)
        self._in, self._out = ratio.denominator, ratio.numerator
        band = _ROLLOFF * min(self._in, self._out)
        self._reach = 0 if ratio == 1 else math.ceil(_ZERO_CROSSINGS * self._in / band)
        self._kept: Tensor | None = None
        """`[..., N]`: buffered samples, starting at a step boundary."""
        self._num_done = 0
        """Steps at the start of `_kept` whose output has been returned."""

    def resample(self, samples: Tensor) -> Tensor:
        """Add the next `[..., N]` float32 samples (kept, not copied); returns the `[..., M]` available so far."""
        known = samples if self._kept is None else torch.cat([self._kept, samples], dim=-1)
        num_ready = max(self._num_done, (known.shape[-1] - self._reach) // self._in)
        ready = self._part(known, self._num_done, num_ready)
        num_forgotten = max(0, num_ready - math.ceil(self._reach / self._in))
        self._kept, self._num_done = known[..., num_forgotten * self._in :], num_ready - num_forgotten
        return ready

    def finish(self) -> Tensor:
        """The remaining samples. At least one part must have been added."""
        assert self._kept is not None
        return self._part(self._kept, self._num_done, None)

    def _part(self, known: Tensor, first_step: int, end_step: int | None) -> Tensor:
        """Steps `first_step` to `end_step`; the others are computed and discarded."""
        if first_step == end_step:
            return known[..., :0]
        end = None if end_step is None else end_step * self._out
        return resample(known, *self._rates)[..., first_step * self._out : end]


def validate_waveform(wav: Any, param: str = "wav", *, name: str = "a waveform") -> Tensor:
    """Validate audio supplied by a caller.

    Args:
        wav: `[N]` or `[C, N]` tensor or NumPy array: floats, or 16- or 32-bit PCM.
        param, name: names for it in error messages.
    Returns:
        `[C, N]` float32; shares the input's memory where possible.
    Raises:
        InvalidRequestError: not a tensor, of another shape, empty, longer than 30 minutes at 768 kHz, NaN or infinite.
    """
    wav = to_tensor(wav, param)
    if not isinstance(wav, Tensor):
        hint = LOAD_IT_FIRST if isinstance(wav, str | os.PathLike) else ""
        raise InvalidRequestError(
            "a tensor or NumPy array [C, N]", f"{name} of type {type(wav).__name__}", hint, param=param
        )
    shape = list(wav.shape)
    samples: Tensor = wav[None] if wav.ndim == 1 else wav
    if samples.ndim != 2 or not 1 <= samples.shape[0] <= MAX_CHANNELS:
        hint = "transpose it" if samples.ndim == 2 and 1 <= samples.shape[1] <= MAX_CHANNELS else ""
        raise InvalidRequestError(f"shape [N] or [C, N] with C ≤ {MAX_CHANNELS}", f"{shape}", hint, param=param)
    if samples.shape[1] == 0:
        raise InvalidRequestError("at least one sample", f"{name} without samples", param=param)
    if samples.dtype in (torch.int16, torch.int32):
        samples = samples.float() / (-torch.iinfo(samples.dtype).min)
    if not samples.is_floating_point():
        raise InvalidRequestError(_EXPECTED_DTYPE, str(samples.dtype), param=param)
    samples = samples.float()
    # In blocks: checking a whole recording at once would double its memory.
    if not all(bool(part.isfinite().all()) for part in torch.split(samples, _CHECKED_SAMPLES, dim=-1)):
        raise InvalidRequestError("finite samples", f"{name} with NaN or infinite samples", param=param)
    return samples


def to_tensor(wav: Any, param: str) -> Any:
    """A NumPy array as a tensor, sharing its memory where possible; anything else unchanged.

    Raises:
        InvalidRequestError: an array of values that are not numbers.
    """
    if not isinstance(wav, np.ndarray):
        return wav
    try:
        return torch.from_numpy(np.require(wav, requirements=["C", "W"]))  # torch warns of read-only memory
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(_EXPECTED_DTYPE, str(wav.dtype), param=param) from error


def to_mono(wav: Tensor) -> Tensor:
    """`[..., C, N]` → `[..., 1, N]`, the mean of the channels."""
    return wav.mean(dim=-2, keepdim=True)


def convert_channels(wav: Tensor, channels: int) -> Tensor:
    """`[..., C, N]` → `[..., channels, N]`: downmixed to mono, repeated from mono, or the first channels.

    Raises:
        InvalidRequestError: fewer channels than requested, and not mono.
    """
    if wav.shape[-2] == channels:
        return wav
    if channels == 1:
        return to_mono(wav)
    if wav.shape[-2] == 1:
        return wav.expand(*wav.shape[:-2], channels, wav.shape[-1])
    if wav.shape[-2] > channels:
        return wav[..., :channels, :]
    raise InvalidRequestError(f"1 or at least {channels} channels", str(wav.shape[-2]), param="channels")


def convert_audio(wav: Tensor, from_rate: int, to_rate: int, to_channels: int) -> Tensor:
    """`[..., C, N]` at `from_rate` Hz → `[..., to_channels, N']` at `to_rate` Hz. Raises: see `resample` and
    `convert_channels`."""
    return resample(convert_channels(wav, to_channels), from_rate, to_rate)
