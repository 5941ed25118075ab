"""Triton compiles no kernel again because a batch has another size; nothing is launched or compiled here."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from musicgen_kernels import PackedLinear, PagedKV, SampleBatch
from musicgen_kernels import triton as ops

F32, BF16, I8 = torch.float32, torch.bfloat16, torch.int8
HEADS, HEAD_DIM, CODEBOOKS, CODES = 2, 64, 4, 48
DIM = HEADS * HEAD_DIM

Launch = tuple[Any, tuple[Any, ...]]


def _meta(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    recorded: list[Launch] = []

    def launch(kernel: Any, grid: tuple[int, ...], near: torch.Tensor, *args: Any, **meta: Any) -> None:
        recorded.append((kernel, args))

    for name in ("append", "attention", "linear", "norm", "sampling"):
        monkeypatch.setattr(importlib.import_module(f"musicgen_kernels.triton.{name}"), "launch", launch)
    return recorded


def _step(num_rows: int, num_tokens: int, max_steps: int, max_pages: int) -> None:
    """All operations of a step of that size."""
    x = _meta(num_tokens, DIM, dtype=BF16)
    ops.linear(
        x, PackedLinear(_meta(64 + 2 * DIM * DIM, dtype=torch.uint8), "bf16", "rows", DIM, DIM, 0), None, False, x, x
    )
    ops.layer_norm(x, _meta(DIM, dtype=F32), _meta(DIM, dtype=F32), None, 1e-5, x)
    tables, sinusoids = _meta(CODEBOOKS, CODES + 1, DIM, dtype=F32), _meta(1900, DIM, dtype=F32)
    ops.embed_codes(
        _meta(num_tokens, CODEBOOKS), tables, _meta(num_tokens), sinusoids, _meta(num_tokens, DIM, dtype=F32)
    )
    pages, scales = _meta(40, HEADS, 16, HEAD_DIM, dtype=I8), _meta(40, HEADS, 16, dtype=F32)
    rows = (
        PagedKV(pages, pages, scales, scales, "plain"),
        _meta(num_rows, max_pages),
        _meta(num_rows + 1),
        _meta(num_rows),
    )
    query = _meta(num_tokens, 3, HEADS, HEAD_DIM, dtype=BF16)[:, 0]
    ops.append_paged_kv(query, query, *rows)
    ops.paged_attention(query, *rows, 0.125, query.contiguous())
    dtypes = [torch.int32] * 4 + [torch.int64] + [F32] * 3 + [torch.int32, F32]
    batch = SampleBatch(*(_meta(num_rows, dtype=dtype) for dtype in dtypes))
    codes = _meta(33, CODEBOOKS, max_steps)
    ops.delayed_sample_step(
        _meta(num_rows, CODEBOOKS, CODES, dtype=F32), batch, _meta(CODEBOOKS), codes, _meta(num_rows, CODEBOOKS)
    )


@pytest.mark.parametrize("tokens_a_row", [1, 40])
def test_whatever_changes_with_the_batch_is_not_specialised(launches: list[Launch], tokens_a_row: int) -> None:
    sizes = [(1, 1507), (3, 1504), (16, 3008)]
    for num_rows, max_steps in sizes:
        _step(num_rows, tokens_a_row * num_rows, max_steps, max_pages=111)
    count = len(launches) // len(sizes)
    changing = set()
    for i in range(count):
        calls = [launches[i + j * count] for j in range(len(sizes))]
        kernel = calls[0][0]
        names = [parameter.name for parameter in kernel.params]
        for parameter, values in zip(kernel.params, zip(*(args for _, args in calls), strict=True), strict=False):
            if isinstance(values[0], int) and len(set(values)) > 1:
                changing.add(parameter.name)
                assert parameter.do_not_specialize, f"{kernel.fn.__name__}: {parameter.name} of {names}"
    assert {"num_rows", "max_steps"} <= changing
