"""Compiles the Triton kernels for any architecture on a machine without a GPU."""

from __future__ import annotations

import contextlib
import importlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import gpu_cubin
import torch
import triton
from musicgen_kernels import PackedLinear, PagedKV, SampleBatch
from musicgen_kernels.packing import DEFAULT_GROUP
from triton.backends.compiler import GPUTarget

F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
HEADS, DIM, HEAD_DIM, CODEBOOKS, CODES = 24, 1536, 64, 4, 2048
_NAMES = {F32: "fp32", BF16: "bf16", F16: "fp16", I8: "int8"}
_PAIRS = [(query, pages) for query in (F32, BF16, F16) for pages in (F32, BF16, F16, I8)]
_QUICK = ("paged_attention decode bf16 int8", "paged_attention prefill bf16 bf16", "append bf16 int8",
          "delayed_sample_step", "linear bf16 int4", "linear bf16 bf16 to fp32", "layer_norm fp32 to bf16",
          "embed_codes bf16")  # fmt: skip


def toolchain() -> str:
    """The compiler whose figures these are."""
    return f"triton {triton.__version__}"


def _meta(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _step(prefill: bool, query: torch.dtype, kv: torch.dtype) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """A fused projection's queries, and what follows them: 3 rows, room for 1770 positions."""
    num_rows, pages = 3, _meta(400, HEADS, 16, HEAD_DIM, dtype=kv)
    scales = _meta(400, HEADS, 16, dtype=F32) if kv == I8 else None
    fused = _meta(100 if prefill else num_rows, 3, HEADS, HEAD_DIM, dtype=query)
    metadata = (_meta(num_rows, 111), _meta(num_rows + 1), _meta(num_rows))
    return fused[:, 0], (PagedKV(pages, pages, scales, scales, "plain"), *metadata)


def _attend(ops: Any, prefill: bool, query_dtype: torch.dtype, kv: torch.dtype, causal: bool) -> None:
    query, rest = _step(prefill, query_dtype, kv)
    run = ops.paged_attention if causal else ops.cross_attention
    run(query, *rest, 0.125, query.contiguous())


def _append(ops: Any, dtype: torch.dtype, kv: torch.dtype) -> None:
    keys, rest = _step(True, dtype, kv)
    ops.append_paged_kv(keys, keys, *rest)


def _sample(ops: Any) -> None:
    dtypes = [torch.int32] * 4 + [torch.int64] + [F32] * 3 + [torch.int32, F32]
    batch = SampleBatch(*(_meta(5, dtype=d) for d in dtypes))
    ops.delayed_sample_step(
        _meta(9, CODEBOOKS, CODES, dtype=F32), batch, _meta(CODEBOOKS), _meta(7, CODEBOOKS, 1511),
        _meta(5, CODEBOOKS),
    )  # fmt: skip


def _linear(ops: Any, dtype: torch.dtype, kind: Any, out: torch.dtype, group_len: int | None = None) -> None:
    bits = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}[kind]
    group = DEFAULT_GROUP[kind] if group_len is None else group_len
    scales = 2 * DIM * (DIM // group) if group else 0
    data = _meta(64 + DIM * DIM * bits // 8 + scales, dtype=torch.uint8)
    x, y = _meta(6, DIM, dtype=dtype), _meta(6, DIM, dtype=out)
    weight = PackedLinear(data, kind, "rows", DIM, DIM, group)
    ops.linear(x, weight, _meta(DIM, dtype=F32), True, y, y)


def _layer_norm(ops: Any, dtype: torch.dtype, residual: bool, out: torch.dtype) -> None:
    x, parameter, y = _meta(6, DIM, dtype=dtype), _meta(DIM, dtype=F32), _meta(6, DIM, dtype=out)
    ops.layer_norm(x, parameter, parameter, _meta(6, DIM, dtype=F32) if residual else None, 1e-5, y)


def _embed(ops: Any, dtype: torch.dtype) -> None:
    tables = _meta(CODEBOOKS, CODES + 1, DIM, dtype=dtype)
    sinusoids = _meta(1900, DIM, dtype=F32)
    ops.embed_codes(_meta(6, CODEBOOKS), tables, _meta(6), sinusoids, _meta(6, DIM, dtype=F32))


def calls() -> dict[str, Callable[[Any], None]]:
    """Every combination that ships, as a call of the backend given."""
    result: dict[str, Callable[[Any], None]] = {"delayed_sample_step": _sample}
    for q, kv in _PAIRS:
        types = f"{_NAMES[q]} {_NAMES[kv]}"
        result[f"append {types}"] = lambda ops, q=q, kv=kv: _append(ops, q, kv)
        for prefill in (False, True):
            shape = "prefill" if prefill else "decode"
            for causal, op in ((True, "paged_attention"), (False, "cross_attention")):
                result[f"{op} {shape} {types}"] = lambda ops, a=(prefill, q, kv, causal): _attend(ops, *a)
    for dtype in (F32, BF16, F16):
        name = _NAMES[dtype]
        for kind in ("fp32", "bf16", "int8", "int4"):
            result[f"linear {name} {kind}"] = lambda ops, d=dtype, kind=kind: _linear(ops, d, kind, d)
            if dtype != F32:  # to the residual stream
                result[f"linear {name} {kind} to fp32"] = lambda ops, d=dtype, kind=kind: _linear(ops, d, kind, F32)
        result[f"layer_norm {name}"] = lambda ops, d=dtype: _layer_norm(ops, d, False, d)
        result[f"layer_norm {name} residual"] = lambda ops, d=dtype: _layer_norm(ops, d, True, d)
        if dtype != F32:  # from it
            result[f"layer_norm fp32 to {name}"] = lambda ops, d=dtype: _layer_norm(ops, F32, False, d)
        result[f"embed_codes {name}"] = lambda ops, d=dtype: _embed(ops, d)
        for kind, group in (("int8", 256), ("int4", 96)) if dtype != F32 else ():  # longer than the block of K
            result[f"linear {name} {kind} group {group}"] = lambda ops, a=(dtype, kind, dtype, group): _linear(ops, *a)
    result["linear bf16 bf16 to fp16"] = lambda ops: _linear(ops, BF16, "bf16", F16)  # queries, keys and values
    return result


def variants(quick: bool) -> list[str]:
    """The names of all combinations, or of those that every test run compiles."""
    return list(_QUICK if quick else calls())


class _Driver:
    """Stands in for the GPU: the device's number is its architecture."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


@contextlib.contextmanager
def _recording() -> Iterator[list[Any]]:
    """Launches compile only; the compiled kernels are listed."""
    compiled: list[Any] = []

    def launch(kernel: Any, grid: tuple[int, ...], near: torch.Tensor, *args: Any, **meta: Any) -> None:
        compiled.append((kernel.fn.__name__, kernel.warmup(*args, grid=grid, **meta)))

    with contextlib.ExitStack() as stack:
        for name in ("append", "attention", "linear", "norm", "sampling"):
            module = importlib.import_module(f"musicgen_kernels.triton.{name}")
            stack.enter_context(mock.patch.object(module, "launch", launch))
        yield compiled


def compile_variant(name: str, architecture: int) -> dict[str, dict[str, int]]:
    """Figures of the kernels that one combination launches."""
    from musicgen_kernels import triton as ops
    from triton.runtime import driver

    before = driver._active
    driver.set_active(_Driver(architecture))
    try:
        with _recording() as compiled:
            calls()[name](ops)
    finally:
        driver._active = before
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        for function, kernel in compiled:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(kernel.asm["cubin"])
            (row,) = gpu_cubin.read(path).values()
            row["shared_bytes"] = max(row["shared_bytes"], kernel.metadata.shared)
            result[f"{name}: {function.lstrip('_')}"] = row
    return result
