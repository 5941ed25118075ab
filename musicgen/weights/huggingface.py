"""Checkpoints in Hugging Face layout: `config.json`, `model.safetensors` or its shards, tokenizer.

Source of the names: transformers' `MusicgenForConditionalGeneration` and `MusicgenMelodyForConditionalGeneration`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from musicgen.config import ChromaConfig, DecoderConfig, ModelConfig
from musicgen.errors import WeightsError
from musicgen.models.encodec import EncodecDecoder
from musicgen.models.encodec_encoder import EncodecEncoder
from musicgen.models.language_model import LanguageModel
from musicgen.models.t5 import TextEncoder, load_tokenizer
from musicgen.weights import codec
from musicgen.weights.checkpoint import NameMap, Part, assemble, from_safetensors, read_json, unfilled
from musicgen.weights.checks import check_parts_fit
from musicgen.weights.codec_config import codec_config_from_hf
from musicgen.weights.settings import complete

MODEL_TYPES = ("musicgen", "musicgen_melody")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
"""A single file, or the index of its shards. Facebook's repositories contain both layouts; these take precedence."""
POSITION_TABLE = "decoder.model.decoder.embed_positions.weights"
"""A table stored in some files, but computed here."""
TEXT, CODEC = "text_encoder.", "audio_encoder."

# Missing settings default to those of transformers' configuration classes.
DECODER_DEFAULTS = {
    "num_hidden_layers": 24,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "ffn_dim": 4096,
    "num_codebooks": 4,
    "vocab_size": 2048,
    "audio_channels": 1,
    "activation_function": "gelu",
    "scale_embedding": False,
}
MELODY_DEFAULTS = {"num_chroma": 12, "chroma_length": 235}
TEXT_DEFAULTS = {"model_type": "t5", "d_model": 512}


class HuggingFaceCheckpoint:
    """The checkpoint in `folder`. The configuration is read eagerly, each component on demand.

    Raises:
        WeightsError: not a MusicGen checkpoint, or unsupported option; from the methods: tensors that do not fit.
    """

    def __init__(self, folder: Path, name: str, license: str) -> None:
        raw = read_json(folder / "config.json")
        if raw.get("model_type") not in MODEL_TYPES:
            raise WeightsError(
                f"{folder}: expected model_type {' or '.join(MODEL_TYPES)}, got {raw.get('model_type')!r}; "
                "this is not a MusicGen checkpoint"
            )
        self._folder = folder
        self._text_settings = _section(raw, "text_encoder", folder)
        self._tensors = from_safetensors(folder)
        self.config = _model_config(raw, folder, name, license)
        check_parts_fit(self.config, str(folder / "config.json"))

    def language_model(self) -> tuple[LanguageModel, None]:
        """The language model, in fp32 on the CPU; it is never packed."""
        source = self._tensors
        if self.config.chroma is None and any(name.startswith("audio_enc_to_dec_proj.") for name in source):
            raise WeightsError(
                f"{self._folder}: expected a text model's tensors, got a melody model's; download it again"
            )
        project_text = "enc_to_dec_proj.weight" in source
        with unfilled():
            model = LanguageModel(self.config, project_text=project_text)
        elsewhere = {name for name in source if name.startswith((TEXT, CODEC))}
        assemble(model, source, _name_map(self.config, project_text), ignored=elsewhere | {POSITION_TABLE})
        return model.eval(), None

    def text_encoder(self) -> TextEncoder:
        """T5, in fp32 on the CPU."""
        from transformers import T5Config, T5EncoderModel

        source = self._tensors.under(TEXT)
        with unfilled():
            model = T5EncoderModel(T5Config.from_dict(self._text_settings))
        shared, tied = "shared.weight", "encoder.embed_tokens.weight"
        names = {name: (Part(f"encoder.{name}"),) for name in model.encoder.state_dict()}
        names["embed_tokens.weight"] = (Part(shared if shared in source else tied),)
        # Some files contain the whole T5; its decoder is not used.
        unused = {n for n in source if n in (shared, tied) or n.startswith(("decoder.", "lm_head."))}
        assemble(model.encoder, source, names, ignored=unused)
        model.set_input_embeddings(model.encoder.embed_tokens)
        return TextEncoder(model, load_tokenizer(self._folder))

    def codec(self) -> tuple[EncodecDecoder, EncodecEncoder]:
        """The codec's decoder and encoder, in fp32 on the CPU."""
        tensors = codec.codec_tensors_from_hf(self._tensors.under(CODEC), self.config.codec)
        return codec.build_codec(self.config.codec, tensors)


def _section(raw: Mapping[str, Any], name: str, folder: Path) -> dict[str, Any]:
    section = raw.get(name)
    if not isinstance(section, dict):
        raise WeightsError(f"{folder / 'config.json'}: expected an object {name}, got {type(section).__name__}")
    return section


