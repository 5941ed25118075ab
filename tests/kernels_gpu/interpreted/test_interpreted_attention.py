"""Triton's attention and append in the interpreter, run by `test_triton_interpreter.py`."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import attention_case, decode_steps, only_rows
from gpu_checks import attend, check_append, check_attention
from musicgen_kernels import KernelArgumentError, triton

F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
DTYPES = [(F32, F32), (F32, BF16), (F32, F16), (F32, I8), (BF16, BF16), (BF16, I8), (F16, F16), (F16, I8)]


@pytest.mark.parametrize(("query_dtype", "kv_dtype"), DTYPES)
def test_decode(query_dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    case = attention_case([1, 17, 64], [1, 1, 1], query_dtype=query_dtype, kv_dtype=kv_dtype)
    check_attention(triton, case, "cpu")


@pytest.mark.parametrize(("query_dtype", "kv_dtype"), DTYPES)
def test_prefill(query_dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    case = attention_case(
        [18, 5, 33], [18, 0, 2], query_dtype=query_dtype, kv_dtype=kv_dtype, shared_pages=1, strided=True
    )
    check_attention(triton, case, "cpu")


@pytest.mark.parametrize("length", [15, 16, 255, 256, 257, 300])
def test_lengths_around_pages_and_splits(length: int) -> None:
    check_attention(triton, attention_case([length], [1], heads=1, kv_dtype=F16, seed=length), "cpu")
    check_attention(triton, attention_case([length], [3], heads=1, kv_dtype=F16, seed=length), "cpu")


@pytest.mark.parametrize("kv_dtype", [F32, BF16, I8])
def test_prefill_is_decode_bit_for_bit(kv_dtype: torch.dtype) -> None:
    query_dtype = BF16 if kv_dtype == BF16 else F32
    case = attention_case([275, 19], [3, 17], heads=1, query_dtype=query_dtype, kv_dtype=kv_dtype)
    assert torch.equal(attend(triton, case, "cpu"), attend(triton, decode_steps(case), "cpu"))


def test_a_row_is_the_same_in_other_slots_and_pages() -> None:
    case = attention_case([40, 17, 70], [2, 1, 20], kv_dtype=I8)
    whole = attend(triton, case, "cpu")
    alone = attend(triton, only_rows(case, [2, 0], page_seed=5), "cpu")
    assert torch.equal(alone, torch.cat([whole[3:], whole[:2]]))


@pytest.mark.parametrize("dim", [32, 48])
def test_other_head_dims(dim: int) -> None:
    check_attention(triton, attention_case([20, 3], [1, 1], heads=3, dim=dim), "cpu")
    check_attention(triton, attention_case([20, 3], [4, 3], heads=3, dim=dim, kv_dtype=I8), "cpu")


def test_cross_attention_and_an_empty_text() -> None:
    case = attention_case([0, 21, 7], [1, 1, 1], kv_dtype=F16)
    got = check_attention(triton, case, "cpu", causal=False)
    assert not got[0].any()
    check_attention(triton, attention_case([0, 21], [2, 18], kv_dtype=F32), "cpu", causal=False)


@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES)
def test_append(dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    case = attention_case(
        [17, 5, 36], [3, 0, 20], heads=9, dim=48, query_dtype=dtype, kv_dtype=kv_dtype, filled=False,
        strided=True,
    )  # fmt: skip
    case.keys[0, 1] = 0.0
    check_append(triton, case, "cpu")


@pytest.mark.parametrize("kv_dtype", [F32, I8])
def test_a_row_that_is_not_there_writes_nothing(kv_dtype: torch.dtype) -> None:
    case = attention_case([0, 1, 3], [1, 1, 5], heads=3, kv_dtype=kv_dtype, filled=False)
    check_append(triton, case, "cpu")
    attend(triton, attention_case([0, 20], [1, 1], heads=3, kv_dtype=kv_dtype), "cpu")


def test_cpu_layout_and_float64_are_refused() -> None:
    case = attention_case([5], [1])
    cache = type(case.cache)(case.cache.k, case.cache.v, None, None, "cpu")
    with pytest.raises(KernelArgumentError, match="plain"):
        triton.paged_attention(case.query, cache, *case.arguments[1:], 1.0, case.query)
    with pytest.raises(KernelArgumentError, match="float64"):
        triton.append_paged_kv(case.keys.double(), case.values.double(), *case.arguments)
