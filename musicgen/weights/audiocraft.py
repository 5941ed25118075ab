"""Checkpoints in audiocraft layout: `state_dict.bin` (language model) and `compression_state_dict.bin` (codec).

The files do not contain the text encoder, which is loaded from the hub by the name in the configuration.
Source of the names and options: audiocraft `models/{builders,loaders,lm}.py` and `config/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from musicgen.config import ChromaConfig, CodecConfig, DecoderConfig, ModelConfig
from musicgen.errors import WeightsError
from musicgen.models.encodec import EncodecDecoder
from musicgen.models.encodec_encoder import EncodecEncoder
from musicgen.models.language_model import LanguageModel
from musicgen.models.t5 import TextEncoder
from musicgen.weights import codec, hub
from musicgen.weights.checkpoint import (
    NameMap,
    Part,
    assemble,
    from_dict,
    from_safetensors,
    load_bin,
    read_json,
    unfilled,
)
from musicgen.weights.checks import check_parts_fit
from musicgen.weights.codec_config import codec_config_from_audiocraft, codec_config_from_hf
from musicgen.weights.settings import XpConfig

LM_FILE, CODEC_FILE = "state_dict.bin", "compression_state_dict.bin"
TEXT, MELODY = "condition_provider.conditioners.description", "condition_provider.conditioners.self_wav"
REQUIRED_DECODER = {
    "norm_first": True,
    "bias_ff": False,
    "bias_attn": False,
    "bias_proj": False,
    "activation": "gelu",
    "positional_embedding": "sin",
    "qk_layer_norm": False,
    "qk_layer_norm_cross": False,
    "layer_scale": None,
    "kv_repeat": 1,
    "past_context": None,
    "norm": "layer_norm",
    "positional_scale": 1.0,
    "max_period": 10000,
}
"""Transformer options, checked if present: the released files come from several versions of audiocraft."""
REQUIRED_CHROMA = {"nfft": None, "winlen": None, "winhop": None}


class AudiocraftCheckpoint:
    """The checkpoint in `folder`. The configuration is read eagerly, each component on demand.

    Tensors stay on disk until needed, except in the pre-1.6 torch format, which can only be read as a whole.

    Raises:
        WeightsError: missing or unsafe file, or unsupported option; from the methods: tensors that do not fit.
    """

    def __init__(self, folder: Path, name: str, license: str) -> None:
        text, self._state = _read(folder / LM_FILE)
        self._origin = str(folder / LM_FILE)
        xp = XpConfig(text, self._origin)
        self._text_encoder_name = _text_encoder_name(xp)
        self._codec = _codec_file(folder / CODEC_FILE)
        self.config = ModelConfig(
            name=name,
            decoder=_decoder_config(xp),
            codec=_codec_config(xp, self._codec.config),
            text_dim=_text_dim(self._state, folder),
            chroma=_chroma_config(xp),
            audio_channels=_audio_channels(xp),
            license=license,
            max_duration_s=xp.get("dataset.segment_duration", float),
        )
        _check_pattern(xp, self.config, self._origin)
        check_parts_fit(self.config, self._origin, sample_rate=xp.get("sample_rate", int, self.config.sample_rate))

    def language_model(self) -> tuple[LanguageModel, None]:
        """The language model, in fp32 on the CPU; it is never packed."""
        with unfilled():
            lm = LanguageModel(self.config)
        source = from_dict(self._state, self._origin)
        computed = {n for n in source if n.startswith(f"{MELODY}.chroma.")}  # the spectrogram's window
        assemble(lm, source, _name_map(self.config), ignored=computed)
        return lm.eval(), None

    def text_encoder(self) -> TextEncoder:
        """T5, in fp32 on the CPU."""
        encoder = TextEncoder.from_pretrained(self._text_encoder_name)
        if encoder.dim != self.config.text_dim:
            raise WeightsError(
                f"{self._origin}: expected a text encoder of width {self.config.text_dim}, got "
                f"{self._text_encoder_name!r} of width {encoder.dim}"
            )
        return encoder

    def codec(self) -> tuple[EncodecDecoder, EncodecEncoder]:
        """The codec's decoder and encoder, in fp32 on the CPU."""
        return codec.build_codec(self.config.codec, self._codec.tensors())


