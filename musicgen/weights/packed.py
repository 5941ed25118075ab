"""Our own checkpoint format: a complete model with the decoder's matrices quantised and laid out for the kernels.

A folder with `musicgen.json` (the configuration), `packed.safetensors` and the tokenizer. Loading needs neither the
original checkpoint nor more memory than running. Matrices have the element order of the device they were packed on, as
recorded in the configuration: "tiles" for CPUs, "rows" for GPUs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from musicgen_kernels import KernelArgumentError, PackedLinear, sinusoid_table, unpack_header
from musicgen_kernels.step import BlockWeights, CrossWeights, DecoderWeights, Norm
from musicgen_kernels.weight_memory import gathered
from safetensors.torch import save_file
from torch import Tensor, nn

from musicgen.config import ChromaConfig, CodecConfig, DecoderConfig, ModelConfig
from musicgen.errors import WeightsError
from musicgen.model import Model
from musicgen.models.encodec import EncodecDecoder
from musicgen.models.encodec_encoder import EncodecEncoder
from musicgen.models.language_model import LanguageModel
from musicgen.models.t5 import TextEncoder, load_tokenizer
from musicgen.weights.checkpoint import TensorSource, from_safetensors, read_json, unfilled

CONFIG_FILE, TENSOR_FILE = "musicgen.json", "packed.safetensors"
VERSION = 1
LM, TEXT, CODEC, CODEC_ENCODER, DECODER = "lm.", "text_encoder.", "codec.", "codec_encoder.", "decoder."


def save(model: Model, weights: DecoderWeights, folder: Path) -> None:
    """Write `model` with its packed decoder `weights` to `folder` (created if necessary; files are overwritten)."""
    folder.mkdir(parents=True, exist_ok=True)
    projections = {n: t for n, t in model.lm.state_dict().items() if not n.startswith("decoder.")}
    text = {n: t for n, t in model.text_encoder.model.state_dict().items() if n != "encoder.embed_tokens.weight"}
    parts: dict[str, Mapping[str, Tensor]] = {
        LM: projections,
        TEXT: text,
        CODEC: model.codec.state_dict(),
        CODEC_ENCODER: model.codec_encoder.tensors,
        DECODER: dict(_named_tensors(weights)),
    }
    tensors = {
        prefix + name: tensor.detach().cpu().contiguous()
        for prefix, part in parts.items()
        for name, tensor in part.items()
    }
    save_file(tensors, folder / TENSOR_FILE)
    content = {
        "version": VERSION,
        "order": weights.heads.order,
        "model": asdict(model.config),
        "text_encoder": model.text_encoder.model.config.to_dict(),
        "num_positions": weights.sinusoids.shape[0],
        "project_text": isinstance(model.lm.text_proj, nn.Linear),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")
    model.text_encoder.save_tokenizer(folder)


class PackedCheckpoint:
    """A checkpoint written by `save`. The configuration is read eagerly, each component on demand.

    Args:
        device: of the packed decoder.
    Raises:
        WeightsError: unsupported version, or (also from the methods) missing or corrupted tensors.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self._content, self._device = folder, read_json(folder / CONFIG_FILE), device
        version = self._content.get("version")
        if version != VERSION:
            raise WeightsError(
                f"{folder}: expected packed weights of version {VERSION}, got {version}; pack them again"
            )
        self._tensors = from_safetensors(folder, TENSOR_FILE)
        with self._told_as_damage():
            self.config = _model_config(self._content["model"])

    def language_model(self) -> tuple[LanguageModel, DecoderWeights]:
        """The conditioning projections (the language model's own layers stay empty) and the packed decoder.

        Raises:
            WeightsError: also if the device's kernels do not support the order of the matrices.
        """
        with self._told_as_damage():
            decoder = self._tensors.under(DECODER)
            order = self._content.get("order") or unpack_header(decoder["heads"]).order  # older files do not record it
        self._check_order(order)
        with self._told_as_damage():
            lm = _language_model(self.config, self._tensors.under(LM), self._content["project_text"], self._device)
            num_positions = self._content["num_positions"]
            return lm, _decoder_weights(self.config.decoder, decoder, num_positions, self._device)

    def text_encoder(self) -> TextEncoder:
        """T5, in fp32 on the CPU."""
        with self._told_as_damage():
            return _text_encoder(self._content["text_encoder"], self._tensors.under(TEXT), self._folder)

    def codec(self) -> tuple[EncodecDecoder, EncodecEncoder]:
        """The codec's decoder and encoder, in fp32 on the CPU."""
        with self._told_as_damage():
            config = self.config.codec
            decoder = _codec(config, self._tensors.under(CODEC))
            return decoder, EncodecEncoder(config, dict(self._tensors.under(CODEC_ENCODER)))

    def _check_order(self, order: str) -> None:
        on_cpu = self._device.type == "cpu"
        if order == ("tiles" if on_cpu else "rows"):
            return
        got, todo = "ones packed on a GPU", "on a CPU, load the original, or pack it again with device='cpu'"
        if not on_cpu:
            got = "ones packed on a CPU"
            todo = f"load them with device='cpu' (--device cpu), or load the original to run on {self._device}"
        raise WeightsError(f"{self._folder}: expected matrices packed for {self._device}, got {got}; {todo}")

    @contextmanager
    def _told_as_damage(self) -> Iterator[None]:
        try:
            yield
        except (KeyError, TypeError, RuntimeError, KernelArgumentError) as error:
            raise WeightsError(
                f"{self._folder}: expected a checkpoint written by `MusicGen.save_packed`, got {error}; pack it again"
            ) from error


