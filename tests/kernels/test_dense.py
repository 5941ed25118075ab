"""Packed linears, layer norm and embedding: accuracy, refusal of wrong weights, rows that do not see each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import ROW_COUNTS, assert_as_good_as_torch, guarded, ints, normalised_mse
from musicgen_kernels import (
    KernelArgumentError,
    PackedLinear,
    embed_codes,
    layer_norm,
    linear,
    pack_linear,
    sinusoid_table,
    unpack_header,
)
from musicgen_kernels.packing import KINDS, ORDERS, Kind
from torch.nn import functional

# Normalised squared error of the packed weight for Gaussian weights, and of the product given the packed weight.
WEIGHT_NMSE = {"fp32": 0.0, "bf16": 4e-6, "int8": 1e-4, "int4": 1.2e-2}
PRODUCT_NMSE = {"fp32": 1e-12, "bf16": 1e-12, "int8": 1e-4, "int4": 1e-4}


@pytest.mark.parametrize("kind", KINDS)
def test_packing_keeps_the_weight(kind: Kind) -> None:
    weight = torch.randn(48, 256)
    packed = [pack_linear(weight, kind, order=order) for order in ORDERS]
    assert torch.equal(packed[0].dequantise(), packed[1].dequantise())
    assert normalised_mse(packed[0].dequantise(), weight) <= WEIGHT_NMSE[kind]
    for one in packed:
        assert unpack_header(one.data) == one


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_packing_of_extreme_weights(kind: Kind) -> None:
    weight = torch.zeros(16, 64)
    weight[0], weight[1, 5], weight[2, 7] = 3.0, 1e-30, -1e30
    weight[3] = torch.linspace(-1, 1, 64)
    got = pack_linear(weight, kind, group_len=32).dequantise()
    assert torch.isfinite(got).all()
    assert (got[4:] == 0).all()
    step = weight.view(16, 2, 32).abs().amax(-1, keepdim=True) / (127 if kind == "int8" else 7.9)
    assert ((got - weight).view(16, 2, 32).abs() <= step * 1.02).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", ROW_COUNTS)
def test_linear_matrix(backend: str, kind: Kind, rows: int) -> None:
    weight = pack_linear(torch.randn(80, 1056) / 32, kind)
    x = torch.randn(rows, 1056)
    dense = weight.dequantise()
    exact = x.double() @ dense.double().T
    got = linear(x, weight, backend=backend)
    if kind in ("fp32", "bf16"):
        assert_as_good_as_torch(got, exact, x @ dense.T)
    else:
        assert normalised_mse(got, exact) < PRODUCT_NMSE[kind]


@pytest.mark.parametrize("group_len", [32, 64, 96, 192])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_every_group_length(cpu: str, kind: Kind, group_len: int) -> None:
    weight = pack_linear(torch.randn(16, 192), kind, group_len=group_len)
    x = torch.randn(3, 192)
    assert normalised_mse(linear(x, weight, backend=cpu), x.double() @ weight.dequantise().double().T) < 1e-4


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_extreme_products_do_not_overflow(cpu: str, kind: Kind) -> None:
    """All inputs and weights at the ends of their ranges: sums of 16-bit pairs must not saturate."""
    for sign in (-1.0, 1.0):
        weight = pack_linear(torch.full((16, 4096), sign), kind)
        x = torch.full((2, 4096), 5.0)
        assert torch.allclose(linear(x, weight, backend=cpu), torch.full((2, 16), sign * 5 * 4096), rtol=1e-2)
    alternating = torch.ones(16, 4096)
    alternating[:, ::2] = -1
    weight = pack_linear(alternating, kind)
    exact = alternating[:1].double() @ weight.dequantise().double().T
    assert torch.allclose(linear(alternating[:1], weight, backend=cpu).double(), exact, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_epilogues(backend: str, kind: Kind) -> None:
    weight = pack_linear(torch.randn(48, 64) / 8, kind)
    x, bias, residual = torch.randn(5, 64), torch.randn(48), torch.randn(5, 48)
    product = linear(x, weight, backend=backend)
    expected = residual + functional.gelu(product + bias)
    got = linear(x, weight, bias, activation="gelu", residual=residual, backend=backend)
    assert torch.allclose(got, expected, atol=1e-6, rtol=1e-5)
    in_place = residual.clone()
    linear(x, weight, bias, activation="gelu", residual=in_place, out=in_place, backend=backend)
    assert torch.equal(in_place, got)


def test_gelu_is_the_exact_one(cpu: str) -> None:
    x = torch.linspace(-12, 12, 32 * 257).view(257, 32).contiguous()
    weight = pack_linear(torch.eye(32), "fp32")
    got = linear(x, weight, activation="gelu", backend=cpu)
    assert_as_good_as_torch(got, functional.gelu(x.double()), functional.gelu(x))
    assert (got - functional.gelu(x.double())).abs().max() < 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_bits_in_any_batch(cpu: str, kind: Kind) -> None:
    weight = pack_linear(torch.randn(112, 544), kind)
    x, residual = torch.randn(23, 544), torch.randn(23, 112)
    together = linear(x, weight, activation="gelu", residual=residual, backend=cpu)
    for count in (1, 2, 3, 5, 8, 13):
        part = linear(
            x[4 : 4 + count].clone(), weight, activation="gelu", residual=residual[4 : 4 + count].clone(), backend=cpu
        )
        assert torch.equal(part, together[4 : 4 + count])


@pytest.mark.parametrize("kind", KINDS)
def test_linear_touches_nothing_past_its_ends(cpu: str, kind: Kind) -> None:
    packed = pack_linear(torch.randn(48, 96), kind)
    weight = replace(packed, data=guarded(packed.data))
    x, bias, residual = (guarded(torch.randn(*shape)) for shape in ((3, 96), (48,), (3, 48)))
    out = guarded(torch.empty(3, 48))
    linear(x, weight, bias, residual=residual, out=out, backend=cpu)
    assert torch.isfinite(out).all()


def test_wrong_weights_are_refused(cpu: str) -> None:
    packed = pack_linear(torch.randn(32, 64), "int8")
    x = torch.randn(2, 64)
    other = pack_linear(torch.randn(64, 32), "int8")
    spoiled = packed.data.clone()
    spoiled[0] = 0
    for weight, argument in (
        (replace(packed, out_features=48), "weight"),
        (replace(packed, kind="int4"), "weight"),
        (replace(packed, data=packed.data[:-1].clone()), "data"),
        (replace(packed, data=spoiled), "data"),
        (replace(packed, data=packed.data[:10].clone()), "data"),
        (pack_linear(torch.randn(32, 64), "int8", order="rows"), "weight"),
        (other, "x"),
    ):
        with pytest.raises(KernelArgumentError, match=argument):
            linear(x, weight, backend=cpu)
    with pytest.raises(KernelArgumentError, match="weight"):
        linear(x, torch.randn(32, 64), backend=cpu)  # type: ignore[arg-type]
    assert isinstance(packed, PackedLinear)


def test_weights_that_cannot_be_packed() -> None:
    bad = torch.randn(16, 32)
    bad[3, 3] = torch.inf
    for weight, kind, group in (
        (torch.randn(15, 32), "fp32", None),
        (torch.randn(16, 33), "fp32", None),
        (torch.randn(0, 32), "fp32", None),
        (torch.randn(16, 64), "int8", 48),
        (torch.randn(16, 64), "int3", None),
        (bad, "int8", None),
    ):
        with pytest.raises(KernelArgumentError):
            pack_linear(weight, kind, group_len=group)  # type: ignore[arg-type]


@pytest.mark.parametrize("dim", [1, 15, 16, 17, 64, 1030])
def test_layer_norm(backend: str, dim: int) -> None:
    x, residual = torch.randn(7, dim) * 3 + 100, torch.randn(7, dim)
    weight, bias = torch.randn(dim), torch.randn(dim)
    exact = functional.layer_norm(x.double(), (dim,), weight.double(), bias.double(), 1e-5)
    peer = functional.layer_norm(x, (dim,), weight, bias, 1e-5)
    assert_as_good_as_torch(layer_norm(x, weight, bias, backend=backend), exact, peer)
    held = residual.clone()
    got = layer_norm(x, weight, bias, residual=held, backend=backend)
    assert torch.equal(held, residual + x)
    assert torch.equal(got, layer_norm(held, weight, bias, backend=backend))
    for row in range(7):
        assert torch.equal(layer_norm(held[row : row + 1].clone(), weight, bias, backend=backend)[0], got[row])


def test_layer_norm_of_a_constant_row_is_its_bias(backend: str) -> None:
    bias = torch.randn(64)
    assert torch.allclose(layer_norm(torch.full((1, 64), 7.0), torch.ones(64), bias, backend=backend)[0], bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("codebooks", "dim"), [(4, 64), (8, 44), (1, 20)])
def test_embedding_equals_the_reference(cpu: str, dtype: torch.dtype, codebooks: int, dim: int) -> None:
    tables = torch.randn(codebooks, 33, dim).to(dtype)
    codes = torch.randint(0, 33, (9, codebooks), dtype=torch.int32)
    positions, sinusoids = torch.randint(0, 50, (9,), dtype=torch.int32), sinusoid_table(50, dim)
    got, expected = (embed_codes(codes, tables, positions, sinusoids, backend=name) for name in (cpu, "reference"))
    assert torch.equal(got, expected)


def test_sinusoids_follow_the_formula() -> None:
    table = sinusoid_table(1771, 64)
    for position, i in ((0, 0), (1, 0), (7, 5), (1770, 31)):
        phase = torch.tensor(position, dtype=torch.float64) / 10000.0 ** (i / 31)
        assert torch.allclose(table[position, i].double(), phase.cos(), atol=1e-7)
        assert torch.allclose(table[position, 32 + i].double(), phase.sin(), atol=1e-7)


def test_embedding_refuses_what_is_out_of_range(cpu: str) -> None:
    tables, sinusoids = torch.randn(4, 33, 32), sinusoid_table(10, 32)
    good = torch.zeros(1, 4, dtype=torch.int32)
    for codes, positions, argument in (
        (good + 33, ints(0), "codes"),
        (good - 1, ints(0), "codes"),
        (good, ints(10), "positions"),
        (good, ints(-1), "positions"),
        (good.long(), ints(0), "codes"),
        (good[:, :3], ints(0), "codes"),
    ):
        with pytest.raises(KernelArgumentError, match=argument):
            embed_codes(codes, tables, positions, sinusoids, backend=cpu)
