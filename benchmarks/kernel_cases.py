"""The cases of the kernel benchmark: for each, a closure to time, its bytes, operations and errors.

A case cycles through enough copies of its data that none of it stays in a cache between two calls on the same copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import musicgen_kernels as kernels
import torch
from musicgen_kernels.isa import zero_bytes
from musicgen_kernels.packing import KINDS, Kind
from torch import Tensor

WORKING_SET = {"cpu": 96 << 20, "cuda": 512 << 20}
SQUARES = "max_error is the normalised mean square"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


@dataclass(frozen=True, slots=True)
class Target:
    """Where a case runs.

    Attributes:
        backend: name of a backend.
        device: "cpu" or "cuda".
        dtype: of the activations.
    """

    backend: str
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @property
    def activations(self) -> str:
        """Name of the dtype."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    @property
    def matrix_peak(self) -> str:
        """The arithmetic peak that applies to matrix products of this dtype."""
        return "fp32" if self.dtype == torch.float32 else "16-bit"


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table.

    Attributes:
        op, backend: the operation and its backend.
        weights, activations, kv: dtype names, "-" if not applicable.
        rows, length, heads: sizes; 0 if not applicable.
        run: does the work `calls` times, each time on different data.
        calls: calls in one `run`.
        num_bytes: read and written by one call, each byte counted once.
        operations: multiplications and additions of one call.
        peak: the arithmetic peak that is the bound: "fp32", "int8" or "16-bit".
        errors: returns (largest error, ratio to PyTorch's in the same dtype) against float64, or (NMSE, NaN).
        peer: the same work in PyTorch, or None.
        note: additional information.
        error_note: explains the result of `errors` if it is not a numeric error; may contain `{error}`.
    """

    op: str
    backend: str
    weights: str
    activations: str
    kv: str
    rows: int
    length: int
    heads: int
    run: Callable[[], None]
    calls: int
    num_bytes: int
    operations: int
    peak: str
    errors: Callable[[], tuple[float, float]]
    peer: Callable[[], None] | None = None
    note: str = ""
    error_note: str = ""


def _errors(result: Tensor, exact: Tensor, torch_result: Tensor | None) -> tuple[float, float]:
    if torch_result is None:
        square = (result.double() - exact).square().sum() / exact.square().sum()
        return square.item(), float("nan")
    error = (result.double() - exact).abs().max().item()
    peer = (torch_result.double() - exact).abs().max().item()
    return error, error / peer if peer else float("nan")


def attention_case(target: Target, kv: str, rows: int, length: int, heads: int) -> Case:
    """Decode attention: one query per row over `length` positions in shuffled pages."""
    backend, device = target.backend, target.device
    per_row, dtype = (length + 15) // 16, DTYPES[kv]
    layer_bytes = kernels.page_bytes(1, heads, 64, dtype) * per_row * rows
    layers = max(2, WORKING_SET[device] // layer_bytes)
    store = kernels.new_kv_store(layers, per_row * rows, heads, 64, dtype, device=device)
    table = torch.randperm(per_row * rows).to(device, torch.int32).view(rows, per_row)
    offsets = torch.arange(rows + 1, dtype=torch.int32, device=device)
    lens = torch.full((rows,), length, dtype=torch.int32, device=device)
    keys, values = torch.randn(2, rows * length, heads, 64).to(device, target.dtype).unbind(0)
    views = [store.layer(i) for i in range(layers)]
    for view in views:
        kernels.append_paged_kv(keys, values, view, table, offsets * length, lens, backend=backend)
    query = torch.randn(rows, heads, 64).to(device, target.dtype)
    out = torch.empty_like(query)

    def run() -> None:
        for view in views:
            kernels.paged_attention(query, view, table, offsets, lens, out=out, backend=backend)

    def errors() -> tuple[float, float]:
        rows_of = (views[0], table, offsets, lens)
        got = kernels.paged_attention(query, *rows_of, backend=backend)
        exact = kernels.paged_attention(query.double(), *rows_of, backend="reference")
        rounded = kernels.paged_attention(query, *rows_of, backend="reference")
        return _errors(got, exact, None if dtype == torch.int8 else rounded)

    return Case(
        op="paged_attention", backend=backend, weights="-", activations=target.activations, kv=kv, rows=rows,
        length=length, heads=heads, run=run, calls=layers,
        num_bytes=layer_bytes * length // (16 * per_row) + 2 * query.nbytes,
        operations=4 * rows * length * heads * 64, peak="fp32", errors=errors,
        error_note=SQUARES if kv == "int8" else "",
    )  # fmt: skip


def linear_case(target: Target, kind: Kind, rows: int, n: int, k: int) -> Case:
    """x [rows, k] times packed weights [n, k]."""
    backend, device = target.backend, target.device
    one = kernels.pack_linear((torch.randn(n, k) / k**0.5).to(device), kind)
    copies = max(2, WORKING_SET[device] // one.data.nbytes)
    weights = [kernels.unpack_header(_placed(one.data)) for _ in range(copies)]
    x = torch.randn(rows, k).to(device, target.dtype)
    out = torch.empty(rows, n, dtype=x.dtype, device=device)
    on_8_bits = backend.startswith("cpu") and kind in ("int8", "int4")

    def run() -> None:
        for weight in weights:
            kernels.linear(x, weight, out=out, backend=backend)

    def errors() -> tuple[float, float]:
        got, dense = kernels.linear(x, one, backend=backend), one.dequantise()
        exact = x.double() @ dense.double().T
        return _errors(got, exact, x @ dense.to(x.dtype).T if kind in ("fp32", "bf16") else None)

    return Case(
        op="linear", backend=backend, weights=kind, activations=target.activations, kv="-", rows=rows, length=0,
        heads=0, run=run, calls=len(weights), num_bytes=one.data.nbytes + x.nbytes + out.nbytes,
        operations=2 * rows * n * k, peak="int8" if on_8_bits else target.matrix_peak, errors=errors, note=f"{n}x{k}",
        error_note=SQUARES if kind in ("int8", "int4") else "",
    )  # fmt: skip


def _placed(data: Tensor) -> Tensor:
    return data.clone() if data.is_cuda else zero_bytes(data.nbytes).copy_(data)


def sampling_case(target: Target, requests: int, codebooks: int, num_codes: int) -> Case:
    """Guidance over two rows per request, top-k 250, sampling and write-back; the peer is the same in PyTorch."""
    backend, device = target.backend, target.device
    logits = (torch.randn(2 * requests, codebooks, num_codes) * 3).to(device)
    sequences = torch.empty(requests, codebooks, 16, dtype=torch.int32, device=device)
    delays = torch.arange(codebooks, dtype=torch.int32, device=device)

    def full(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((requests,), value, dtype=dtype, device=device)

    batch = kernels.SampleBatch(
        torch.arange(requests + 1, dtype=torch.int32, device=device) * 2,
        torch.arange(requests, dtype=torch.int32, device=device),
        *(full(10, torch.int32), full(100, torch.int32), torch.arange(requests, device=device)),
        *(full(3.0, torch.float32), full(0.0, torch.float32), full(1.0, torch.float32)),
        *(full(250, torch.int32), full(0.0, torch.float32)),
    )

    def run() -> None:
        sequences.fill_(kernels.UNKNOWN_CODE)
        kernels.delayed_sample_step(logits, batch, delays, sequences, backend=backend)

    def composite() -> None:
        pairs = logits.view(requests, 2, codebooks, num_codes)
        mixed = pairs[:, 1] + 3.0 * (pairs[:, 0] - pairs[:, 1])
        probabilities = mixed.softmax(-1)
        kept = probabilities.topk(250, dim=-1).values[..., -1:]
        probabilities = torch.where(probabilities >= kept, probabilities, 0.0)
        drawn = torch.multinomial(probabilities.flatten(0, 1), 1).view(requests, codebooks)
        frames = 9 - delays
        sequences[:, :, 10] = torch.where((frames >= 0) & (frames < 100), drawn.int(), num_codes)

    def errors() -> tuple[float, float]:
        held = [torch.full_like(sequences, kernels.UNKNOWN_CODE) for _ in range(2)]
        ours = kernels.delayed_sample_step(logits, batch, delays, held[0], backend=backend)
        theirs = kernels.delayed_sample_step(logits, batch, delays, held[1], backend="reference")
        return float((ours != theirs).sum().item()), float("nan")

    return Case(
        op="delayed_sample_step", backend=backend, weights="-", activations="fp32", kv="-", rows=2 * requests,
        length=num_codes, heads=codebooks, run=run, calls=1, num_bytes=logits.nbytes,
        operations=0, peak="fp32", errors=errors, peer=composite,
        error_note=f"{{error:.0f}} of {requests * codebooks} codes differ from the reference's",
    )  # fmt: skip


def kinds_of(names: str) -> list[Kind]:
    """The weight kinds in a comma-separated list."""
    wanted = names.split(",")
    return [kind for kind in KINDS if kind in wanted]
