"""Triton's linear, layer norm and embedding in the interpreter, run by `test_triton_interpreter.py`."""

from __future__ import annotations

import pytest
import torch
from gpu_checks import check_embed, check_layer_norm, check_linear, run_linear
from musicgen_kernels import KernelArgumentError, pack_linear, triton
from musicgen_kernels.packing import KINDS, Kind

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_linear(kind: Kind, dtype: torch.dtype) -> None:
    weight = pack_linear(_randn(48, 160, seed=1), kind, order="rows", group_len=32)
    x = _randn(17, 160, seed=2).to(dtype)
    residual = _randn(17, 48, seed=4).to(dtype)
    check_linear(triton, x, weight, _randn(48, seed=3), True, residual, "cpu")
    check_linear(triton, x[:2], weight, None, False, None, "cpu")
    for out_dtype in FLOATS:
        check_linear(triton, x[:2], weight, None, False, residual[:2].to(out_dtype), "cpu", out_dtype)


@pytest.mark.parametrize(("in_features", "group_len"), [(256, 128), (192, 96), (256, 64), (384, 32), (512, 256)])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_groups_and_blocks(kind: Kind, in_features: int, group_len: int) -> None:
    weight = pack_linear(_randn(16, in_features, seed=1), kind, order="rows", group_len=group_len)
    check_linear(triton, _randn(2, in_features), weight, None, False, None, "cpu")


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_int4_code_is_exact(dtype: torch.dtype) -> None:
    every = (torch.arange(16)[:, None] + 3 * torch.arange(32)) % 16 - 8.0  # each code in both halves of a byte; scale 1
    weight = pack_linear(every, "int4", order="rows", group_len=32)
    assert torch.equal(weight.dequantise(), every)
    got = run_linear(triton, torch.eye(32).to(dtype), weight, None, False, None, "cpu", torch.float32)
    assert torch.equal(got, every.T)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_in_any_batch(kind: Kind) -> None:
    weight = pack_linear(_randn(32, 128, seed=1), kind, order="rows")
    x, bias = _randn(19, 128).bfloat16(), _randn(32)
    whole = run_linear(triton, x, weight, bias, True, None, "cpu")
    for rows in ([18], [3, 17, 0]):
        assert torch.equal(run_linear(triton, x[rows], weight, bias, True, None, "cpu"), whole[rows])


def test_the_order_of_tiles_is_refused() -> None:
    weight = pack_linear(_randn(16, 32), "int8", order="tiles")
    with pytest.raises(KernelArgumentError, match="rows"):
        triton.linear(_randn(1, 32), weight, None, False, None, _randn(1, 16))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [64, 100, 1536])
@pytest.mark.parametrize("residual", [False, True])
def test_layer_norm(dim: int, dtype: torch.dtype, residual: bool) -> None:
    for out_dtype in FLOATS:
        check_layer_norm(triton, (_randn(3, dim) * 2 + 1).to(dtype), residual, "cpu", out_dtype)


def test_layer_norm_of_a_large_mean() -> None:
    check_layer_norm(triton, _randn(2, 256) + 1000, False, "cpu")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [64, 600])
def test_embed_codes(dim: int, dtype: torch.dtype) -> None:
    check_embed(triton, _randn(4, 12, dim).to(dtype), "cpu")
