"""A whole decoder step in one call on the CPU: owns a decoder's weights and runs `StepBatch`es on pages.

The arithmetic is that of `step_by_operations` on the same CPU level, in one parallel region, without allocations once
the largest step has been seen. Shapes and dtypes are checked here; the compiled code checks indices and lengths.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .checks import check_tensor
from .cpu import HEAD_DIMS, TABLE_DTYPES, load, packed_arguments, page_arguments, row_arguments
from .errors import BackendUnavailableError, KernelArgumentError
from .linear import check_packed
from .packing import PackedLinear
from .pages import KVStore
from .step import NORM_EPS, BlockWeights, DecoderWeights, Norm, StepBatch, check_step
from .weight_memory import gathered, is_gathered

_FLOAT = (torch.float32,)
_Packed = tuple[int, ...]


class CpuStep:
    """A decoder ready to run on the CPU.

    Thread-safe; concurrent steps are serialised. The GIL is released during a step.

    Args:
        weights: packed in "tiles" order, on the CPU. Unless the matrices are in one allocation already, they are copied
            into one (described by `self.weights`), so the originals can be dropped.
        backend: "cpu", or "cpu:level" for one instruction-set level.

    Raises:
        KernelArgumentError: weights of the wrong shape, dtype, order or device.
        BackendUnavailableError: the native kernels are not built or the level is not supported.
    """

    def __init__(self, weights: DecoderWeights, *, backend: str = "cpu") -> None:
        name, _, level = backend.partition(":")
        if name != "cpu":
            raise BackendUnavailableError(backend, "the single-call step runs on the CPU only")
        _check_weights(weights)
        self.weights = weights = weights if is_gathered(weights) else gathered(weights)
        self.level = load(level or None).level
        table, sinusoids = weights.embeddings, weights.sinusoids
        ffn_dim = weights.blocks[0].fc1.out_features
        self._native = load(level or None).native.Model(
            (weights.dim, weights.num_heads, ffn_dim, NORM_EPS),
            (
                *(table.data_ptr(), sinusoids.data_ptr(), TABLE_DTYPES.index(table.dtype)),
                *(table.shape[0], table.shape[1] - 1, sinusoids.shape[0]),
            ),
            tuple(_block_arguments(block) for block in weights.blocks),
            _norm_arguments(weights.final_norm),
            packed_arguments(weights.heads),
        )

    def run(
        self,
        batch: StepBatch,
        pages: KVStore,
        cross_pages: KVStore | None = None,
        *,
        out: Tensor | None = None,
        num_threads: int | None = None,
    ) -> Tensor:
        """Run one step: see `step_by_operations` for arguments and result.

        Args:
            out: [R, K, V] float32 to write to instead of a new tensor.
            num_threads: None: `torch.get_num_threads()`. The result does not depend on it.
        """
        num_codebooks = self.weights.num_codebooks
        if out is None:
            out = torch.empty(len(batch.logit_tokens), num_codebooks, self.weights.heads.out_features // num_codebooks)
        self.prepare(batch, pages, cross_pages, out=out, num_threads=num_threads)()
        return out

    def prepare(
        self,
        batch: StepBatch,
        pages: KVStore,
        cross_pages: KVStore | None = None,
        *,
        out: Tensor,
        num_threads: int | None = None,
    ) -> Callable[[], None]:
        """`run` for repeated calls: tensors are validated now, and their contents are read at each call.

        Between steps the caches are full of weights, so inspecting twenty tensors would take longer than writing the
        few numbers that change.
        """
        weights = self.weights
        check_step(weights, batch, pages, cross_pages)
        num_logits, num_codebooks = batch.logit_tokens.shape[0], weights.num_codebooks
        shape = (num_logits, num_codebooks, weights.heads.out_features // num_codebooks)
        check_tensor("out", out, shape, _FLOAT, device=weights.embeddings.device)
        cross_rows: tuple[int, ...] = ()
        if weights.has_cross and batch.cross_page_table is not None and batch.cross_lens is not None:
            cross_rows = row_arguments(batch.cross_page_table, batch.query_offsets, batch.cross_lens)
        arguments = (
            _token_arguments(batch),
            row_arguments(batch.page_table, batch.query_offsets, batch.kv_lens),
            _store_arguments(pages),
            cross_rows,
            _store_arguments(cross_pages) if cross_pages is not None and weights.has_cross else (),
            (batch.logit_tokens.data_ptr(), num_logits, out.data_ptr()),
            num_threads or torch.get_num_threads(),
        )
        return functools.partial(self._call, arguments, (batch, pages, cross_pages, out))

    def _call(self, arguments: tuple[Any, ...], _held: tuple[object, ...]) -> None:
        """A step given by addresses; `_held` keeps their owners alive."""
        self._native.step(*arguments)

    def write_cross(
        self, states: Tensor, page_table: Tensor, query_offsets: Tensor, lens: Tensor, cross_pages: KVStore
    ) -> None:
        """Fill the cross-attention pages of all layers; see `write_cross_by_operations`."""
        check_tensor("states", states, (None, self.weights.dim), _FLOAT)
        rows = check_tensor("page_table", page_table, (None, None), (torch.int32,)).shape[0]
        check_tensor("query_offsets", query_offsets, (rows + 1,), (torch.int32,))
        check_tensor("lens", lens, (rows,), (torch.int32,))
        if not self.weights.has_cross:
            raise KernelArgumentError("weights", "cross-attention layers", "none")
        self._native.write_cross(
            *(states.data_ptr(), states.shape[0], row_arguments(page_table, query_offsets, lens)),
            *(_store_arguments(cross_pages), torch.get_num_threads()),
        )


def _token_arguments(batch: StepBatch) -> tuple[int, ...]:
    prefix = (0, 0, 0)
    if batch.prefix is not None and batch.prefix_index is not None:
        prefix = (batch.prefix_index.data_ptr(), batch.prefix.data_ptr(), batch.prefix.shape[0])
    return (batch.codes.shape[0], batch.codes.data_ptr(), *prefix)


def _store_arguments(store: KVStore) -> tuple[tuple[int, ...], int, int]:
    for tensor in (store.k, store.v):
        if not tensor.is_contiguous():
            raise KernelArgumentError("pages", "a contiguous store", f"strides {list(tensor.stride())}")
    layer_bytes, scale_bytes = (0 if t is None else t.nbytes // store.k.shape[0] for t in (store.k, store.k_scales))
    return (page_arguments(store), layer_bytes, scale_bytes)


def _norm_arguments(norm: Norm) -> tuple[int, int]:
    return (norm.weight.data_ptr(), norm.bias.data_ptr())


def _block_arguments(block: BlockWeights) -> tuple[tuple[_Packed, ...], tuple[_Packed, ...]]:
    empty: _Packed = ()
    cross_norm, cross = empty, (empty, empty, empty)
    if block.cross is not None:
        cross_norm = _norm_arguments(block.cross.norm)
        q, kv, out = (packed_arguments(w) for w in (block.cross.q, block.cross.kv, block.cross.out))
        cross = (q, kv, out)
    norms = (_norm_arguments(block.self_norm), cross_norm, _norm_arguments(block.ffn_norm))
    first = (packed_arguments(block.qkv), packed_arguments(block.out))
    return norms, (*first, *cross, packed_arguments(block.fc1), packed_arguments(block.fc2))


def _check_weights(weights: DecoderWeights) -> None:
    device = torch.device("cpu")
    codebooks, entries, dim = check_tensor(
        "embeddings", weights.embeddings, (None, None, None), TABLE_DTYPES, device=device
    ).shape
    check_tensor("sinusoids", weights.sinusoids, (None, dim), _FLOAT, device=device)
    if dim % weights.num_heads or dim // weights.num_heads not in HEAD_DIMS:
        raise KernelArgumentError("num_heads", f"dim {dim} / {HEAD_DIMS}", str(weights.num_heads))
    _check_norm("final_norm", weights.final_norm, dim)
    _check_matrix("heads", weights.heads, codebooks * (entries - 1), dim)
    if not weights.blocks:
        raise KernelArgumentError("blocks", "at least one layer", "none")
    ffn = weights.blocks[0].fc1.out_features
    for i, block in enumerate(weights.blocks):
        if (block.cross is None) == weights.has_cross:
            raise KernelArgumentError(f"blocks[{i}].cross", "cross-attention in all layers or none", "a mix")
        for name, norm in (("self_norm", block.self_norm), ("ffn_norm", block.ffn_norm)):
            _check_norm(f"blocks[{i}].{name}", norm, dim)
        _check_matrix(f"blocks[{i}].qkv", block.qkv, 3 * dim, dim)
        _check_matrix(f"blocks[{i}].out", block.out, dim, dim)
        _check_matrix(f"blocks[{i}].fc1", block.fc1, ffn, dim)
        _check_matrix(f"blocks[{i}].fc2", block.fc2, dim, ffn)
        if block.cross is not None:
            _check_norm(f"blocks[{i}].cross.norm", block.cross.norm, dim)
            _check_matrix(f"blocks[{i}].cross.q", block.cross.q, dim, dim)
            _check_matrix(f"blocks[{i}].cross.kv", block.cross.kv, 2 * dim, dim)
            _check_matrix(f"blocks[{i}].cross.out", block.cross.out, dim, dim)


def _check_norm(argument: str, norm: Norm, dim: int) -> None:
    check_tensor(f"{argument}.weight", norm.weight, (dim,), _FLOAT, device=torch.device("cpu"))
    check_tensor(f"{argument}.bias", norm.bias, (dim,), _FLOAT, device=torch.device("cpu"))


def _check_matrix(argument: str, weight: PackedLinear, out_features: int, in_features: int) -> None:
    check_packed(weight, torch.device("cpu"))
    if weight.order != "tiles":
        raise KernelArgumentError(argument, "order 'tiles'", repr(weight.order), "pack it for the CPU")
    if (weight.out_features, weight.in_features) != (out_features, in_features):
        got = f"[{weight.out_features}, {weight.in_features}]"
        raise KernelArgumentError(argument, f"[{out_features}, {in_features}]", got)