def _model_config(raw: Mapping[str, Any], folder: Path, name: str, license: str) -> ModelConfig:
    origin = str(folder / "config.json")
    decoder = complete(_section(raw, "decoder", folder), DECODER_DEFAULTS, f"{origin}: decoder")
    text = complete(_section(raw, "text_encoder", folder), TEXT_DEFAULTS, f"{origin}: text_encoder")
    required = (
        ("activation_function", decoder, "gelu"),
        ("scale_embedding", decoder, False),
        ("model_type", text, "t5"),
    )
    for option, settings, expected in required:
        if settings[option] != expected:
            raise WeightsError(f"{folder}: expected {option} {expected!r}, got {settings[option]!r}")
    is_melody = raw["model_type"] == "musicgen_melody"
    return ModelConfig(
        name=name,
        decoder=DecoderConfig(
            num_layers=decoder["num_hidden_layers"],
            dim=decoder["hidden_size"],
            num_heads=decoder["num_attention_heads"],
            ffn_dim=decoder["ffn_dim"],
            num_codebooks=decoder["num_codebooks"],
            codebook_size=decoder["vocab_size"],
            cross_attention=not is_melody,
        ),
        codec=codec_config_from_hf(_section(raw, "audio_encoder", folder)),
        text_dim=text["d_model"],
        chroma=_chroma_config(raw, folder) if is_melody else None,
        audio_channels=decoder["audio_channels"],
        license=license,
    )


def _chroma_config(raw: Mapping[str, Any], folder: Path) -> ChromaConfig:
    """Framing from `preprocessor_config.json` if present, otherwise the constants of the released models."""
    model = complete(raw, MELODY_DEFAULTS, str(folder / "config.json"))
    path = folder / "preprocessor_config.json"
    framing_defaults = {"sampling_rate": 32000, "n_fft": 16384, "hop_length": 4096}
    framing = complete(read_json(path) if path.is_file() else {}, framing_defaults, str(path))
    return ChromaConfig(
        sample_rate=framing["sampling_rate"],
        num_chroma=model["num_chroma"],
        n_fft=framing["n_fft"],
        hop_length=framing["hop_length"],
        num_frames=model["chroma_length"],
    )


def _name_map(config: ModelConfig, project_text: bool) -> NameMap:
    body, num_codebooks = "decoder.model.decoder", config.decoder.num_codebooks
    names: dict[str, tuple[str, ...]] = {
        "decoder.embed.weight": tuple(f"{body}.embed_tokens.{k}.weight" for k in range(num_codebooks)),
        "decoder.heads.weight": tuple(f"decoder.lm_heads.{k}.weight" for k in range(num_codebooks)),
        "decoder.out_norm.weight": (f"{body}.layer_norm.weight",),
        "decoder.out_norm.bias": (f"{body}.layer_norm.bias",),
    }
    for kind in ("weight", "bias"):
        if project_text:
            names[f"text_proj.{kind}"] = (f"enc_to_dec_proj.{kind}",)
        if config.chroma is not None:
            names[f"chroma_proj.{kind}"] = (f"audio_enc_to_dec_proj.{kind}",)
    for i in range(config.decoder.num_layers):
        names.update(_layer_names(f"decoder.layers.{i}", f"{body}.layers.{i}", config.decoder.cross_attention))
    return {ours: tuple(Part(name) for name in theirs) for ours, theirs in names.items()}


def _layer_names(ours: str, theirs: str, cross_attention: bool) -> dict[str, tuple[str, ...]]:
    names: dict[str, tuple[str, ...]] = {
        f"{ours}.self_attn.qkv.weight": tuple(f"{theirs}.self_attn.{p}_proj.weight" for p in "qkv"),
        f"{ours}.self_attn.out.weight": (f"{theirs}.self_attn.out_proj.weight",),
        f"{ours}.fc1.weight": (f"{theirs}.fc1.weight",),
        f"{ours}.fc2.weight": (f"{theirs}.fc2.weight",),
    }
    norms = {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"}
    if cross_attention:
        norms["norm_cross"] = "encoder_attn_layer_norm"
        names[f"{ours}.cross_attn.q.weight"] = (f"{theirs}.encoder_attn.q_proj.weight",)
        names[f"{ours}.cross_attn.kv.weight"] = tuple(f"{theirs}.encoder_attn.{p}_proj.weight" for p in "kv")
        names[f"{ours}.cross_attn.out.weight"] = (f"{theirs}.encoder_attn.out_proj.weight",)
    for our_norm, their_norm in norms.items():
        for kind in ("weight", "bias"):
            names[f"{ours}.{our_norm}.{kind}"] = (f"{theirs}.{their_norm}.{kind}",)
    return names
