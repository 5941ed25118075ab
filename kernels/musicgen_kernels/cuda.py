"""The CUDA backend: passes addresses and sizes of tensors to the compiled kernels.

Everything runs on PyTorch's current stream of the tensors' device without synchronising, and decode attention
allocates its workspace through PyTorch, so a CUDA graph can capture any of these calls. Values (pages, lengths, codes)
are not checked; the caller must ensure that they are valid.

The extension `_cuda` is optional; without it this backend reports itself as unavailable. The extension states the
device its kernels run on: tests load a host build of the same sources.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import KernelArgumentError, KernelError
from .gpu import too_old
from .packing import KINDS, PackedLinear
from .pages import PAGE_LEN, SPLIT_LEN, PagedKV

if TYPE_CHECKING:
    from .sampling import SampleBatch

_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)  # the order of `Type` in csrc/cuda/launch.h
_FLOATS = _TYPES[:3]
_DTYPES = {"append_paged_kv": _TYPES, "paged_attention": _TYPES, "cross_attention": _TYPES}
_ATTENTION = ("paged_attention", "cross_attention")
HEAD_DIMS = (32, 64, 128)
MAX_CODES = MAX_DIM = 12000


@functools.cache
def native() -> Any:
    """The compiled module, or the reason why there is none."""
    try:
        return importlib.import_module(f"{__package__}._cuda")
    except ImportError as error:
        return f"the CUDA kernels are not built ({error}); install with MUSICGEN_KERNELS_CUDA=1 and nvcc on PATH"


def unavailable(operation: str, device: str, dtype: torch.dtype, head_dim: int | None = None) -> str | None:
    """Why this backend cannot run the operation on that device, dtype and head dim; None if it can."""
    module = native()
    if isinstance(module, str):
        return module
    device_type = device.partition(":")[0]
    if device_type != module.device_type:
        return f"runs on {module.device_type} tensors only"
    if dtype not in _DTYPES.get(operation, _FLOATS if operation != "delayed_sample_step" else _FLOATS[:1]):
        return f"has no kernel for {dtype}"
    if operation in _ATTENTION and head_dim not in (None, *HEAD_DIMS):
        return f"has no kernel for head_dim {head_dim}, only for {HEAD_DIMS}"
    return too_old(device) if device_type == "cuda" else None


def append_paged_kv(
    keys: Tensor, values: Tensor, cache: PagedKV, page_table: Tensor, query_offsets: Tensor, kv_lens: Tensor
) -> None:
    """See `musicgen_kernels.attention.append_paged_kv`."""
    strides = (keys.stride(0), keys.stride(1), values.stride(0), values.stride(1))
    tensors, sizes = _paged("keys", keys, cache, page_table, query_offsets, kv_lens)
    _run("append_paged_kv", (keys, values, *tensors), (*sizes, _float_type("keys", keys), *strides))


def paged_attention(
    query: Tensor,
    cache: PagedKV,
    page_table: Tensor,
    query_offsets: Tensor,
    kv_lens: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    """See `musicgen_kernels.attention.paged_attention`."""
    _attention(query, cache, page_table, query_offsets, kv_lens, scale, out, True)


def cross_attention(
    query: Tensor,
    cache: PagedKV,
    page_table: Tensor,
    query_offsets: Tensor,
    kv_lens: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    """See `musicgen_kernels.attention.cross_attention`."""
    _attention(query, cache, page_table, query_offsets, kv_lens, scale, out, False)


def delayed_sample_step(logits: Tensor, batch: SampleBatch, delays: Tensor, sequences: Tensor, out: Tensor) -> None:
    """See `musicgen_kernels.sampling.delayed_sample_step`; at most MAX_CODES codes."""
    _float_type("logits", logits)
    num_codebooks, num_codes = logits.shape[1:]
    if num_codes > MAX_CODES:
        raise KernelArgumentError("logits", f"at most {MAX_CODES} codes", str(num_codes), "use backend='triton'")
    requests = (batch.row_offsets, batch.slots, batch.steps, batch.num_frames, batch.seeds, batch.guidance)
    filters = (batch.guidance_beta, batch.temperature, batch.top_k, batch.top_p)
    sizes = (batch.slots.shape[0], num_codebooks, num_codes, sequences.shape[2])
    _run("delayed_sample_step", (logits, *requests, *filters, delays, sequences, out), sizes)


def linear(
    x: Tensor, weight: PackedLinear, bias: Tensor | None, gelu: bool, residual: Tensor | None, out: Tensor
) -> None:
    """See `musicgen_kernels.linear.linear`; optimised for the few rows of a decode step."""
    if weight.order != "rows":
        raise KernelArgumentError("weight.order", "'rows' on GPU backends", repr(weight.order), "pack it in that order")
    if x.data_ptr() % 16:
        raise KernelArgumentError("x", "an address aligned to 16 bytes", f"{x.data_ptr():#x}", "copy the tensor")
    scales = weight.scales if weight.group_len else None
    sizes = (x.shape[0], weight.out_features, weight.in_features, weight.group_len)
    kinds = (_float_type("x", x), _float_type("out", out), KINDS.index(weight.kind), int(gelu))
    _run("linear", (x, weight.codes, scales, bias, residual, out), (*sizes, *kinds))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, out: Tensor) -> None:
    """See `musicgen_kernels.norm.layer_norm`; at most MAX_DIM elements per row."""
    if x.shape[1] > MAX_DIM:
        got = str(x.shape[1])
        raise KernelArgumentError("x", f"at most {MAX_DIM} elements per row", got, "use backend='triton'")
    types = (_float_type("x", x), _float_type("out", out))
    _run("layer_norm", (x, weight, bias, residual, out), (*x.shape, *types), (eps,))


def embed_codes(codes: Tensor, tables: Tensor, positions: Tensor, sinusoids: Tensor, out: Tensor) -> None:
    """See `musicgen_kernels.norm.embed_codes`."""
    sizes = (codes.shape[0], *tables.shape, _float_type("tables", tables))
    _run("embed_codes", (codes, tables, positions, sinusoids, out), sizes)


def _attention(
    query: Tensor,
    cache: PagedKV,
    page_table: Tensor,
    query_offsets: Tensor,
    kv_lens: Tensor,
    scale: float,
    out: Tensor,
    causal: bool,
) -> None:
    num_tokens, num_heads, dim = query.shape
    num_rows, max_pages = page_table.shape
    if dim not in HEAD_DIMS:
        raise KernelArgumentError("query", f"a head_dim of {HEAD_DIMS}", str(dim), "use backend='triton'")
    tensors, sizes = _paged("query", query, cache, page_table, query_offsets, kv_lens)
    states = sums = None
    num_splits = -(-max_pages * PAGE_LEN // SPLIT_LEN)
    if num_tokens <= num_rows:  # decode: splits in parallel
        shape = (num_tokens, num_heads, num_splits)
        states = torch.empty(*shape, 2, dtype=torch.float32, device=query.device)
        sums = torch.empty(*shape, dim, dtype=torch.float32, device=query.device)
    sizes += (_float_type("query", query), query.stride(0), query.stride(1), num_splits, int(causal))
    _run("paged_attention", (query, out, states, sums, *tensors), sizes, (scale,))


def _paged(
    name: str, tokens: Tensor, cache: PagedKV, page_table: Tensor, query_offsets: Tensor, kv_lens: Tensor
) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """The tensors and sizes common to both paged operations."""
    if cache.layout != "plain":
        raise KernelArgumentError("cache.layout", "'plain' on GPU backends", repr(cache.layout))
    tensors = (cache.k, cache.v, cache.k_scales, cache.v_scales, page_table, query_offsets, kv_lens)
    return tensors, (_TYPES.index(cache.k.dtype), *page_table.shape, *tokens.shape)


def _float_type(name: str, tensor: Tensor) -> int:
    """The kernels' number for a floating-point dtype."""
    if tensor.dtype not in _FLOATS:
        raise KernelArgumentError(name, "float32, bfloat16 or float16", str(tensor.dtype), "use the reference")
    return _TYPES.index(tensor.dtype)


def _run(
    operation: str, tensors: Sequence[Tensor | None], integers: Sequence[int], reals: Sequence[float] = ()
) -> None:
    """Enqueue an operation on the current stream of the first tensor's device.

    Raises:
        KernelError: the kernels are not built, or CUDA rejected the launch.
    """
    module = native()
    if isinstance(module, str):
        raise KernelError(module)
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    first = tensors[0]
    assert first is not None
    on_gpu = first.device.type == "cuda"
    elsewhere = on_gpu and first.device.index != torch.cuda.current_device()
    with torch.cuda.device(first.device) if elsewhere else contextlib.nullcontext():
        stream = torch.cuda.current_stream().cuda_stream if on_gpu else 0
        try:
            module.run(operation, addresses, integers, reals, stream)
        except module.LaunchError as error:
            raise KernelError(f"the CUDA launch failed: {error}") from error
