"""A whole step of the transformer: what it is given, the oracle that composes it from operations, and its check.

It knows the shape of a MusicGen decoder (pre-norm, no biases but the norms', exact GELU, K embeddings and K heads) and
nothing of checkpoints, requests or sampling. The one-call CPU version is `CpuStep` in `cpu_step`.
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
    """The tokens of one step: N positions of B rows, decode rows and prefill chunks mixed as they come.

    Attributes:
        codes: [N, K] int32; read where prefix_index is −1.
        query_offsets: [B+1] int32: row b has tokens query_offsets[b] … query_offsets[b+1]−1.
        kv_lens: [B] int32: a row's length in positions after this step; its tokens are the last ones of them.
        page_table: [B, max_pages] int32.
        logit_tokens: [R] int32: the tokens whose logits are wanted, in the order in which they are returned.
        prefix: [P, dim] float32 embeddings of prefix positions (chroma, text), or None.
        prefix_index: [N] int32: a token's row in `prefix`, −1 for tokens that are codes; None: all are codes.
        cross_page_table: [B, max_cross_pages] int32, or None without cross-attention.
        cross_lens: [B] int32: length of each row's text; 0 gives a cross-attention of zero.
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
        counts = self.query_offsets.diff().long()
        first = self.kv_lens - self.query_offsets[1:]
        shift = torch.repeat_interleave(first, counts)
        return shift + torch.arange(shift.shape[0], dtype=torch.int32, device=shift.device)


def check_step(weights: DecoderWeights, batch: StepBatch, pages: KVStore, cross_pages: KVStore | None) -> None:
    """Check everything about a step that can be checked without reading its tensors.

    Raises:
        KernelArgumentError: a wrong shape, dtype, device, or something missing.
    """
    device = weights.embeddings.device
    tokens = check_tensor("codes", batch.codes, (None, weights.num_codebooks), _INT, device=device).shape[0]
    rows = check_tensor("kv_lens", batch.kv_lens, (None,), _INT, device=device).shape[0]
    check_tensor("query_offsets", batch.query_offsets, (rows + 1,), _INT, device=device)
    check_tensor("page_table", batch.page_table, (rows, None), _INT, device=device)
    check_tensor("logit_tokens", batch.logit_tokens, (None,), _INT, device=device)
    if (batch.prefix is None) != (batch.prefix_index is None):
        raise KernelArgumentError("prefix", "prefix and prefix_index together, or neither", "one of them")
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
    backend: str | None = None,
) -> Tensor:
    """The step, one operation at a time: the oracle of the one-call version, and the path of other devices.

    Args:
        weights: the decoder.
        batch: its tokens.
        pages: keys and values of self-attention; **mutated** (the new positions are appended).
        cross_pages: keys and values of the texts, for models with cross-attention.
        backend: for every operation; None chooses.

    Returns:
        [R, K, V] float32 logits of `batch.logit_tokens`.

    Raises:
        KernelArgumentError, BackendUnavailableError: as the operations.
    """
    check_step(weights, batch, pages, cross_pages)
    hidden = _embed(weights, batch, backend)
    for index, block in enumerate(weights.blocks):
        normed = layer_norm(hidden, block.self_norm.weight, block.self_norm.bias, backend=backend)
        q, k, v = _heads(linear(normed, block.qkv, backend=backend), weights.num_heads, 3)
        rows = (batch.page_table, batch.query_offsets, batch.kv_lens)
        append_paged_kv(k, v, pages.layer(index), *rows, backend=backend)
        mixed = paged_attention(q, pages.layer(index), *rows, backend=backend).flatten(1)
        hidden = linear(mixed, block.out, residual=hidden, backend=backend)
        if block.cross is not None and cross_pages is not None:
            hidden = _cross(block.cross, hidden, weights.num_heads, batch, cross_pages, index, backend)
        normed = layer_norm(hidden, block.ffn_norm.weight, block.ffn_norm.bias, backend=backend)
        wide = linear(normed, block.fc1, activation="gelu", backend=backend)
        hidden = linear(wide, block.fc2, residual=hidden, backend=backend)
    last = hidden[batch.logit_tokens.long()]
    normed = layer_norm(last, weights.final_norm.weight, weights.final_norm.bias, backend=backend)
    logits = linear(normed, weights.heads, backend=backend)
    return logits.unflatten(1, (weights.num_codebooks, -1))  # of no rows too, which a view with −1 cannot tell


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
    """Fill the cross-attention's pages of all layers from the texts' projected states.

    Args:
        states: [N, dim] float32, the rows' texts one after another.
        page_table: [B, max_pages] int32.
        query_offsets: [B+1] int32 into `states`.
        lens: [B] int32, each row's length.
        cross_pages: **mutated**.

    Raises:
        KernelArgumentError, BackendUnavailableError: as the operations.
    """
    for index, block in enumerate(weights.blocks):
        if block.cross is None:
            raise KernelArgumentError("weights", "cross-attention layers", "none")
        k, v = _heads(linear(states, block.cross.kv, backend=backend), weights.num_heads, 2)
        append_paged_kv(k, v, cross_pages.layer(index), page_table, query_offsets, lens, backend=backend)


def _embed(weights: DecoderWeights, batch: StepBatch, backend: str | None) -> Tensor:
    positions = batch.positions()
    if batch.prefix is None or batch.prefix_index is None:
        return embed_codes(batch.codes, weights.embeddings, positions, weights.sinusoids, backend=backend)
    is_prefix = batch.prefix_index >= 0
    codes = torch.where(is_prefix[:, None], 0, batch.codes)
    hidden = embed_codes(codes, weights.embeddings, positions, weights.sinusoids, backend=backend)
    chosen = batch.prefix[batch.prefix_index[is_prefix].long()]
    hidden[is_prefix] = chosen + weights.sinusoids[positions[is_prefix].long()]
    return hidden


def _heads(x: Tensor, num_heads: int, parts: int) -> tuple[Tensor, ...]:
    return x.view(x.shape[0], parts, num_heads, -1).unbind(1)


def _cross(
    cross: CrossWeights,
    hidden: Tensor,
    num_heads: int,
    batch: StepBatch,
    cross_pages: KVStore,
    index: int,
    backend: str | None,
) -> Tensor:
    if batch.cross_page_table is None or batch.cross_lens is None:
        raise KernelArgumentError("cross_page_table", "a tensor", "None")
    normed = layer_norm(hidden, cross.norm.weight, cross.norm.bias, backend=backend)
    (q,) = _heads(linear(normed, cross.q, backend=backend), num_heads, 1)
    rows = (batch.cross_page_table, batch.query_offsets, batch.cross_lens)
    mixed = cross_attention(q, cross_pages.layer(index), *rows, backend=backend).flatten(1)
    return linear(mixed, cross.out, residual=hidden, backend=backend)
