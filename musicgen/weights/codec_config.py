"""The settings of an EnCodec, read from Hugging Face's configuration or from audiocraft's.

Only the kind of codec that MusicGen uses is accepted: mono, non-causal, weight-normalised, in one chunk. Anything else
is refused by name, because its tensors would load and then decode to noise. Knows no tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from musicgen.config import CodecConfig, PadMode
from musicgen.errors import WeightsError

_PAD_MODES: dict[str, PadMode] = {
    "constant": "constant",
    "zero": "constant",
    "reflect": "reflect",
    "replicate": "replicate",
}
_INTERPOLATION = re.compile(r"^\$\{([\w.]+)\}$")


def codec_config_from_hf(settings: Mapping[str, Any]) -> CodecConfig:
    """The codec of an `EncodecConfig` dictionary (`audio_encoder` in a MusicGen `config.json`).

    Raises:
        WeightsError: not a valid configuration, or a codec of a kind that MusicGen does not use.
    """
    from transformers import EncodecConfig

    try:
        hf = EncodecConfig(**settings)
        num_codebooks = hf.num_quantizers
    except Exception as error:  # its validation raises types of its own
        raise WeightsError(f"codec configuration: expected that of an EnCodec, got: {error}") from error
    _require("use_causal_conv", hf.use_causal_conv, False)
    _require("norm_type", hf.norm_type, "weight_norm")
    _require("normalize", hf.normalize, False)
    _require("chunk_length_s", hf.chunk_length_s, None)
    _require("audio_channels", hf.audio_channels, 1)
    return CodecConfig(
        sample_rate=hf.sampling_rate, num_codebooks=num_codebooks, codebook_size=hf.codebook_size,
        codebook_dim=hf.codebook_dim, hidden_size=hf.hidden_size, num_filters=hf.num_filters,
        upsampling_ratios=tuple(hf.upsampling_ratios), num_residual_layers=hf.num_residual_layers,
        num_lstm_layers=hf.num_lstm_layers, kernel_size=hf.kernel_size, last_kernel_size=hf.last_kernel_size,
        residual_kernel_size=hf.residual_kernel_size, dilation_growth_rate=hf.dilation_growth_rate,
        compress=hf.compress, conv_shortcut=hf.use_conv_shortcut, pad_mode=_pad_mode(hf.pad_mode),
    )  # fmt: skip


def codec_config_from_audiocraft(xp_cfg: str) -> CodecConfig:
    """The codec of the YAML text under `xp.cfg` in a `compression_state_dict.bin`.

    Raises:
        WeightsError: unreadable, a setting missing, or a codec of a kind that MusicGen does not use.
    """
    try:
        tree = yaml.safe_load(xp_cfg)
    except yaml.YAMLError as error:
        raise WeightsError(f"xp.cfg of the codec: expected YAML, got: {error}") from error

    def get(path: str) -> Any:
        return _lookup(tree, path)

    for path, wanted in (("compression_model", "encodec"), ("encodec.autoencoder", "seanet"),
                         ("encodec.quantizer", "rvq"), ("encodec.renormalize", False), ("seanet.causal", False),
                         ("seanet.norm", "weight_norm"), ("seanet.activation", "ELU"), ("seanet.channels", 1),
                         ("seanet.disable_norm_outer_blocks", 0)):  # fmt: skip
        _require(path, get(path), wanted)
    _require("seanet.activation_params.alpha", float(get("seanet.activation_params.alpha")), 1.0)
    for side in ("encoder", "decoder"):
        special = {k: v for k, v in (get(f"seanet.{side}") or {}).items() if v is not None and k != "trim_right_ratio"}
        _require(f"seanet.{side}", special, {})
    return CodecConfig(
        sample_rate=int(get("encodec.sample_rate")), num_codebooks=int(get("rvq.n_q")),
        codebook_size=int(get("rvq.bins")), codebook_dim=int(get("seanet.dimension")),
        hidden_size=int(get("seanet.dimension")), num_filters=int(get("seanet.n_filters")),
        upsampling_ratios=tuple(int(ratio) for ratio in get("seanet.ratios")),
        num_residual_layers=int(get("seanet.n_residual_layers")), num_lstm_layers=int(get("seanet.lstm")),
        kernel_size=int(get("seanet.kernel_size")), last_kernel_size=int(get("seanet.last_kernel_size")),
        residual_kernel_size=int(get("seanet.residual_kernel_size")),
        dilation_growth_rate=int(get("seanet.dilation_base")), compress=int(get("seanet.compress")),
        conv_shortcut=not get("seanet.true_skip"), pad_mode=_pad_mode(get("seanet.pad_mode")),
    )  # fmt: skip


def _lookup(tree: Any, path: str) -> Any:
    """The value at a dotted path of a configuration tree, following references of the form `${other.path}`."""
    for _ in range(8):
        value = tree
        for key in path.split("."):
            if not isinstance(value, dict) or key not in value:
                raise WeightsError(f"xp.cfg of the codec: expected a setting {path}, got none; is it an EnCodec's?")
            value = value[key]
        reference = _INTERPOLATION.match(value) if isinstance(value, str) else None
        if reference is None:
            return value
        path = reference.group(1)
    raise WeightsError(f"xp.cfg of the codec: expected a value, got references in a circle at {path}")


def _require(name: str, got: Any, expected: Any) -> None:
    if got != expected:
        raise WeightsError(f"codec: expected {name} = {expected!r}, got {got!r}; MusicGen has no such codec")


def _pad_mode(name: str) -> PadMode:
    if name not in _PAD_MODES:
        raise WeightsError(f"codec: expected pad_mode one of {', '.join(_PAD_MODES)}, got {name!r}")
    return _PAD_MODES[name]
