"""Level normalisation: the strategies of audiocraft's `audio_write`.

Independent of files. Clipping is never silent: clipped samples are logged.
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
"""RMS below which audio counts as silence and is not amplified (audiocraft's value)."""
_METER_BLOCK_S = 0.4
"""Block length of a BS.1770 meter; shorter audio has no loudness."""

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
    """Normalise the level of `[C, N]` float samples. Names, defaults and semantics follow audiocraft.

    Args:
        normalize: False: `peak` and `rms` only attenuate.
        strategy: `peak` scales the largest sample to the headroom; `clip` clips there; `rms` scales the root mean
            square of the channels' mean; `loudness` scales to −`loudness_headroom_db` LUFS by ITU-R BS.1770-4.
        loudness_compressor: soft-clip (tanh) instead of clipping.
        log_clipping: log samples clipped by `rms` and `loudness`, and audio whose loudness cannot be measured.
        sample_rate: in Hz; needed for `loudness`.
        stem_name: names the audio in the log.
    Returns:
        A new tensor within [−1, 1], except for `peak` with a negative headroom. Silence stays silent.
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
    """Integrated loudness of `[C, N]` in LUFS (ITU-R BS.1770-4), or None if the audio is too short or entirely below
    the meter's gate."""
    from pyloudnorm import Meter

    if wav.shape[-1] < int(_METER_BLOCK_S * sample_rate) + 1:
        return None
    # pyloudnorm's "DeMan" filters match the standard's coefficients; its default filters are off by up to 0.05 LU.
    meter = Meter(sample_rate, filter_class="DeMan", block_size=_METER_BLOCK_S)
    loudness = float(meter.integrated_loudness(wav.detach().cpu().double().numpy().T))
    return loudness if loudness > -70.0 else None


def _loudness_gain(wav: Tensor, sample_rate: int, target_lufs: float, log: bool, stem_name: str | None) -> float | None:
    """The gain that brings `wav` to the target, or None to keep its level."""
    if float(wav.square().mean().sqrt()) < ENERGY_FLOOR:
        return None
    loudness = measure_loudness(wav, sample_rate)
    if loudness is None:
        if log:
            logger.warning("%s: too short or too quiet to measure loudness; keeping its level", stem_name or "audio")
        return None
    return float(10.0 ** ((target_lufs - loudness) / 20.0))


def _scale(wav: Tensor, target: float, level: float, normalize: bool) -> Tensor:
    """Scale from `level` to `target`; only downwards if `normalize` is false. Silence is not scaled."""
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
            "%s: %.4f %% of samples clipped, peak %.2f; to avoid this, use the loudness compressor or a lower target",
            stem_name or "audio", 100 * share, peak,
        )  # fmt: skip
    return wav.clamp(-1.0, 1.0)
