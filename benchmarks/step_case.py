"""A whole decode step at a MusicGen size with random weights, and transformers' fp32 step for comparison."""

from __future__ import annotations

from collections.abc import Callable

import musicgen_kernels as kernels
import torch
from musicgen_kernels.cpu_step import CpuStep
from musicgen_kernels.packing import Kind, PackedLinear
from musicgen_kernels.step import BlockWeights, CrossWeights, DecoderWeights, Norm, StepBatch, step_by_operations

from .kernel_cases import DTYPES, SQUARES, Case

SHAPES = {"small": (24, 1024, 16), "medium": (48, 1536, 24), "large": (48, 2048, 32)}
TEXT_LEN = 12
CODEBOOKS, CODES = 4, 2048


def _weights(layers: int, dim: int, heads: int, kind: Kind) -> DecoderWeights:
    """All layers share one set of weights: values do not affect step time, and packing 24 layers takes a minute."""

    def matrix(n: int, k: int) -> PackedLinear:
        return kernels.pack_linear(torch.randn(n, k) / k**0.5, kind)

    norm = Norm(torch.ones(dim), torch.zeros(dim))
    cross = CrossWeights(norm, matrix(dim, dim), matrix(2 * dim, dim), matrix(dim, dim))
    first = (norm, matrix(3 * dim, dim), matrix(dim, dim), cross)
    block = BlockWeights(*first, norm, matrix(4 * dim, dim), matrix(dim, 4 * dim))
    tables = torch.randn(CODEBOOKS, CODES + 1, dim) * 0.02
    sinusoids = kernels.sinusoid_table(2048, dim)
    return DecoderWeights(tables, sinusoids, (block,) * layers, norm, matrix(CODEBOOKS * CODES, dim), heads)


def _read_bytes(weights: DecoderWeights, kv_bytes: int) -> int:
    """Bytes that a decode step must read: all matrices except those for the text's KV, and the KV cache."""
    total = weights.heads.data.nbytes + kv_bytes
    for block in weights.blocks:
        matrices = [block.qkv, block.out, block.fc1, block.fc2]
        if block.cross is not None:
            matrices += [block.cross.q, block.cross.out]
        total += sum(matrix.data.nbytes for matrix in matrices)
    return total


def _batch(rows: int, length: int, table: torch.Tensor) -> StepBatch:
    return StepBatch(
        codes=torch.randint(0, CODES, (rows, CODEBOOKS), dtype=torch.int32),
        query_offsets=torch.arange(rows + 1, dtype=torch.int32),
        kv_lens=torch.full((rows,), length, dtype=torch.int32),
        page_table=table,
        logit_tokens=torch.arange(rows, dtype=torch.int32),
        cross_page_table=torch.arange(rows, dtype=torch.int32)[:, None].contiguous(),
        cross_lens=torch.full((rows,), TEXT_LEN, dtype=torch.int32),
    )


def step_case(
    backend: str, model: str, kind: Kind, kv: str, rows: int, length: int, peer: Callable[[], None] | None
) -> Case:
    """One decode step: all layers and heads, `rows` rows at `length` positions."""
    layers, dim, heads = SHAPES[model]
    weights = _weights(layers, dim, heads, kind)
    step = CpuStep(weights, backend=backend)
    per_row = (length + 15) // 16
    pages = kernels.new_kv_store(layers, rows * per_row, heads, dim // heads, DTYPES[kv])
    cross = kernels.new_kv_store(layers, rows, heads, dim // heads, DTYPES[kv])
    table = torch.randperm(rows * per_row).to(torch.int32).view(rows, per_row)
    for store in (pages, cross):
        for scales in (store.k_scales, store.v_scales):
            if scales is not None:
                scales.fill_(0.01)
    batch = _batch(rows, length, table)
    out = torch.empty(rows, CODEBOOKS, CODES)
    kv_bytes = kernels.page_bytes(layers, heads, dim // heads, DTYPES[kv]) * rows * length // 16

    def run() -> None:
        step.run(batch, pages, cross, out=out)

    def errors() -> tuple[float, float]:
        got = step.run(batch, pages, cross)
        exact = step_by_operations(weights, batch, pages, cross, backend="reference").double()
        return ((got.double() - exact).square().sum() / exact.square().sum()).item(), float("nan")

    macs = sum(m.out_features * m.in_features for b in weights.blocks for m in (b.qkv, b.out, b.fc1, b.fc2))
    macs += layers * 2 * dim * dim + CODEBOOKS * CODES * dim + 2 * layers * length * dim
    return Case(
        op=f"step {model}", backend=backend, weights=kind, activations="fp32", kv=kv, rows=rows, length=length,
        heads=heads, run=run, calls=1,
        num_bytes=_read_bytes(weights, kv_bytes), operations=2 * rows * macs,
        peak="int8" if kind in ("int8", "int4") else "fp32", errors=errors, peer=peer,
        error_note=SQUARES,
    )  # fmt: skip


def transformers_step(model: str, rows: int, length: int) -> Callable[[], None]:
    """transformers' MusicgenForCausalLM in fp32, one token per row with a cache of `length` − 1 positions."""
    from transformers import DynamicCache, EncoderDecoderCache, MusicgenDecoderConfig, MusicgenForCausalLM

    layers, dim, heads = SHAPES[model]
    config = MusicgenDecoderConfig(
        num_hidden_layers=layers, hidden_size=dim, num_attention_heads=heads, ffn_dim=4 * dim, vocab_size=CODES,
        num_codebooks=CODEBOOKS, max_position_embeddings=2048,
    )  # fmt: skip
    peer = MusicgenForCausalLM(config).eval()
    states = torch.randn(rows, TEXT_LEN, dim)
    codes = torch.randint(0, CODES, (rows * CODEBOOKS, 1))
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for layer in range(layers):
        keys, values = torch.randn(2, rows, heads, length - 1, dim // heads).unbind(0)
        cache.self_attention_cache.update(keys, values, layer)

    def run() -> None:
        with torch.inference_mode():
            peer(input_ids=codes, encoder_hidden_states=states, past_key_values=cache, use_cache=True)
            cache.self_attention_cache.crop(-1)

    return run