def _model_config(raw: dict[str, Any]) -> ModelConfig:
    codec, chroma = dict(raw["codec"]), raw["chroma"]
    codec["upsampling_ratios"] = tuple(codec["upsampling_ratios"])
    nested = {
        "decoder": DecoderConfig(**raw["decoder"]),
        "codec": CodecConfig(**codec),
        "chroma": None if chroma is None else ChromaConfig(**chroma),
    }
    return ModelConfig(**(raw | nested))


def _language_model(
    config: ModelConfig, source: TensorSource, project_text: bool, device: torch.device
) -> LanguageModel:
    with unfilled():
        model = LanguageModel(config, project_text=project_text)
    for name in ("text_proj", "chroma_proj"):
        part = source.under(f"{name}.")
        if part:
            getattr(model, name).load_state_dict({n: t.to(device) for n, t in part.items()}, assign=True)
    model.decoder.out_norm.to_empty(device=device)  # determines the model's device
    return model.eval().requires_grad_(False)


def _text_encoder(raw: dict[str, Any], source: TensorSource, folder: Path) -> TextEncoder:
    from transformers import T5Config, T5EncoderModel

    with unfilled():
        model = T5EncoderModel(T5Config(**raw))
    model.set_input_embeddings(model.shared)  # also the encoder's
    shared = source["shared.weight"]
    model.load_state_dict(dict(source) | {"encoder.embed_tokens.weight": shared}, assign=True)
    return TextEncoder(model.requires_grad_(False), load_tokenizer(folder))


def _codec(config: CodecConfig, source: TensorSource) -> EncodecDecoder:
    decoder = EncodecDecoder(config)
    decoder.load_state_dict(dict(source))
    return decoder.eval()


# --- the decoder's tensors, by name ---


def _named_tensors(weights: DecoderWeights) -> Iterator[tuple[str, Tensor]]:
    yield "embeddings", weights.embeddings
    yield "heads", weights.heads.data
    yield from _named_norm("final_norm", weights.final_norm)
    for i, block in enumerate(weights.blocks):
        matrices = {"qkv": block.qkv, "out": block.out, "fc1": block.fc1, "fc2": block.fc2}
        norms = {"self_norm": block.self_norm, "ffn_norm": block.ffn_norm}
        if block.cross is not None:
            matrices |= {"cross_q": block.cross.q, "cross_kv": block.cross.kv, "cross_out": block.cross.out}
            norms["cross_norm"] = block.cross.norm
        for name, matrix in matrices.items():
            yield f"blocks.{i}.{name}", matrix.data
        for name, norm in norms.items():
            yield from _named_norm(f"blocks.{i}.{name}", norm)


def _named_norm(name: str, norm: Norm) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", norm.weight
    yield f"{name}.bias", norm.bias


def _decoder_weights(
    config: DecoderConfig, source: TensorSource, num_positions: int, device: torch.device
) -> DecoderWeights:
    on_cpu = device.type == "cpu"

    def tensor(name: str) -> Tensor:
        return source[name].to(device, copy=True)  # aligned, unlike a view of the file

    def matrix(name: str) -> PackedLinear:
        described = unpack_header(source[name])
        return described if on_cpu else replace(described, data=described.data.to(device))

    def norm(name: str) -> Norm:
        return Norm(tensor(f"{name}.weight"), tensor(f"{name}.bias"))

    def block(i: int) -> BlockWeights:
        here = f"blocks.{i}"
        cross = None
        if config.cross_attention:
            q, kv, out = (matrix(f"{here}.cross_{part}") for part in ("q", "kv", "out"))
            cross = CrossWeights(norm(f"{here}.cross_norm"), q, kv, out)
        return BlockWeights(
            self_norm=norm(f"{here}.self_norm"),
            qkv=matrix(f"{here}.qkv"),
            out=matrix(f"{here}.out"),
            cross=cross,
            ffn_norm=norm(f"{here}.ffn_norm"),
            fc1=matrix(f"{here}.fc1"),
            fc2=matrix(f"{here}.fc2"),
        )

    weights = DecoderWeights(
        embeddings=tensor("embeddings"),
        sinusoids=sinusoid_table(num_positions, config.dim, device=device),
        blocks=tuple(block(i) for i in range(config.num_layers)),
        final_norm=norm("final_norm"),
        heads=matrix("heads"),
        num_heads=config.num_heads,
    )
    return gathered(weights) if on_cpu else weights
