"""A whole transformer step: its inputs, their validation, and the reference that composes it from operations.

Assumes MusicGen's decoder architecture (pre-norm, biases only in norms, exact GELU, K embeddings and K heads).
Independent of checkpoints, requests and sampling. The single-call CPU version is `CpuStep` in `cpu_step`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import append_paged_kv, cross_attention, paged_attention
from .checks import check_tensor
from .errors import KernelArgumentError
from .linear import linear
from .norm import embed_codes, layer_norm
from .packing import PackedLinear
from .pages import KVStore

_INT = (torch.int32,)
_HALVES = (torch.bfloat16, torch.float16)
NORM_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Norm:
    """Weight and bias of a layer norm, [dim] float32 each."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class CrossWeights:
    """Cross-attention of a layer.

    Attributes:
        norm: before the query projection.
        q: [dim, dim] packed; `kv`: [2·dim, dim] packed, keys first; `out`: [dim, dim] packed.
    """

    norm: Norm
    q: PackedLinear
    kv: PackedLinear
    out: PackedLinear


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """One layer.

    Attributes:
        self_norm, ffn_norm: before self-attention and before the feed-forward.
        qkv: [3·dim, dim] packed: queries, keys, values. `out`: [dim, dim].
        cross: None for models that condition by prefix only.
        fc1, fc2: [ffn, dim] and [dim, ffn] packed.
    """

    self_norm: Norm
    qkv: PackedLinear
    out: PackedLinear
    cross: CrossWeights | None
    ffn_norm: Norm
    fc1: PackedLinear
    fc2: PackedLinear


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """A whole decoder.

    Attributes:
        embeddings: [K, V+1, dim] float32, bfloat16 or float16; entry V is the special token.
        sinusoids: [max_positions, dim] float32 of `sinusoid_table`.
        blocks: the layers, first to last; all with cross-attention or none.
        final_norm: before the heads.
        heads: [K·V, dim] packed, codebook after codebook.
        num_heads: attention heads; dim / num_heads is the head dim.
    """

    embeddings: Tensor
    sinusoids: Tensor
    blocks: tuple[BlockWeights, ...]
    final_norm: Norm
    heads: PackedLinear
    num_heads: int

    @property
    def num_codebooks(self) -> int:
        return self.embeddings.shape[0]

    @property
    def dim(self) -> int:
        return self.embeddings.shape[2]

    @property
    def has_cross(self) -> bool:
        return self.blocks[0].cross is not None


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The tokens of one step: N positions of B rows, with decode rows and prefill chunks in any order.

    Attributes:
        codes: [N, K] int32; read where prefix_index is −1.
        query_offsets: [B+1] int32: row b has tokens query_offsets[b] … query_offsets[b+1]−1.
        kv_lens: [B] int32: a row's length in positions after this step; its tokens are the last of them.
        page_table: [B, max_pages] int32.
        logit_tokens: [R] int32: the tokens to return logits for, in that order.
        prefix: [P, dim] float32 embeddings of prefix positions (chroma, text), or None.
        prefix_index: [N] int32: a token's row in `prefix`, −1 for tokens that are codes; None: all are codes.
        cross_page_table: [B, max_cross_pages] int32, or None without cross-attention.
        cross_lens: [B] int32: length of each row's text; 0 makes the cross-attention output zero.
    """

    codes: Tensor
    query_offsets: Tensor
    kv_lens: Tensor
    page_table: Tensor
    logit_tokens: Tensor
    prefix: Tensor | None = None
    prefix_index: Tensor | None = None
    cross_page_table: Tensor | None = None
    cross_lens: Tensor | None = None

    def positions(self) -> Tensor:
        """[N] int32: each token's position in its row."""
        num_tokens = self.codes.shape[0]  # passed explicitly: summing the counts would synchronise with the GPU
        counts = self.query_offsets.diff().long()
        first = self.kv_lens - self.query_offsets[1:]
        shift = torch.repeat_interleave(first, counts, output_size=num_tokens)
        return shift + torch.arange(num_tokens, dtype=torch.int32, device=shift.device)