@dataclass(frozen=True, slots=True)
class _CodecFile:
    config: CodecConfig
    tensors: Callable[[], Mapping[str, Tensor]]
    """Reads and validates them."""


def _read(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Configuration (YAML) and tensors of one of the two files."""
    content = load_bin(path)
    state, text = content.get("best_state"), content.get("xp.cfg")
    if not isinstance(state, Mapping) or not isinstance(text, str):
        raise WeightsError(f"{path}: expected the entries best_state and xp.cfg, got {sorted(map(str, content))}")
    return text, dict(state)


def _codec_file(path: Path) -> _CodecFile:
    """The codec in the file itself, or in the checkpoint it points to."""
    pointer = load_bin(path).get("pretrained")
    if pointer is None:
        text, state = _read(path)
        config = codec_config_from_audiocraft(text, str(path))
        return _CodecFile(config, partial(codec.codec_tensors_from_audiocraft, state, config))
    if not isinstance(pointer, str):
        raise WeightsError(f"{path}: expected the name of a codec, got {pointer!r}")
    folder = hub.resolve(pointer)
    config = codec_config_from_hf(read_json(folder / "config.json"))
    return _CodecFile(config, partial(codec.codec_tensors_from_hf, from_safetensors(folder), config))


def _codec_config(xp: XpConfig, whole: CodecConfig) -> CodecConfig:
    """The codec as far as the language model uses it: `compression_model_n_q` limits its codebooks, per channel."""
    num_codebooks = xp.get("compression_model_n_q", int, whole.num_codebooks)
    if num_codebooks > whole.num_codebooks:
        raise WeightsError(
            f"{xp.origin}: expected compression_model_n_q of at most {whole.num_codebooks}, which the codec of "
            f"{CODEC_FILE} has, got {num_codebooks}; check that both files belong to the same model"
        )
    return replace(whole, num_codebooks=num_codebooks)


def _text_dim(state: Mapping[str, Tensor], folder: Path) -> int:
    """Width of the text encoder's states, which is not in the configuration."""
    name = f"{TEXT}.output_proj.weight"
    if name not in state or state[name].ndim != 2:
        raise WeightsError(f"{folder / LM_FILE}: expected a matrix {name}, got none; download it again")
    return state[name].shape[1]


def _text_encoder_name(xp: XpConfig) -> str:
    xp.require("conditioners.description.model", "t5")
    xp.require("conditioners.description.t5.normalize_text", False, False)
    xp.require("conditioners.description.t5.finetune", False, False)
    return xp.get("conditioners.description.t5.name", str)


def _decoder_config(xp: XpConfig) -> DecoderConfig:
    xp.require("lm_model", "transformer_lm", "transformer_lm")
    for option, expected in REQUIRED_DECODER.items():
        xp.require(f"transformer_lm.{option}", expected, expected)
    dim = xp.get("transformer_lm.dim", int)
    return DecoderConfig(
        num_layers=xp.get("transformer_lm.num_layers", int),
        dim=dim,
        num_heads=xp.get("transformer_lm.num_heads", int),
        ffn_dim=int(xp.get("transformer_lm.hidden_scale", float) * dim),
        num_codebooks=xp.get("transformer_lm.n_q", int),
        codebook_size=xp.get("transformer_lm.card", int),
        cross_attention=bool(xp.get("fuser.cross", list)),
    )


def _chroma_config(xp: XpConfig) -> ChromaConfig | None:
    """Melody feature settings; the file lacks their length, which is derived from the training segment."""
    xp.require("fuser.cross_attention_pos_emb", False, False)
    if "self_wav" not in xp.get("conditioners", dict):
        xp.require("fuser.cross", ["description"])
        xp.require("fuser.prepend", [], [])
        return None
    xp.require("fuser.cross", [])
    xp.require("fuser.prepend", ["self_wav", "description"])
    xp.require("conditioners.self_wav.model", "chroma_stem")
    options = "conditioners.self_wav.chroma_stem"
    xp.require(f"{options}.argmax", True, False)
    for option, expected in REQUIRED_CHROMA.items():
        xp.require(f"{options}.{option}", expected, expected)
    sample_rate, n_fft = xp.get(f"{options}.sample_rate", int), 2 ** xp.get(f"{options}.radix2_exp", int)
    hop_length = n_fft // 4
    return ChromaConfig(
        sample_rate=sample_rate,
        num_chroma=xp.get(f"{options}.n_chroma", int),
        n_fft=n_fft,
        hop_length=hop_length,
        num_frames=int(sample_rate * xp.get("dataset.segment_duration", float)) // hop_length + 1,
    )


def _audio_channels(xp: XpConfig) -> int:
    """Stereo models interleave the codes of two mono codec passes."""
    channels = 2 if xp.raw("interleave_stereo_codebooks.use", False) else 1
    if channels == 2:
        xp.require("interleave_stereo_codebooks.per_timestep", False, False)
    xp.require("channels", channels, channels)
    return channels


def _check_pattern(xp: XpConfig, config: ModelConfig, origin: str) -> None:
    """Require the delay pattern of `config`; files of the first release may name it `q_modeling`."""
    num_codebooks, delays = config.decoder.num_codebooks, "codebooks_pattern.delay.delays"
    in_order = list(range(num_codebooks))
    if xp.raw("codebooks_pattern.modeling", None) is None:
        xp.require("transformer_lm.q_modeling", "delay")
        got = in_order
    else:
        xp.require("codebooks_pattern.modeling", "delay")
        for option in ("flatten_first", "empty_initial"):
            xp.require(f"codebooks_pattern.delay.{option}", 0, 0)
        got = xp.get(delays, list, in_order)
    if got != list(config.delay_pattern.delays):
        raise WeightsError(f"{origin}: expected {delays} = {list(config.delay_pattern.delays)}, got {got}")


def _name_map(config: ModelConfig) -> NameMap:
    num_codebooks = config.decoder.num_codebooks
    names: dict[str, tuple[Part, ...]] = {
        "decoder.embed.weight": tuple(Part(f"emb.{k}.weight") for k in range(num_codebooks)),
        "decoder.heads.weight": tuple(Part(f"linears.{k}.weight") for k in range(num_codebooks)),
    }
    for kind in ("weight", "bias"):
        names[f"decoder.out_norm.{kind}"] = (Part(f"out_norm.{kind}"),)
        names[f"text_proj.{kind}"] = (Part(f"{TEXT}.output_proj.{kind}"),)
        if config.chroma is not None:
            names[f"chroma_proj.{kind}"] = (Part(f"{MELODY}.output_proj.{kind}"),)
    for i in range(config.decoder.num_layers):
        layer_names = _layer_names(f"transformer.layers.{i}", config.decoder.cross_attention)
        names.update({f"decoder.layers.{i}.{ours}": (part,) for ours, part in layer_names.items()})
    return names


def _layer_names(theirs: str, cross_attention: bool) -> dict[str, Part]:
    names = {
        "self_attn.qkv.weight": Part(f"{theirs}.self_attn.in_proj_weight"),
        "self_attn.out.weight": Part(f"{theirs}.self_attn.out_proj.weight"),
        "fc1.weight": Part(f"{theirs}.linear1.weight"),
        "fc2.weight": Part(f"{theirs}.linear2.weight"),
    }
    norms = ["norm1", "norm2"]
    if cross_attention:
        norms.append("norm_cross")
        fused = f"{theirs}.cross_attention.in_proj_weight"
        names["cross_attn.q.weight"] = Part(fused, thirds=(0, 1))
        names["cross_attn.kv.weight"] = Part(fused, thirds=(1, 3))
        names["cross_attn.out.weight"] = Part(f"{theirs}.cross_attention.out_proj.weight")
    names.update({f"{n}.{kind}": Part(f"{theirs}.{n}.{kind}") for n in norms for kind in ("weight", "bias")})
    return names
