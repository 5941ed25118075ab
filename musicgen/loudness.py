"""How loud a file becomes: the normalisation strategies of audiocraft's `audio_write`.

Knows nothing of files. Never clips silently: samples that had to be cut are reported to the log.
"""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor

from musicgen.errors import InvalidRequestError

Strategy = Literal["peak", "clip", "rms", "loudness"]
STRATEGIES: tuple[Strategy, ...] = ("peak", "clip", "rms", "loudness")
ENERGY_FLOOR = 2e-3
"""RMS below which audio counts as silence and is not made louder (audiocraft's figure)."""
_METER_BLOCK_S = 0.4
"""A BS.1770 meter measures blocks of this length; shorter audio has no loudness."""

logger = logging.getLogger(__name__)


def normalize_audio(
    wav: Tensor,
    normalize: bool = True,
    strategy: Strategy = "peak",
    peak_clip_headroom_db: float = 1,
    rms_headroom_db: float = 18,
    loudness_headroom_db: float = 14,
    loudness_compressor: bool = False,
    log_clipping: bool = True,
    sample_rate: int | None = None,
    stem_name: str | None = None,
) -> Tensor:
    """Bring `[C, N]` float samples to a level. Names, defaults and meaning are audiocraft's.

    Args:
        normalize: False: `peak` and `rms` only ever make quieter.
        strategy: `peak` scales the largest sample to the headroom; `clip` cuts there; `rms` scales the root mean
            square of the channels' mean; `loudness` scales to −`loudness_headroom_db` LUFS by ITU-R BS.1770-4.
        loudness_compressor: bend what is too loud (tanh) instead of cutting it.
        log_clipping: report cut samples of `rms` and `loudness`, and what cannot be measured, to the log.
        sample_rate: in Hz; needed for `loudness`.
        stem_name: names the audio in the log.
    Returns:
        A new tensor within [−1, 1], except that `peak` with a negative headroom goes beyond. Silence stays silence.
    Raises:
        InvalidRequestError: unknown strategy, or `loudness` without a sample rate.
    """
    check_strategy(strategy)
    if wav.numel() == 0:
        return wav
    peak = 10 ** (-peak_clip_headroom_db / 20)
    if strategy == "peak":
        return _scale(wav, peak, float(wav.abs().max()), normalize)
    if strategy == "clip":
        return wav.clamp(-peak, peak)
    if strategy == "rms":
        rms = float(wav.mean(dim=0).square().mean().sqrt())
        wav = _scale(wav, 10 ** (-rms_headroom_db / 20), rms, normalize)
    else:
        if sample_rate is None:
            raise InvalidRequestError("a sample rate for strategy 'loudness'", "none", param="sample_rate")
        gain = _loudness_gain(wav, sample_rate, -loudness_headroom_db, log_clipping, stem_name)
        wav = wav if gain is None else wav * gain
        if loudness_compressor and gain is not None:
            wav = torch.tanh(wav)
    return _clip(wav, log_clipping, stem_name)


def check_strategy(strategy: str) -> None:
    """Raises: InvalidRequestError: not one of `STRATEGIES`."""
    if strategy not in STRATEGIES:
        raise InvalidRequestError("one of " + ", ".join(STRATEGIES), repr(strategy), param="strategy")


def measure_loudness(wav: Tensor, sample_rate: int) -> float | None:
    """Integrated loudness of `[C, N]` in LUFS (ITU-R BS.1770-4), or None where it has none: too short, or all of it
    below the meter's gate."""
    from pyloudnorm import Meter

    if wav.shape[-1] < int(_METER_BLOCK_S * sample_rate) + 1:
        return None
    # pyloudnorm's "DeMan" filters meet the standard's coefficients; its default ones are up to 0.05 LU off.
    meter = Meter(sample_rate, filter_class="DeMan", block_size=_METER_BLOCK_S)
    loudness = float(meter.integrated_loudness(wav.detach().cpu().double().numpy().T))
    return loudness if loudness > -70.0 else None


def _loudness_gain(wav: Tensor, sample_rate: int, target_lufs: float, log: bool, stem_name: str | None) -> float | None:
    """The factor that brings `wav` to the target, or None if it is to stay as it is."""
    if float(wav.square().mean().sqrt()) < ENERGY_FLOOR:
        return None
    loudness = measure_loudness(wav, sample_rate)
    if loudness is None:
        if log:
            logger.warning("%s: too short or too quiet for a loudness meter; its level is kept", stem_name or "audio")
        return None
    return float(10.0 ** ((target_lufs - loudness) / 20.0))


def _scale(wav: Tensor, target: float, level: float, normalize: bool) -> Tensor:
    """Scale from `level` to `target`; with `normalize` false only downwards. Silence is left alone."""
    if level <= 0.0 or (not normalize and target >= level):
        return wav
    return wav * (target / level)


def _clip(wav: Tensor, log: bool, stem_name: str | None) -> Tensor:
    peak = float(wav.abs().max())
    if peak <= 1.0:
        return wav
    if log:
        share = float((wav.abs() > 1).float().mean())
        logger.warning(
            "%s: %.4f %% of the samples clipped, the largest at %.2f; a lower loudness avoids it",
            stem_name or "audio", 100 * share, peak,
        )  # fmt: skip
    return wav.clamp(-1.0, 1.0)