def check_step(weights: DecoderWeights, batch: StepBatch, pages: KVStore, cross_pages: KVStore | None) -> None:
    """Check everything about a step that can be checked without reading tensor contents.

    Raises:
        KernelArgumentError: wrong shape, dtype or device, or missing tensors.
    """
    device = weights.embeddings.device
    tokens = check_tensor("codes", batch.codes, (None, weights.num_codebooks), _INT, device=device).shape[0]
    rows = check_tensor("kv_lens", batch.kv_lens, (None,), _INT, device=device).shape[0]
    check_tensor("query_offsets", batch.query_offsets, (rows + 1,), _INT, device=device)
    check_tensor("page_table", batch.page_table, (rows, None), _INT, device=device)
    check_tensor("logit_tokens", batch.logit_tokens, (None,), _INT, device=device)
    if (batch.prefix is None) != (batch.prefix_index is None):
        raise KernelArgumentError("prefix", "both prefix and prefix_index, or neither", "only one of them")
    if batch.prefix is not None:
        check_tensor("prefix", batch.prefix, (None, weights.dim), (torch.float32,), device=device)
        check_tensor("prefix_index", batch.prefix_index, (tokens,), _INT, device=device)
    _check_store("pages", pages, weights)
    if not weights.has_cross:
        return
    if cross_pages is None or batch.cross_page_table is None or batch.cross_lens is None:
        raise KernelArgumentError("cross_pages", "pages, table and lengths for the cross-attention", "None")
    check_tensor("cross_page_table", batch.cross_page_table, (rows, None), _INT, device=device)
    check_tensor("cross_lens", batch.cross_lens, (rows,), _INT, device=device)
    _check_store("cross_pages", cross_pages, weights)


