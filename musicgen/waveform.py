"""Audio as tensors: checks, sample rates, channels. Knows nothing of files or models."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from musicgen.errors import InvalidRequestError

MAX_CHANNELS = 8
MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 1000, 768_000
MAX_SAMPLES_PER_S = 2 * 96_000
"""Samples of all channels together that a recording may have for each second of the longest that is read: its length in
seconds alone bounds no memory, a file of 3 MB can hold ten minutes of silence at 655 kHz in eight channels (12 GB)."""
_CHECKED_SAMPLES = 2**18
_MAX_TERM = 2000
"""The filter bank of a ratio p/q has a size of about p · q: rates without a common factor would need gigabytes. A
ratio of terms up to this is within 1e-6 of any other, which nobody hears."""
_ZERO_CROSSINGS = 24
_ROLLOFF = 0.945


def check_sample_rate(sample_rate: int, param: str = "sample_rate") -> None:
    """Raises: InvalidRequestError: not a whole number of Hz, or none that any audio has."""
    is_int = isinstance(sample_rate, int) and not isinstance(sample_rate, bool)
    if not is_int or not MIN_SAMPLE_RATE <= sample_rate <= MAX_SAMPLE_RATE:
        expected = f"an integer rate in Hz, {MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE}"
        raise InvalidRequestError(expected, repr(sample_rate), param=param)


def resample(wav: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """`[..., N]` float32 at `from_rate` Hz → `[..., ⌈N · to_rate / from_rate⌉]` at `to_rate`, to within 1e-6 of that.

    A windowed sinc of 24 zero crossings that begins to fall at 94.5 % of the band: the filter that MusicGen was
    trained with (julius), as transformers' melody features set it for torchaudio.

    Raises:
        InvalidRequestError: an impossible rate.
    """
    from torchaudio.functional import resample as torchaudio_resample

    ratio = _ratio(from_rate, to_rate)
    if ratio == 1 or wav.shape[-1] == 0:
        return wav
    resampled: Tensor = torchaudio_resample(
        wav, ratio.denominator, ratio.numerator, rolloff=_ROLLOFF, lowpass_filter_width=_ZERO_CROSSINGS
    )
    return resampled


def resampled_len(num_samples: int, from_rate: int, to_rate: int) -> int:
    """How many samples `resample` makes of so many. Raises: as `resample`."""
    return math.ceil(num_samples * _ratio(from_rate, to_rate))


def _ratio(from_rate: int, to_rate: int) -> Fraction:
    """Samples out for a sample in; of terms up to `_MAX_TERM`. Raises: InvalidRequestError: an impossible rate."""
    check_sample_rate(from_rate)
    check_sample_rate(to_rate)
    ratio = Fraction(to_rate, from_rate)
    if max(ratio.numerator, ratio.denominator) <= _MAX_TERM:
        return ratio
    small = Fraction(min(ratio, 1 / ratio)).limit_denominator(_MAX_TERM)
    return small if ratio < 1 else 1 / small


class StreamResampler:
    """`resample` for a recording that comes in parts: its results, joined, are those for the whole, to float rounding.

    At a ratio of q/p each step of p samples makes q, from those p and `_reach` more on either side. So what is kept are
    the steps before the next, as far as it reaches back, and the samples whose successors have not come.

    Args:
        from_rate, to_rate: in Hz. Raises: InvalidRequestError: an impossible one.
    """

    def __init__(self, from_rate: int, to_rate: int) -> None:
        self._rates = from_rate, to_rate
        ratio = _ratio(from_rate, to_rate)
        self._in, self._out = ratio.denominator, ratio.numerator
        band = _ROLLOFF * min(self._in, self._out)
        self._reach = 0 if ratio == 1 else math.ceil(_ZERO_CROSSINGS * self._in / band)
        self._kept: Tensor | None = None
        """`[..., N]`: from a whole step of the recording on."""
        self._num_done = 0
        """Steps at the beginning of `_kept` that have been given out."""

    def resample(self, samples: Tensor) -> Tensor:
        """The next `[..., N]` float32, which are kept, not copied; returns `[..., M]`, what can be told already."""
        known = samples if self._kept is None else torch.cat([self._kept, samples], dim=-1)
        num_ready = max(self._num_done, (known.shape[-1] - self._reach) // self._in)
        ready = self._part(known, self._num_done, num_ready)
        num_forgotten = max(0, num_ready - math.ceil(self._reach / self._in))
        self._kept, self._num_done = known[..., num_forgotten * self._in :], num_ready - num_forgotten
        return ready

    def finish(self) -> Tensor:
        """The rest, of at least one part that was taken in."""
        assert self._kept is not None
        return self._part(self._kept, self._num_done, None)

    def _part(self, known: Tensor, first_step: int, end_step: int | None) -> Tensor:
        """Some of its steps; the others are made and thrown away."""
        if first_step == end_step:
            return known[..., :0]
        end = None if end_step is None else end_step * self._out
        return resample(known, *self._rates)[..., first_step * self._out : end]


def validate_waveform(wav: Any, param: str = "wav", *, name: str = "a waveform") -> Tensor:
    """Check audio that a caller passes in.

    Args:
        wav: `[N]` or `[C, N]` tensor: floats, or 16- or 32-bit PCM.
        param, name: what the error calls it.
    Returns:
        `[C, N]` float32; the input's memory where possible.
    Raises:
        InvalidRequestError: not a tensor, of another shape, empty, longer than 30 minutes at 768 kHz, NaN or infinite.
    """
    if not isinstance(wav, Tensor):
        raise InvalidRequestError("a tensor [C, N]", f"{name} of type {type(wav).__name__}", param=param)
    shape = list(wav.shape)
    samples: Tensor = wav[None] if wav.ndim == 1 else wav
    if samples.ndim != 2 or not 1 <= samples.shape[0] <= MAX_CHANNELS:
        hint = "transpose it" if samples.ndim == 2 and 1 <= samples.shape[1] <= MAX_CHANNELS else ""
        raise InvalidRequestError(f"shape [N] or [C, N] with C ≤ {MAX_CHANNELS}", f"{shape}", hint, param=param)
    if samples.shape[1] == 0:
        raise InvalidRequestError("at least one sample", f"{name} without any", param=param)
    if samples.dtype in (torch.int16, torch.int32):
        samples = samples.float() / (-torch.iinfo(samples.dtype).min)
    if not samples.is_floating_point():
        raise InvalidRequestError("float samples, or 16- or 32-bit PCM", str(samples.dtype), param=param)
    samples = samples.float()
    # In parts: the check of a whole recording would take as much memory again as the recording.
    if not all(bool(part.isfinite().all()) for part in torch.split(samples, _CHECKED_SAMPLES, dim=-1)):
        raise InvalidRequestError("finite samples", f"{name} with NaN or infinite ones", param=param)
    return samples


def to_mono(wav: Tensor) -> Tensor:
    """`[..., C, N]` → `[..., 1, N]`, the mean of the channels."""
    return wav.mean(dim=-2, keepdim=True)


def convert_channels(wav: Tensor, channels: int) -> Tensor:
    """`[..., C, N]` → `[..., channels, N]`: mixed to mono, repeated from mono, or the first ones.

    Raises:
        InvalidRequestError: fewer channels than asked for, and not mono.
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
    """`[..., C, N]` at `from_rate` Hz → `[..., to_channels, N']` at `to_rate` Hz. Raises: as `resample` and
    `convert_channels`."""
    return resample(convert_channels(wav, to_channels), from_rate, to_rate)
