"""Checkpoints in Hugging Face layout: `config.json`, `model.safetensors` or its shards, tokenizer.

Source of the names: transformers' `MusicgenForConditionalGeneration` and `MusicgenMelodyForConditionalGeneration`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, T5EncoderModel

from musicgen.config import ChromaConfig, CodecConfig, DecoderConfig, ModelConfig
from musicgen.errors import WeightsError
from musicgen.model import Model
from musicgen.models.chroma import ChromaExtractor
from musicgen.models.language_model import LanguageModel
from musicgen.models.t5 import TextEncoder, load_tokenizer
from musicgen.weights import codec
from musicgen.weights.checkpoint import NameMap, Part, TensorSource, assemble, from_safetensors, read_json
from musicgen.weights.codec_config import codec_config_from_hf

MODEL_TYPES = ("musicgen", "musicgen_melody")
POSITION_TABLE = "decoder.model.decoder.embed_positions.weights"
"""A table that some files hold and that is computed here."""


def load(folder: Path, name: str, license: str) -> Model:
    """Load the checkpoint in `folder`.

    Raises:
        WeightsError: not a MusicGen checkpoint, an unsupported option, or tensors that do not fit.
    """
    raw = read_json(folder / "config.json")
    if raw.get("model_type") not in MODEL_TYPES:
        raise WeightsError(
            f"{folder}: expected model_type {' or '.join(MODEL_TYPES)}, got {raw.get('model_type')!r}; "
            "this is not a MusicGen checkpoint"
        )
    source = from_safetensors(folder)
    if raw["model_type"] == "musicgen" and any(n.startswith("audio_enc_to_dec_proj.") for n in source):
        raise WeightsError(f"{folder}: expected a text model's tensors, got a melody model's; download it again")
    config = AutoConfig.from_pretrained(str(folder))
    codec_config = codec_config_from_hf(raw["audio_encoder"])
    model_config = _model_config(config, codec_config, folder, name, license)
    codec_tensors = codec.codec_tensors_from_hf(source.under("audio_encoder."), codec_config)
    codec_decoder, codec_encoder = codec.build_codec(codec_config, codec_tensors)
    return Model(
        config=model_config,
        lm=_language_model(model_config, source),
        text_encoder=_text_encoder(config.text_encoder, source.under("text_encoder."), folder),
        chroma=None if model_config.chroma is None else ChromaExtractor(model_config.chroma),
        codec=codec_decoder,
        codec_encoder=codec_encoder,
    )


def _model_config(config: Any, codec_config: CodecConfig, folder: Path, name: str, license: str) -> ModelConfig:
    decoder = config.decoder
    for option, expected in {"activation_function": "gelu", "scale_embedding": False}.items():
        if getattr(decoder, option) != expected:
            raise WeightsError(f"{folder}: expected {option} {expected!r}, got {getattr(decoder, option)!r}")
    is_melody = config.model_type == "musicgen_melody"
    return ModelConfig(
        name=name,
        decoder=DecoderConfig(
            num_layers=decoder.num_hidden_layers,
            dim=decoder.hidden_size,
            num_heads=decoder.num_attention_heads,
            ffn_dim=decoder.ffn_dim,
            num_codebooks=decoder.num_codebooks,
            codebook_size=decoder.vocab_size,
            cross_attention=not is_melody,
        ),
        codec=codec_config,
        text_dim=config.text_encoder.d_model,
        chroma=_chroma_config(config, folder) if is_melody else None,
        audio_channels=decoder.audio_channels,
        license=license,
    )


def _chroma_config(config: Any, folder: Path) -> ChromaConfig:
    """From `preprocessor_config.json` where there is one, else the released models' constants."""
    path = folder / "preprocessor_config.json"
    raw = read_json(path) if path.is_file() else {}
    return ChromaConfig(
        sample_rate=raw.get("sampling_rate", 32000),
        num_chroma=config.num_chroma,
        n_fft=raw.get("n_fft", 16384),
        hop_length=raw.get("hop_length", 4096),
        num_frames=config.chroma_length,
    )


def _language_model(config: ModelConfig, source: TensorSource) -> LanguageModel:
    project_text = "enc_to_dec_proj.weight" in source
    with torch.device("meta"):
        model = LanguageModel(config, project_text=project_text)
    used = _name_map(config, project_text)
    elsewhere = {n for n in source if n.startswith(("text_encoder.", "audio_encoder."))}
    assemble(model, source, used, ignored=elsewhere | {POSITION_TABLE})
    return model.eval()


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


def _text_encoder(config: Any, source: TensorSource, folder: Path) -> TextEncoder:
    with torch.device("meta"):
        model: nn.Module = T5EncoderModel(config)
    shared, tied = "shared.weight", "encoder.embed_tokens.weight"
    embedding = shared if shared in source else tied
    names = {name: (Part(embedding if name in (shared, tied) else name),) for name in model.state_dict()}
    # Some files hold the whole T5; its decoder is not used.
    unused = {n for n in source if n in (shared, tied) or n.startswith(("decoder.", "lm_head."))}
    assemble(model, source, names, ignored=unused)
    return TextEncoder(model, load_tokenizer(folder))
