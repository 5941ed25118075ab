"""The CUDA kernels, compiled for the host, against the oracle: the same sources and the same Python side as on
a GPU, every CUDA thread a fiber. What this cannot show: anything about time, and what only a GPU's compiler does.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import ModuleType

import gpu_host_build
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
from gpu_recording import recording
from musicgen_kernels import KernelArgumentError, KernelError, cuda, pack_linear
from musicgen_kernels.packing import KINDS, Kind

F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
FLOATS = (F32, BF16, F16)
PAIRS = [(q, kv) for q in FLOATS for kv in (F32, BF16, F16, I8)]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the kernels for the host")


@pytest.fixture(scope="module")
def host() -> ModuleType:
    return gpu_host_build.module()


@pytest.fixture(autouse=True)
def _recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With MGK_RECORD_CALLS every call goes to a file there too: `test_cuda_sanitizers` replays them."""
    folder = os.environ.get("MGK_RECORD_CALLS")
    if folder:
        monkeypatch.setattr(cuda, "_run", recording(cuda._run, Path(folder)))


@pytest.fixture(params=["forward", "reverse"])
def backend(host: ModuleType, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The CUDA backend over the host build, with blocks and threads in ascending, then in descending order."""
    monkeypatch.setattr(cuda, "native", lambda: host)
    monkeypatch.setenv("MGK_HOST_CUDA_ORDER", request.param)
    return cuda


@pytest.mark.parametrize(("query_dtype", "kv_dtype"), PAIRS)
def test_decode(backend: ModuleType, query_dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    case = attention_case([1, 17, 300], [1, 1, 1], query_dtype=query_dtype, kv_dtype=kv_dtype, strided=True)
    check_attention(backend, case, "cpu")


@pytest.mark.parametrize(("query_dtype", "kv_dtype"), PAIRS)
def test_prefill(backend: ModuleType, query_dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    case = attention_case(
        [18, 5, 0, 33, 270], [18, 0, 0, 2, 6], query_dtype=query_dtype, kv_dtype=kv_dtype, strided=True
    )
    check_attention(backend, case, "cpu")
    assert torch.equal(attend(backend, case, "cpu"), attend(backend, decode_steps(case), "cpu"))


@pytest.mark.parametrize("kv_dtype", [F32, F16, I8])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 255, 256, 257, 1770])
def test_lengths_around_pages_and_splits(backend: ModuleType, length: int, kv_dtype: torch.dtype) -> None:
    check_attention(backend, attention_case([length], [1], heads=1, kv_dtype=kv_dtype, seed=length), "cpu")


@pytest.mark.parametrize("rows", [2, 3, 7, 16, 40])
def test_many_rows_with_shared_pages(backend: ModuleType, rows: int) -> None:
    lens = [16 + 7 * i % 50 for i in range(rows)]
    new = [i % 3 for i in range(rows)]
    case = attention_case(lens, new, heads=1, kv_dtype=BF16, shared_pages=1)
    check_attention(backend, case, "cpu")
    check_attention(backend, attention_case(lens, [1] * rows, heads=1, kv_dtype=I8, shared_pages=1), "cpu")


@pytest.mark.parametrize("kv_dtype", [F32, I8])
def test_a_row_is_the_same_in_other_slots_and_pages(backend: ModuleType, kv_dtype: torch.dtype) -> None:
    case = attention_case([40, 17, 290], [2, 1, 5], kv_dtype=kv_dtype)
    whole = attend(backend, case, "cpu")
    alone = attend(backend, only_rows(case, [2, 0], page_seed=5), "cpu")
    assert torch.equal(alone, torch.cat([whole[3:], whole[:2]]))


@pytest.mark.parametrize("dim", cuda.HEAD_DIMS)
def test_head_dims(backend: ModuleType, dim: int) -> None:
    for kv_dtype in (F32, F16, I8):
        check_attention(backend, attention_case([20, 3], [1, 1], dim=dim, kv_dtype=kv_dtype), "cpu")
        check_attention(backend, attention_case([20, 3], [4, 3], dim=dim, kv_dtype=kv_dtype), "cpu")


def test_cross_attention_and_an_empty_text(backend: ModuleType) -> None:
    case = attention_case([0, 21, 7], [1, 1, 1], kv_dtype=F16)
    got = check_attention(backend, case, "cpu", causal=False)
    assert not got[0].any()
    check_attention(backend, attention_case([0, 261], [2, 9], kv_dtype=F32), "cpu", causal=False)


@pytest.mark.parametrize(("dtype", "kv_dtype"), PAIRS)
@pytest.mark.parametrize(("heads", "dim"), [(9, 48), (17, 64)])
def test_append(backend: ModuleType, dtype: torch.dtype, kv_dtype: torch.dtype, heads: int, dim: int) -> None:
    case = attention_case(
        [17, 5, 36], [3, 0, 20], heads=heads, dim=dim, query_dtype=dtype, kv_dtype=kv_dtype, filled=False,
        strided=dim == 48,
    )  # fmt: skip
    case.keys[0, 1] = 0.0
    check_append(backend, case, "cpu")


@pytest.mark.parametrize("kv_dtype", [F32, I8])
def test_a_row_that_is_not_there_writes_nothing(backend: ModuleType, kv_dtype: torch.dtype) -> None:
    """It reads no page either: the tables hold a number out of range there."""
    case = attention_case([0, 1, 3], [1, 1, 5], heads=3, kv_dtype=kv_dtype, filled=False)
    check_append(backend, case, "cpu")
    attend(backend, attention_case([0, 20], [1, 1], heads=3, kv_dtype=kv_dtype), "cpu")


def test_requests_without_rows_decide_the_special_token(backend: ModuleType) -> None:
    """In one slot, as a graph's requests that are not there do."""
    case = sampling_case([Request(seed=3), Request(rows=0, step=0, num_frames=0), Request(rows=0, step=0)], 61)
    case.batch.slots[2] = case.batch.slots[1]
    assert check_sampling(backend, case, "cpu")[1:].tolist() == [[61] * 4] * 2


def test_sampling_with_many_parameters_in_one_launch(backend: ModuleType) -> None:
    requests = [
        Request(rows=1, seed=5, top_k=7),
        Request(rows=2, seed=-6, top_p=0.8, temperature=0.7),
        Request(rows=3, seed=7, temperature=0.0),
        Request(rows=3, seed=8, top_k=50, temperature=1.3, guidance=1.5, beta=5.0),
        Request(rows=2, seed=9, top_k=3, top_p=0.3),
        Request(rows=2, seed=2**63 - 1),
        Request(step=0), Request(step=2), Request(step=33), Request(step=31), Request(step=9),
    ]  # fmt: skip
    for num_codes in (61, 300, 2048):
        case = sampling_case(requests, num_codes)
        case.sequences[case.batch.slots[10], 1, 9] = 11
        check_sampling(backend, case, "cpu")


@pytest.mark.parametrize(
    "parameters",
    [
        {"top_k": 1}, {"top_k": 2}, {"top_p": 0.5}, {"top_p": 1e-30}, {"top_p": 1.0}, {"top_k": 1000},
        {"temperature": 0.0}, {"temperature": 1e-6}, {"top_p": 0.37}, {},
    ],
)  # fmt: skip
def test_sampling_equal_logits(backend: ModuleType, parameters: dict[str, float]) -> None:
    requests = [Request(rows=1, seed=s, **parameters) for s in range(3)]  # type: ignore[arg-type]
    check_sampling(backend, sampling_case(requests, 8, logits=torch.zeros(3, 4, 8)), "cpu")


def test_sampling_ties_and_extremes(backend: ModuleType) -> None:
    logits = torch.randn(5, 4, 40, generator=torch.Generator().manual_seed(3)).mul(3).round()
    logits[1:3] *= 80 / logits[1:3].abs().max()
    logits[4, :, 1:] = -torch.inf
    requests = [
        Request(rows=1, seed=1, top_k=4), Request(rows=2, seed=2, top_p=0.9, guidance=1.0),
        Request(rows=1, top_k=5), Request(rows=1, top_p=1.0),
    ]  # fmt: skip
    check_sampling(backend, sampling_case(requests, 40, logits=logits), "cpu")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_linear(backend: ModuleType, kind: Kind, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(48, generator=generator)
    for in_features, group_len in ((160, 32), (1152, 96)):
        weight = torch.randn(48, in_features, generator=generator) / 8
        packed = pack_linear(weight, kind, order="rows", group_len=group_len)
        x = torch.randn(9, in_features, generator=generator).to(dtype)
        residual = torch.randn(9, 48, generator=generator).to(dtype)
        whole = check_linear(backend, x, packed, bias, True, residual, "cpu")
        check_linear(backend, x[:2], packed, None, False, None, "cpu")
        for out_dtype in FLOATS:
            check_linear(backend, x, packed, bias, True, residual.to(out_dtype), "cpu", out_dtype)
        rows = [8, 3]
        alone = run_linear(backend, x[rows], packed, bias, True, residual[rows], "cpu")
        assert torch.equal(alone, whole[rows])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [64, 100, 1536])
def test_layer_norm(backend: ModuleType, dim: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, dim, generator=torch.Generator().manual_seed(dim))
    for residual in (False, True):
        for out_dtype in FLOATS:
            check_layer_norm(backend, (x * 2 + 1).to(dtype), residual, "cpu", out_dtype)
    check_layer_norm(backend, x + 1000, False, "cpu")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [64, 602])
