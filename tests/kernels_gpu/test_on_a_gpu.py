"""The case matrix on a real GPU, for the CUDA and the Triton kernels. Without a GPU it is skipped and says so:
what it would show is then unmeasured.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
from gpu_cases import Request, attention_case, decode_steps, only_rows, sampling_case
from gpu_checks import (
    attend,
    check_append,
    check_attention,
    check_embed,
    check_layer_norm,
    check_linear,
    check_sampling,
    run_linear,
)
from musicgen_kernels import SampleBatch, pack_linear
from musicgen_kernels.packing import KINDS, Kind

F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
FLOATS = (F32, BF16, F16)
PAIRS = [(q, kv) for q in FLOATS for kv in (F32, BF16, F16, I8)]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: kernels are not run on one here")


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> ModuleType:
    module = importlib.import_module(f"musicgen_kernels.{request.param}")
    if reason := module.unavailable("layer_norm", "cuda", torch.float32):
        pytest.skip(f"{request.param}: {reason}")
    return module


@pytest.mark.parametrize(("query_dtype", "kv_dtype"), PAIRS)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 255, 256, 257, 1770])
def test_decode(backend: ModuleType, length: int, query_dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    case = attention_case([length, 3, 40], [1, 1, 1], query_dtype=query_dtype, kv_dtype=kv_dtype, strided=True)
    check_attention(backend, case, "cuda")


@pytest.mark.parametrize(("query_dtype", "kv_dtype"), PAIRS)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16])
def test_prefill_and_its_bits(backend: ModuleType, rows: int, query_dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    lens = [17 + 61 * i for i in range(rows)]
    new = [(5 * i) % 18 for i in range(rows)]
    case = attention_case(lens, new, query_dtype=query_dtype, kv_dtype=kv_dtype, shared_pages=1)
    got = check_attention(backend, case, "cuda")
    assert torch.equal(got, attend(backend, decode_steps(case), "cuda"))
    alone = attend(backend, only_rows(case, [rows - 1], page_seed=3), "cuda")
    assert torch.equal(alone, got[sum(new[:-1]) :])


def test_cross_attention(backend: ModuleType) -> None:
    case = attention_case([0, 21, 300], [1, 1, 1], kv_dtype=F16)
    assert not check_attention(backend, case, "cuda", causal=False)[0].any()


@pytest.mark.parametrize(("dtype", "kv_dtype"), PAIRS)
def test_append(backend: ModuleType, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    case = attention_case([17, 5, 36], [3, 0, 20], heads=24, query_dtype=dtype, kv_dtype=kv_dtype, filled=False)
    check_append(backend, case, "cuda")


@pytest.mark.parametrize("num_codes", [61, 2048])
def test_sampling(backend: ModuleType, num_codes: int) -> None:
    requests = [
        Request(rows=1 + i % 3, seed=i, top_k=i % 4 * 20, top_p=(i % 5) / 5, temperature=(i % 7) / 3, step=i % 9)
        for i in range(32)
    ]
    check_sampling(backend, sampling_case(requests, num_codes), "cuda")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_linear_and_its_bits(backend: ModuleType, kind: Kind, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    packed = pack_linear(torch.randn(192, 1024, generator=generator) / 16, kind, order="rows")
    x = torch.randn(67, 1024, generator=generator).to(dtype)
    bias, residual = torch.randn(192, generator=generator), torch.randn(67, 192, generator=generator).to(dtype)
    whole = check_linear(backend, x, packed, bias, True, residual, "cuda")
    for rows in ([66], [3, 40, 0]):
        alone = run_linear(backend, x[rows], packed, bias, True, residual[rows], "cuda")
        assert torch.equal(alone, whole[rows])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [100, 1024, 1536])
def test_layer_norm_and_embedding(backend: ModuleType, dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(dim)
    x = torch.randn(7, dim, generator=generator)
    for residual in (False, True):
        check_layer_norm(backend, (x * 2 + 1).to(dtype), residual, "cuda")
    check_embed(backend, torch.randn(4, 12, dim, generator=generator).to(dtype), "cuda")


def test_a_graph_captures_decode_and_sampling(backend: ModuleType) -> None:
    """Replayed with other lengths and logits in place, a captured step gives what an eager one gives."""
    attention = attention_case([40, 300], [1, 1], query_dtype=BF16, kv_dtype=I8).to("cuda")
    sampling = sampling_case([Request(seed=1, top_k=50), Request(seed=2, top_p=0.9)], 2048).to("cuda")
    out = torch.empty_like(attention.query)
    codes = torch.empty(2, 4, dtype=torch.int32, device="cuda")

    def step() -> None:
        backend.paged_attention(attention.query, *attention.arguments, 0.125, out)
        batch: SampleBatch = sampling.batch
        backend.delayed_sample_step(sampling.logits, batch, sampling.delays, sampling.sequences, codes)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    attention.kv_lens.copy_(torch.tensor([17, 290], dtype=torch.int32))
    sampling.logits.neg_()
    sampling.sequences.fill_(-1)
    graph.replay()
    replayed, replayed_codes = out.clone(), codes.clone()
    sampling.sequences.fill_(-1)
    step()
    assert torch.equal(replayed, out)
    assert torch.equal(replayed_codes, codes)
