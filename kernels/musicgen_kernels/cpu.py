"""The CPU backend: passes addresses and sizes of validated tensors to the compiled kernels of one ISA level.

It checks the requirements of this backend (dtypes, memory order); the compiled code checks indices and lengths. Uses
`torch.get_num_threads()` threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .checks import check_tensor
from .errors import KernelArgumentError
from .isa import load_level
from .native import CpuModule
from .packing import KINDS, PackedLinear
from .pages import KV_DTYPES, KVStore, PagedKV
from .sampling import SampleBatch

HEAD_DIMS = (32, 64)
_PAGED = ("append_paged_kv", "paged_attention", "cross_attention")
TABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLOAT = (torch.float32,)


class CpuBackend:
    """The operations of one level.

    Attributes:
        level: "baseline", "avx2" or "avx512".
        native: its compiled module.
    """

    def __init__(self, level: str, native: CpuModule) -> None:
        self.level, self.native = level, native

    def unavailable(
        self, operation: str, device_type: str, dtype: torch.dtype, head_dim: int | None = None
    ) -> str | None:
        """Why this backend cannot run the operation; None if it can."""
        if device_type != "cpu":
            return "runs on the CPU only"
        if dtype == torch.float64:
            return "computes in float32; only the reference supports float64"
        if operation in _PAGED and head_dim not in (None, *HEAD_DIMS):
            return f"has no kernel for head_dim {head_dim}, only for {HEAD_DIMS}"
        return None

    def delayed_sample_step(
        self, logits: Tensor, batch: SampleBatch, delays: Tensor, sequences: Tensor, out: Tensor
    ) -> None:
        """See `musicgen_kernels.sampling.delayed_sample_step`."""
        self.prepare_delayed_sample_step(logits, batch, delays, sequences, out)()

    def prepare_delayed_sample_step(
        self, logits: Tensor, batch: SampleBatch, delays: Tensor, sequences: Tensor, out: Tensor
    ) -> Callable[[], None]:
        """The same for repeated calls; addresses and sizes are read now."""
        tensors = (
            *(logits, batch.row_offsets, batch.slots, batch.steps, batch.num_frames, batch.seeds),
            *(batch.guidance, batch.guidance_beta, batch.temperature, batch.top_k, batch.top_p),
            *(delays, sequences, out),
        )
        num_rows, num_codebooks, num_codes = logits.shape
        sizes = (
            *(batch.slots.shape[0], num_rows, sequences.shape[0], sequences.shape[2]),
            *(num_codebooks, num_codes),
        )
        pointers = tuple(tensor.data_ptr() for tensor in tensors)
        return functools.partial(self._sample, (pointers, sizes, torch.get_num_threads()), tensors)

    def _sample(self, arguments: tuple[tuple[int, ...], tuple[int, ...], int], _held: tuple[Tensor, ...]) -> None:
        """A sampling step given by addresses; `_held` keeps their tensors alive."""
        self.native.delayed_sample_step(*arguments)

    def linear(
        self,
        x: Tensor,
        weight: PackedLinear,
        bias: Tensor | None,
        gelu: bool,
        residual: Tensor | None,
        out: Tensor,
    ) -> None:
        """See `musicgen_kernels.linear.linear`."""
        if weight.order != "tiles":
            raise KernelArgumentError("weight", "order 'tiles'", repr(weight.order), "pack it for the CPU")
        check_tensor("x", x, x.shape, _FLOAT)
        check_tensor("out", out, out.shape, _FLOAT)
        self.native.linear(
            *packed_arguments(weight),
            *(x.data_ptr(), _address(bias), _address(residual), out.data_ptr()),
            *(x.shape[0], gelu, torch.get_num_threads()),
        )

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, out: Tensor
    ) -> None:
        """See `musicgen_kernels.norm.layer_norm`."""
        check_tensor("x", x, x.shape, _FLOAT)
        check_tensor("out", out, out.shape, _FLOAT)
        rows, dim = x.shape
        self.native.layer_norm(
            *(x.data_ptr(), weight.data_ptr(), bias.data_ptr(), _address(residual)),
            *(eps, rows, dim),
            *(out.data_ptr(), torch.get_num_threads()),
        )

    def embed_codes(self, codes: Tensor, tables: Tensor, positions: Tensor, sinusoids: Tensor, out: Tensor) -> None:
        """See `musicgen_kernels.norm.embed_codes`."""
        num_codebooks, num_entries, dim = tables.shape
        self.native.embed_codes(
            *(tables.data_ptr(), TABLE_DTYPES.index(tables.dtype), num_codebooks, num_entries - 1, dim),
            *(sinusoids.data_ptr(), sinusoids.shape[0], codes.data_ptr(), positions.data_ptr()),
            *(codes.shape[0], out.data_ptr(), torch.get_num_threads()),
        )

    def append_paged_kv(
        self,
        keys: Tensor,
        values: Tensor,
        cache: PagedKV,
        page_table: Tensor,
        query_offsets: Tensor,
        kv_lens: Tensor,
    ) -> None:
        """See `musicgen_kernels.attention.append_paged_kv`."""
        check_tensor("keys", keys, keys.shape, _FLOAT, contiguous=False)
        self.native.append_paged_kv(
            page_arguments(cache),
            row_arguments(page_table, query_offsets, kv_lens),
            *(keys.data_ptr(), keys.stride(0), keys.stride(1)),
            *(values.data_ptr(), values.stride(0), values.stride(1)),
            *(keys.shape[0], torch.get_num_threads()),
        )

    def paged_attention(
        self,
        query: Tensor,
        cache: PagedKV,
        page_table: Tensor,
        query_offsets: Tensor,
        kv_lens: Tensor,
        scale: float,
        out: Tensor,
    ) -> None:
        """See `musicgen_kernels.attention.paged_attention`."""
        self._attention(query, cache, (page_table, query_offsets, kv_lens), scale, out, causal=True)

    def cross_attention(
        self,
        query: Tensor,
        cache: PagedKV,
        page_table: Tensor,
        query_offsets: Tensor,
        kv_lens: Tensor,
        scale: float,
        out: Tensor,
    ) -> None:
        """See `musicgen_kernels.attention.cross_attention`."""
        self._attention(query, cache, (page_table, query_offsets, kv_lens), scale, out, causal=False)

    def _attention(
        self,
        query: Tensor,
        cache: PagedKV,
        rows: tuple[Tensor, Tensor, Tensor],
        scale: float,
        out: Tensor,
        *,
        causal: bool,
    ) -> None:
        check_tensor("query", query, query.shape, _FLOAT, contiguous=False)
        self.native.paged_attention(
            *(page_arguments(cache), row_arguments(*rows), causal),
            *(query.data_ptr(), query.stride(0), query.stride(1)),
            scale,
            *(out.data_ptr(), query.shape[0], torch.get_num_threads()),
        )


def page_arguments(cache: PagedKV | KVStore) -> tuple[int, ...]:
    """The compiled code's arguments for a layer's pages (for a store, the first layer's): addresses, dtype, sizes."""
    if cache.layout != "cpu":
        raise KernelArgumentError("cache.layout", "'cpu'", repr(cache.layout), "allocate it with new_kv_store")
    num_pages, num_heads, _, head_dim = cache.k.shape[-4:]
    if head_dim not in HEAD_DIMS:
        raise KernelArgumentError("head_dim", f"one of {HEAD_DIMS}", str(head_dim))
    scales = (_address(cache.k_scales), _address(cache.v_scales))
    kind = KV_DTYPES.index(cache.k.dtype)
    return (cache.k.data_ptr(), cache.v.data_ptr(), *scales, kind, num_pages, num_heads, head_dim)


def row_arguments(page_table: Tensor, query_offsets: Tensor, kv_lens: Tensor) -> tuple[int, ...]:
    """The compiled code's arguments for a ragged batch: addresses, number of rows, width of the table."""
    addresses = (page_table.data_ptr(), query_offsets.data_ptr(), kv_lens.data_ptr())
    return (*addresses, *page_table.shape)


def packed_arguments(weight: PackedLinear) -> tuple[int, int, int, int, int, int]:
    """The compiled code's arguments for a packed matrix: address, offset of the scales, kind, N, K, group."""
    kind = KINDS.index(weight.kind)
    size = (weight.out_features, weight.in_features, weight.group_len)
    return (weight.data.data_ptr(), weight.scales_offset, kind, *size)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@functools.cache
def load(level: str | None) -> CpuBackend:
    """The backend at a level; None: from the environment, or the best supported one.

    Raises:
        BackendUnavailableError: the level is not built or not supported.
    """
    return CpuBackend(*load_level(level))