def test_embed_codes(backend: ModuleType, dim: int, dtype: torch.dtype) -> None:
    tables = torch.randn(4, 12, dim, generator=torch.Generator().manual_seed(dim)).to(dtype)
    check_embed(backend, tables, "cpu")


def test_what_the_kernels_cannot_do_is_refused(backend: ModuleType) -> None:
    case = attention_case([5], [1], dim=48)
    with pytest.raises(KernelArgumentError, match="head_dim"):
        backend.paged_attention(case.query, *case.arguments, 1.0, case.query)
    with pytest.raises(KernelArgumentError, match="float64"):
        backend.append_paged_kv(case.keys.double(), case.values.double(), *case.arguments)
    packed = pack_linear(torch.ones(16, 32), "int8", order="rows")
    with pytest.raises(KernelArgumentError, match="aligned to 16 bytes"):
        backend.linear(torch.ones(33)[1:].view(1, 32), packed, None, False, None, torch.ones(1, 16))


def test_a_refused_launch_is_a_kernel_error(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "HEAD_DIMS", (48,))
    case = attention_case([5], [1], dim=48)
    with pytest.raises(KernelError, match="head_dim is none of"):
        backend.paged_attention(case.query, *case.arguments, 1.0, torch.empty_like(case.query))


def test_a_weight_row_beyond_32_bits_is_refused(host: ModuleType) -> None:
    sizes = [0, 16, 2**31, 0, 0, 0, 0, 0]
    with pytest.raises(host.LaunchError, match="inputs"):
        host.run("linear", [0] * 6, sizes, [], 0)


def test_an_extension_that_is_not_built_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "native", lambda: "not built")
    assert cuda.unavailable("linear", "cuda", F32) == "not built"
    with pytest.raises(KernelError, match="not built"):
        cuda.embed_codes(*[torch.zeros(1, 4, 4)] * 5)


def test_what_the_backend_says_it_supports(backend: ModuleType) -> None:
    assert backend.unavailable("paged_attention", "cpu", I8) is None
    assert "cpu tensors only" in str(backend.unavailable("paged_attention", "cuda", I8))
    assert "no kernel for" in str(backend.unavailable("linear", "cpu", I8))
    assert "no kernel for" in str(backend.unavailable("delayed_sample_step", "cpu", BF16))
