"""Packs a loaded decoder into the weights for the kernels' step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from musicgen_kernels import PackedLinear, pack_linear, sinusoid_table
from musicgen_kernels.packing import Kind, packed_bytes
from musicgen_kernels.step import BlockWeights, CrossWeights, DecoderWeights, Norm
from musicgen_kernels.weight_memory import WeightMemory
from torch import Tensor, nn

from musicgen.config import DecoderConfig, WeightDtype
from musicgen.engine.host_memory import return_freed_memory
from musicgen.errors import InvalidRequestError
from musicgen.models.transformer import Attention, Decoder, DecoderLayer

OnLayer = Callable[[int, int], None]
"""Called with the number of packed layers and the total."""

KINDS: dict[WeightDtype, Kind] = {"float32": "fp32", "bfloat16": "bf16", "int8": "int8", "int4": "int4"}


def kind_of(weights: DecoderWeights) -> WeightDtype:
    """The weight type of a packed decoder."""
    return next(name for name, kind in KINDS.items() if kind == weights.heads.kind)


def pack_decoder(
    decoder: Decoder,
    weights: WeightDtype,
    max_positions: int,
    *,
    release: bool = False,
    on_layer: OnLayer | None = None,
) -> DecoderWeights:
    """Quantise the matrices of `decoder` and reorder them for the kernels; embeddings, norms and biases stay fp32.

    The result is on the device of the decoder's last norm. Layers in host memory are moved there one by one in fp32: a
    GPU never holds the whole fp32 model, and nothing is rounded twice. On the CPU all matrices are in one allocation.

    Args:
        max_positions: length of the longest row, including the prefix.
        release: free the layers of `decoder` (mutated) one by one as they are packed, so that memory holds the model
            about once; the decoder can no longer be run afterwards.
    Raises:
        InvalidRequestError: no kernel supports this weight type.
    """
    if weights not in KINDS:
        raise InvalidRequestError(f"weights in {', '.join(KINDS)}", weights, param="weights")
    config: DecoderConfig = decoder.config
    device = decoder.out_norm.weight.device

    def pack(linear: nn.Linear) -> PackedLinear:
        return pack_linear(linear.weight.detach().to(device), KINDS[weights])

    memory = _memory(decoder, KINDS[weights]) if device.type == "cpu" else None
    blocks = []
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        block = _block(layer, pack, device)
        blocks.append(block if memory is None else memory.place_block(block))
        if release:
            layer.to("meta")
            return_freed_memory()
        if on_layer is not None:
            on_layer(len(blocks), config.num_layers)
    heads = pack(decoder.heads)
    if release:
        decoder.heads.to("meta")
    embeddings = decoder.embed.weight.detach().view(config.num_codebooks, config.codebook_size + 1, config.dim)
    return DecoderWeights(
        embeddings=embeddings.to(device).contiguous(),
        sinusoids=sinusoid_table(max_positions, config.dim, device=device),
        blocks=tuple(blocks),
        final_norm=_norm(decoder.out_norm, device),
        heads=heads if memory is None else memory.place(heads),
        num_heads=config.num_heads,
    )


def _memory(decoder: Decoder, kind: Kind) -> WeightMemory:
    matrices = [module for module in decoder.modules() if isinstance(module, nn.Linear)]
    return WeightMemory(packed_bytes(matrix.out_features, matrix.in_features, kind) for matrix in matrices)


def _block(layer: DecoderLayer, pack: Callable[[nn.Linear], PackedLinear], device: torch.device) -> BlockWeights:
    cross = None
    if layer.cross_attn is not None:
        attention: Attention = layer.cross_attn
        assert layer.norm_cross is not None
        cross = CrossWeights(
            norm=_norm(layer.norm_cross, device),
            q=pack(attention.q),
            kv=pack(attention.kv),
            out=pack(attention.out),
        )
    return BlockWeights(
        self_norm=_norm(layer.norm1, device),
        qkv=pack(layer.self_attn.qkv),
        out=pack(layer.self_attn.out),
        cross=cross,
        ffn_norm=_norm(layer.norm2, device),
        fc1=pack(layer.fc1),
        fc2=pack(layer.fc2),
    )


def _norm(norm: nn.LayerNorm, device: torch.device) -> Norm:
    return Norm(_fp32(norm.weight, device), _fp32(norm.bias, device))


def _fp32(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device, torch.float32).contiguous()
