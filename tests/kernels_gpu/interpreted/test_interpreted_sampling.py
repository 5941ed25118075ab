"""Triton's sampling step in the interpreter, run by `test_triton_interpreter.py`."""

from __future__ import annotations

import pytest
import torch
import triton as compiler
import triton.language as tl
from gpu_cases import Request, SamplingCase, sampling_case
from gpu_checks import check_sampling
from musicgen_kernels import reference, triton
from musicgen_kernels.triton.sampling import uniforms


@compiler.jit
def _store_uniforms(seeds, steps, out, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out + index, uniforms(tl.load(seeds), tl.load(steps), tl.load(steps + 1), index))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF])
def test_uniforms_are_the_oracle_bit_for_bit(seed: int) -> None:
    out = torch.empty(64)
    _store_uniforms[(1,)](torch.tensor([seed]), torch.tensor([1511, 3], dtype=torch.int32), out, BLOCK=64)
    assert torch.equal(out, reference.uniforms(seed, 1511, 3, 64))


def test_many_parameters_in_one_launch() -> None:
    requests = [
        Request(rows=1, seed=5, top_k=7),
        Request(rows=2, seed=-6, top_p=0.8, temperature=0.7),
        Request(rows=3, seed=7, temperature=0.0),
        Request(rows=3, seed=8, top_k=50, temperature=1.3, guidance=1.5, beta=5.0),
        Request(rows=2, seed=9, top_k=3, top_p=0.3),
        Request(rows=2, seed=10),
    ]
    check_sampling(triton, sampling_case(requests, 61), "cpu")


def test_delay_pattern_and_prompt() -> None:
    requests = [Request(step=0), Request(step=2), Request(step=33), Request(step=31), Request(step=9)]
    case = sampling_case(requests, 17)
    case.sequences[case.batch.slots[4], 1, 9] = 11
    got = check_sampling(triton, case, "cpu")
    assert got[0].tolist() == [17] * 4
    assert got[2].tolist()[:2] == [17, 17]
    assert got[4, 1] == 11


def test_requests_without_rows_decide_the_special_token() -> None:
    case = sampling_case([Request(seed=3), Request(rows=0, step=0, num_frames=0), Request(rows=0, step=0)], 17)
    case.batch.slots[2] = case.batch.slots[1]
    assert check_sampling(triton, case, "cpu")[1:].tolist() == [[17] * 4] * 2


def _equal_logits(num_codes: int, **parameters: float) -> SamplingCase:
    requests = [Request(rows=1, seed=s, **parameters) for s in range(3)]  # type: ignore[arg-type]
    return sampling_case(requests, num_codes, logits=torch.zeros(3, 4, num_codes))


@pytest.mark.parametrize(
    "parameters",
    [
        {"top_k": 1}, {"top_k": 2}, {"top_p": 0.5}, {"top_p": 1e-30}, {"top_p": 1.0}, {"top_k": 1000},
        {"temperature": 0.0}, {"temperature": 1e-6},
    ],
)  # fmt: skip
def test_equal_logits(parameters: dict[str, float]) -> None:
    check_sampling(triton, _equal_logits(8, **parameters), "cpu")


def test_ties_at_the_kth_and_extreme_logits() -> None:
    logits = torch.randn(4, 4, 20, generator=torch.Generator().manual_seed(3)).mul(3).round()
    logits[1:3] *= 80 / logits[1:3].abs().max()
    requests = [Request(rows=1, seed=1, top_k=4), Request(rows=2, seed=2, top_p=0.9, guidance=1.0)]
    check_sampling(triton, sampling_case([*requests, Request(rows=1, top_k=5)], 20, logits=logits), "cpu")


def test_minus_infinity_is_never_drawn() -> None:
    logits = torch.full((1, 4, 9), -torch.inf)
    logits[:, :, 5] = 1.0
    for parameters in ({}, {"top_k": 3}, {"top_p": 1.0}):
        case = sampling_case([Request(rows=1, **parameters)], 9, logits=logits)
        assert check_sampling(triton, case, "cpu").tolist() == [[5] * 4]


def test_the_real_vocabulary() -> None:
    requests = [Request(rows=2, seed=3, top_k=250), Request(rows=1, seed=4, top_p=0.9)]
    check_sampling(triton, sampling_case(requests, 2048, codebooks=1), "cpu")