def _check_store(argument: str, store: KVStore, weights: DecoderWeights) -> None:
    wanted = (len(weights.blocks), weights.num_heads, weights.dim // weights.num_heads)
    got = (store.k.shape[0], store.k.shape[2], store.k.shape[4])
    if wanted != got:
        raise KernelArgumentError(argument, f"{wanted} layers, heads, head dim", f"{got}")


def step_by_operations(
    weights: DecoderWeights,
    batch: StepBatch,
    pages: KVStore,
    cross_pages: KVStore | None = None,
    *,
    activations: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """The step, one operation at a time: the reference for the single-call version, and the path for other devices.

    The residual stream and the norms are float32; inputs of matrix products have the dtype `activations`.

    Args:
        weights: the decoder.
        batch: its tokens.
        pages: keys and values of self-attention; **mutated** (the new positions are appended).
        cross_pages: keys and values of the texts, for models with cross-attention.
        activations: None: `activation_dtype`.
        backend: for every operation; None selects them automatically.

    Returns:
        [R, K, V] float32 logits of `batch.logit_tokens`.

    Raises:
        KernelArgumentError, BackendUnavailableError: see the operations.
    """
    check_step(weights, batch, pages, cross_pages)
    hidden = _embed(weights, batch, backend)
    run = _Operations(weights.num_heads, activations or activation_dtype(weights, pages), pages.k.dtype, backend)
    for index, block in enumerate(weights.blocks):
        q, k, v = run.heads(run.norm(hidden, block.self_norm), block.qkv, 3)
        rows = (batch.page_table, batch.query_offsets, batch.kv_lens)
        append_paged_kv(k, v, pages.layer(index), *rows, backend=backend)
        mixed = paged_attention(q, pages.layer(index), *rows, backend=backend)
        hidden = run.add(mixed.flatten(1), block.out, hidden)
        if block.cross is not None and cross_pages is not None:
            hidden = _cross(block.cross, hidden, batch, cross_pages, index, run)
        wide = linear(run.norm(hidden, block.ffn_norm), block.fc1, activation="gelu", backend=backend)
        hidden = run.add(wide, block.fc2, hidden)
    last = hidden.index_select(0, batch.logit_tokens)
    normed = run.norm(last, weights.final_norm)
    num_codes = weights.heads.out_features // weights.num_codebooks  # computed, because -1 in view() fails without rows
    logits = linear(normed, weights.heads, out_dtype=torch.float32, backend=backend)
    return logits.view(last.shape[0], weights.num_codebooks, num_codes)


def write_cross_by_operations(
    weights: DecoderWeights,
    states: Tensor,
    page_table: Tensor,
    query_offsets: Tensor,
    lens: Tensor,
    cross_pages: KVStore,
    *,
    backend: str | None = None,
) -> None:
    """Fill the cross-attention pages of all layers from the texts' projected states.

    Args:
        states: [N, dim] float32, the rows' texts concatenated.
        page_table: [B, max_pages] int32.
        query_offsets: [B+1] int32 into `states`.
        lens: [B] int32, each row's length.
        cross_pages: **mutated**.

    Raises:
        KernelArgumentError, BackendUnavailableError: see the operations.
    """
    run = _Operations(weights.num_heads, activation_dtype(weights, cross_pages), cross_pages.k.dtype, backend)
    states = states.to(run.activations)
    for index, block in enumerate(weights.blocks):
        if block.cross is None:
            raise KernelArgumentError("weights", "cross-attention layers", "none")
        k, v = run.heads(states, block.cross.kv, 2)
        append_paged_kv(k, v, cross_pages.layer(index), page_table, query_offsets, lens, backend=backend)


def _embed(weights: DecoderWeights, batch: StepBatch, backend: str | None) -> Tensor:
    positions = batch.positions()
    if batch.prefix is None or batch.prefix_index is None or not batch.prefix.shape[0]:
        return embed_codes(batch.codes, weights.embeddings, positions, weights.sinusoids, backend=backend)
    # Compute both for all tokens, then select: indexing by a mask would synchronise with the GPU.
    is_prefix = (batch.prefix_index >= 0)[:, None]
    codes = torch.where(is_prefix, 0, batch.codes)
    hidden = embed_codes(codes, weights.embeddings, positions, weights.sinusoids, backend=backend)
    chosen = batch.prefix.index_select(0, batch.prefix_index.clamp(min=0))
    return torch.where(is_prefix, chosen + weights.sinusoids.index_select(0, positions), hidden)


def activation_dtype(weights: DecoderWeights, pages: KVStore) -> torch.dtype:
    """Default dtype of the inputs of matrix products.

    On a GPU it is 16 bits wide, for tensor cores: bfloat16 for bfloat16 weights, and for quantised weights the pages'
    dtype if that is 16 bits wide. On the CPU, and for float32 weights, it is float32. (audiocraft's autocast does the
    same in float16.)
    """
    kind, held = weights.heads.kind, pages.k.dtype
    if weights.embeddings.device.type == "cpu" or kind == "fp32":
        return torch.float32
    return held if kind != "bf16" and held in _HALVES else torch.bfloat16


@dataclass(frozen=True, slots=True)
class _Operations:
    """Shared settings of a step's matrix products, which convert from float32 to `activations` and back."""

    num_heads: int
    activations: torch.dtype
    held: torch.dtype
    """Dtype of the pages."""
    backend: str | None

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        return layer_norm(x, norm.weight, norm.bias, out_dtype=self.activations, backend=self.backend)

    def heads(self, x: Tensor, weight: PackedLinear, parts: int) -> tuple[Tensor, ...]:
        """Queries, keys, values: in the pages' dtype if x is narrow and that is not an integer type, else in x's."""
        narrow = self.activations != torch.float32 and self.held != torch.int8
        y = linear(x, weight, out_dtype=self.held if narrow else None, backend=self.backend)
        return y.view(x.shape[0], parts, self.num_heads, -1).unbind(1)

    def add(self, x: Tensor, weight: PackedLinear, hidden: Tensor) -> Tensor:
        """hidden + x Wᵀ, in float32."""
        x = x.to(self.activations)
        return linear(x, weight, residual=hidden, out_dtype=torch.float32, backend=self.backend)


def _cross(
    cross: CrossWeights,
    hidden: Tensor,
    batch: StepBatch,
    cross_pages: KVStore,
    index: int,
    run: _Operations,
) -> Tensor:
    if batch.cross_page_table is None or batch.cross_lens is None:
        raise KernelArgumentError("cross_page_table", "a tensor", "None")
    (q,) = run.heads(run.norm(hidden, cross.norm), cross.q, 1)
    rows = (batch.cross_page_table, batch.query_offsets, batch.cross_lens)
    mixed = cross_attention(q, cross_pages.layer(index), *rows, backend=run.backend)
    return run.add(mixed.flatten(1), cross.out, hidden)
