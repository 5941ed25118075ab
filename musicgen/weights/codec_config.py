"""EnCodec configuration, read from Hugging Face or audiocraft settings.

Only the variant that MusicGen uses is accepted: mono, non-causal, weight-normalised, unchunked. Others are rejected
explicitly, because their tensors would load but decode to noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from musicgen.config import CodecConfig, PadMode
from musicgen.errors import WeightsError
from musicgen.weights.settings import XpConfig, complete

_PAD_MODES: dict[str, PadMode] = {
    "constant": "constant",
    "zero": "constant",
    "reflect": "reflect",
    "replicate": "replicate",
}
HF_DEFAULTS: dict[str, Any] = {
    "sampling_rate": 24000, "target_bandwidths": [1.5, 3.0, 6.0, 12.0, 24.0], "audio_channels": 1, "normalize": False,
    "chunk_length_s": None, "hidden_size": 128, "num_filters": 32, "num_residual_layers": 1,
    "upsampling_ratios": [8, 5, 4, 2], "norm_type": "weight_norm", "kernel_size": 7, "last_kernel_size": 7,
    "residual_kernel_size": 3, "dilation_growth_rate": 2, "use_causal_conv": True, "pad_mode": "reflect",
    "compress": 2, "num_lstm_layers": 2, "codebook_size": 1024, "codebook_dim": 128, "use_conv_shortcut": True,
}  # fmt: skip
"""Defaults of missing settings, as in transformers' `EncodecConfig`; `codebook_dim` defaults to `hidden_size`."""
_HF_REQUIRED = {
    "use_causal_conv": False, "norm_type": "weight_norm", "normalize": False, "chunk_length_s": None,
    "audio_channels": 1,
}  # fmt: skip


def codec_config_from_hf(given: Mapping[str, Any]) -> CodecConfig:
    """The codec of an `EncodecConfig` dictionary (`audio_encoder` in a MusicGen `config.json`).

    Raises:
        WeightsError: invalid configuration, or a codec variant that MusicGen does not use.
    """
    if given.get("codebook_dim") is None:
        given = {**given, "codebook_dim": given.get("hidden_size", HF_DEFAULTS["hidden_size"])}
    settings = complete(given, HF_DEFAULTS, "codec configuration")
    for name, wanted in _HF_REQUIRED.items():
        _require(name, settings[name], wanted)
    ratios = _positive_numbers("upsampling_ratios", settings["upsampling_ratios"], (int,))
    config = CodecConfig(
        sample_rate=settings["sampling_rate"], num_codebooks=1, codebook_size=settings["codebook_size"],
        codebook_dim=settings["codebook_dim"], hidden_size=settings["hidden_size"],
        num_filters=settings["num_filters"], upsampling_ratios=tuple(int(ratio) for ratio in ratios),
        num_residual_layers=settings["num_residual_layers"], num_lstm_layers=settings["num_lstm_layers"],
        kernel_size=settings["kernel_size"], last_kernel_size=settings["last_kernel_size"],
        residual_kernel_size=settings["residual_kernel_size"],
        dilation_growth_rate=settings["dilation_growth_rate"], compress=settings["compress"],
        conv_shortcut=settings["use_conv_shortcut"], pad_mode=_pad_mode(settings["pad_mode"]),
    )  # fmt: skip
    bandwidths_kbps = _positive_numbers("target_bandwidths", settings["target_bandwidths"], (int, float))
    return replace(config, num_codebooks=_num_codebooks(config, bandwidths_kbps[-1]))


def _num_codebooks(config: CodecConfig, bandwidth_kbps: float) -> int:
    """The number of whole codebooks for a bandwidth. Source: transformers' `EncodecConfig.num_quantizers`."""
    bits_per_frame = (config.codebook_size - 1).bit_length()
    num = int(1000 * bandwidth_kbps // (math.ceil(config.frame_rate_hz) * bits_per_frame)) if bits_per_frame else 0
    if num < 1:
        got = f"{bandwidth_kbps} kbit/s for codebooks of {config.codebook_size}"
        raise WeightsError(f"codec configuration: expected bandwidth for at least one codebook, got {got}")
    return num


def codec_config_from_audiocraft(xp_cfg: str, origin: str = "codec") -> CodecConfig:
    """The codec of the YAML text under `xp.cfg` in a `compression_state_dict.bin`.

    Args:
        origin: source of the text, for error messages.
    Raises:
        WeightsError: unreadable, missing setting, or a codec variant that MusicGen does not use.
    """
    xp = XpConfig(xp_cfg, origin)
    for path, wanted in (("compression_model", "encodec"), ("encodec.autoencoder", "seanet"),
                         ("encodec.quantizer", "rvq"), ("seanet.causal", False), ("seanet.norm", "weight_norm"),
                         ("seanet.activation", "ELU"), ("seanet.activation_params.alpha", 1.0),
                         ("seanet.channels", 1)):  # fmt: skip
        xp.require(path, wanted)
    # audiocraft's defaults for settings missing from files of other versions.
    xp.require("encodec.renormalize", False, False)
    xp.require("seanet.disable_norm_outer_blocks", 0, 0)
    for side in ("encoder", "decoder"):
        for name in xp.get(f"seanet.{side}", dict, {}).keys() - {"trim_right_ratio"}:
            xp.require(f"seanet.{side}.{name}", None)
    ratios = _positive_numbers("seanet.ratios", xp.get("seanet.ratios", list), (int,))
    dimension = xp.get("seanet.dimension", int)
    return CodecConfig(
        sample_rate=xp.get("encodec.sample_rate", int), num_codebooks=xp.get("rvq.n_q", int),
        codebook_size=xp.get("rvq.bins", int), codebook_dim=dimension, hidden_size=dimension,
        num_filters=xp.get("seanet.n_filters", int), upsampling_ratios=tuple(int(ratio) for ratio in ratios),
        num_residual_layers=xp.get("seanet.n_residual_layers", int), num_lstm_layers=xp.get("seanet.lstm", int),
        kernel_size=xp.get("seanet.kernel_size", int), last_kernel_size=xp.get("seanet.last_kernel_size", int),
        residual_kernel_size=xp.get("seanet.residual_kernel_size", int),
        dilation_growth_rate=xp.get("seanet.dilation_base", int), compress=xp.get("seanet.compress", int),
        conv_shortcut=not xp.get("seanet.true_skip", bool), pad_mode=_pad_mode(xp.get("seanet.pad_mode", str)),
    )  # fmt: skip


def _require(name: str, got: Any, expected: Any) -> None:
    if got != expected:
        raise WeightsError(f"codec: expected {name} = {expected!r}, got {got!r}; MusicGen does not use such a codec")


def _positive_numbers(name: str, values: Any, kinds: tuple[type, ...]) -> list[float]:
    if not values or not isinstance(values, list) or not all(type(v) in kinds and v > 0 for v in values):
        raise WeightsError(f"codec configuration: expected {name} as a list of numbers > 0, got {values!r}")
    return values


def _pad_mode(name: str) -> PadMode:
    if name not in _PAD_MODES:
        raise WeightsError(f"codec: expected pad_mode one of {', '.join(_PAD_MODES)}, got {name!r}")
    return _PAD_MODES[name]
