"""What a backend is held to: run a case through it and through the oracle, compare by the pass rule.

The rule: the largest error against float64 is at most twice that of PyTorch in the same dtype, plus 1e-5.
"""

from __future__ import annotations

import copy
from types import ModuleType

import torch
from gpu_cases import AttentionCase, SamplingCase, float64_case, plain_torch_attention
from musicgen_kernels import PackedLinear, reference, sinusoid_table
from torch import Tensor


def error(got: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; NaN counts as infinity."""
    difference = (got.double().cpu() - exact.double().cpu()).abs()
    return float(difference.nan_to_num(nan=torch.inf).max()) if difference.numel() else 0.0


def hold(got: Tensor, exact: Tensor, same_dtype: Tensor) -> None:
    """Fail unless the pass rule is met."""
    ours, plain = error(got, exact), error(same_dtype, exact)
    assert ours <= 2 * plain + 1e-5, f"error {ours:.3g}, PyTorch in the same dtype {plain:.3g}"


def attend(backend: ModuleType, case: AttentionCase, device: str, *, causal: bool = True) -> Tensor:
    """Run attention; the result starts as NaN, so that what is not written shows. On the CPU again."""
    moved = case.to(device)
    query = moved.query
    if not case.query.is_contiguous():
        query = torch.stack([query, query], dim=1)[:, 1]
    out = torch.full(moved.query.shape, torch.nan, dtype=query.dtype, device=device)
    run = backend.paged_attention if causal else backend.cross_attention
    run(query, *moved.arguments, query.shape[-1] ** -0.5, out)
    return out.cpu()


def check_attention(backend: ModuleType, case: AttentionCase, device: str, *, causal: bool = True) -> Tensor:
    """Hold attention to the oracle; the result, on the CPU."""
    got = attend(backend, case, device, causal=causal)
    exact = torch.zeros(case.query.shape, dtype=torch.float64)
    wide = float64_case(case)
    run = reference.paged_attention if causal else reference.cross_attention
    run(wide.query, *wide.arguments, case.query.shape[-1] ** -0.5, exact)
    hold(got, exact, plain_torch_attention(case, causal=causal))
    return got


def check_append(backend: ModuleType, case: AttentionCase, device: str) -> None:
    """Hold the pages to the oracle's, bit for bit, untouched slots included."""
    ours, oracle = case.to(device), case.to("cpu")
    keys, values = ours.keys, ours.values
    if not case.keys.is_contiguous():
        fused = torch.stack([keys, values], dim=1)
        keys, values = fused[:, 0], fused[:, 1]
    backend.append_paged_kv(keys, values, *ours.arguments)
    reference.append_paged_kv(oracle.keys, oracle.values, *oracle.arguments)
    for name in ("k", "v", "k_scales", "v_scales"):
        a, b = getattr(ours.cache, name), getattr(oracle.cache, name)
        if b is not None:
            same = torch.equal(_bits(a.cpu()), _bits(b))
            assert same, f"{name} differs in {int((_bits(a.cpu()) != _bits(b)).sum())} elements"


def _bits(t: Tensor) -> Tensor:
    return t.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[t.element_size()])


def check_sampling(backend: ModuleType, case: SamplingCase, device: str) -> Tensor:
    """Hold the codes and the sequences to the oracle's, exactly; the codes, on the CPU."""
    ours, oracle = case.to(device), copy.deepcopy(case)
    shape = (case.batch.slots.shape[0], case.logits.shape[1])
    got = torch.full(shape, -7, dtype=torch.int32, device=device)
    expected = torch.full(shape, -7, dtype=torch.int32)
    backend.delayed_sample_step(ours.logits, ours.batch, ours.delays, ours.sequences, got)
    reference.delayed_sample_step(oracle.logits, oracle.batch, oracle.delays, oracle.sequences, expected)
    assert got.cpu().tolist() == expected.tolist()
    assert torch.equal(ours.sequences.cpu(), oracle.sequences)
    return got.cpu()


def run_linear(
    backend: ModuleType,
    x: Tensor,
    weight: PackedLinear,
    bias: Tensor | None,
    gelu: bool,
    residual: Tensor | None,
    device: str,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The product by a backend, on the CPU again; None: in x's dtype."""

    def move(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(device)

    packed = PackedLinear(
        weight.data.to(device), weight.kind, weight.order, weight.out_features, weight.in_features,
        weight.group_len,
    )  # fmt: skip
    out = torch.full((x.shape[0], weight.out_features), torch.nan, dtype=out_dtype or x.dtype, device=device)
    backend.linear(x.to(device), packed, move(bias), gelu, move(residual), out)
    return out.cpu()


def check_linear(
    backend: ModuleType,
    x: Tensor,
    weight: PackedLinear,
    bias: Tensor | None,
    gelu: bool,
    residual: Tensor | None,
    device: str,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Hold a product to the oracle; the result, on the CPU."""
    got = run_linear(backend, x, weight, bias, gelu, residual, device, out_dtype)
    exact = torch.empty(got.shape, dtype=torch.float64)
    wide = [None if t is None else t.double() for t in (bias, residual)]
    reference.linear(x.double(), weight, wide[0], gelu, wide[1], exact)
    plain = x @ weight.dequantise().to(x.dtype).T
    if bias is not None:
        plain = plain + bias.to(x.dtype)
    if gelu:
        plain = torch.nn.functional.gelu(plain)
    if residual is not None:
        plain = plain + residual
    hold(got, exact, plain.to(got.dtype))
    return got


def check_layer_norm(
    backend: ModuleType, x: Tensor, with_residual: bool, device: str, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Hold a layer norm of x [M, dim] to the oracle; the result, on the CPU."""
    generator = torch.Generator().manual_seed(9)
    weight, bias = torch.randn(2, x.shape[1], generator=generator)
    before = torch.randn(x.shape, generator=generator) if with_residual else None
    ours = None if before is None else before.to(device, copy=True)
    out = torch.full(x.shape, torch.nan, dtype=out_dtype or x.dtype, device=device)
    backend.layer_norm(x.to(device), weight.to(device), bias.to(device), ours, 1e-5, out)
    exact = torch.empty(x.shape, dtype=torch.float64)
    wide = None if before is None else before.double()
    reference.layer_norm(x.double(), weight.double(), bias.double(), wide, 1e-5, exact)
    h = x if before is None else (before + x).to(x.dtype)
    plain = torch.nn.functional.layer_norm(h, (x.shape[1],), weight.to(x.dtype), bias.to(x.dtype))
    hold(out, exact, plain.to(out.dtype))
    if before is not None and ours is not None:
        assert torch.equal(ours.cpu(), before + x.float())
    return out.cpu()


def check_embed(backend: ModuleType, tables: Tensor, device: str) -> None:
    """Hold an embedding of 5 tokens by tables [K, V + 1, dim] to the oracle, bit for bit."""
    num_codebooks, num_entries, dim = tables.shape
    generator = torch.Generator().manual_seed(9)
    codes = torch.randint(num_entries, (5, num_codebooks), dtype=torch.int32, generator=generator)
    codes[0] = num_entries - 1
    positions = torch.tensor([0, 7, 7, 3, 19], dtype=torch.int32)
    sinusoids = sinusoid_table(20, dim)
    ours = torch.full((5, dim), torch.nan, device=device)
    expected = torch.empty(5, dim)
    moved = [t.to(device) for t in (codes, tables, positions, sinusoids)]
    backend.embed_codes(*moved, ours)
    reference.embed_codes(codes, tables, positions, sinusoids, expected)
    assert torch.equal(ours.cpu(), expected)
