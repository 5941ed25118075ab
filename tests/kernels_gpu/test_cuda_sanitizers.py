"""The CUDA kernels on the host under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer; and that
these catch what they are for: kernels broken on purpose are found.

Calls are recorded through the ordinary build, then replayed by a program under the sanitizer, where every buffer
is an allocation of its exact size. `slow`: the whole matrix.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gpu_host_build
import pytest
import torch
from gpu_cases import AttentionCase, Request, attention_case, sampling_case
from gpu_checks import attend, check_append, check_embed, check_layer_norm, check_linear, check_sampling
from gpu_recording import recording
from musicgen_kernels import cuda, pack_linear
from musicgen_kernels.packing import KINDS

F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
Record = Callable[[Callable[[], object]], list[Path]]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the kernels for the host")


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    """Runs something over the ordinary host build and gives the recorded calls."""
    host = gpu_host_build.module()

    def run(something: Callable[[], object]) -> list[Path]:
        folder = tmp_path / "calls"
        folder.mkdir()
        monkeypatch.setattr(cuda, "native", lambda: host)
        monkeypatch.setattr(cuda, "_run", recording(cuda._run, folder))
        something()
        return sorted(folder.iterdir())

    return run


def _replay(program: Path, files: list[Path], order: str = "forward") -> subprocess.CompletedProcess[str]:
    options = {
        "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
        "MGK_HOST_CUDA_ORDER": order,
    }
    # Sanitizers of older compilers cannot live with the widest address randomisation.
    still = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []
    command = [*still, str(program), *map(str, files)]
    return subprocess.run(command, env={**os.environ, **options}, capture_output=True, text=True)


def _attention(**options: object) -> None:
    for kv_dtype in (F32, F16, I8):
        dtype = F32 if kv_dtype == F32 else BF16
        for new in ([1, 1, 1], [18, 0, 2]):
            case = attention_case([275, 1, 33], new, query_dtype=dtype, kv_dtype=kv_dtype, strided=True)
            attend(cuda, case, "cpu")
    attend(cuda, attention_case([0, 20], [1, 1], heads=1), "cpu", causal=False)


def _append() -> None:
    for dtype, kv_dtype, dim in ((F32, F32, 64), (BF16, I8, 48), (F16, BF16, 64), (F32, I8, 64)):
        case = attention_case(
            [17, 5, 36], [3, 0, 20], heads=9, dim=dim, query_dtype=dtype, kv_dtype=kv_dtype, filled=False,
            strided=dim == 48,
        )  # fmt: skip
        check_append(cuda, case, "cpu")


_REQUESTS = [
    Request(rows=1, seed=5, top_k=7), Request(rows=2, seed=-6, top_p=0.8), Request(rows=3, temperature=0.0),
    Request(rows=3, seed=8), Request(step=0),
]  # fmt: skip


def _sampling() -> None:
    for num_codes in (61, 1200):
        check_sampling(cuda, sampling_case(_REQUESTS, num_codes, codebooks=2), "cpu")


def _dense() -> None:
    generator = torch.Generator().manual_seed(1)
    for dtype, dim in ((F32, 100), (F32, 192), (BF16, 192), (F16, 100)):
        x = torch.randn(3, dim, generator=generator).to(dtype)
        check_layer_norm(cuda, x, True, "cpu")
        check_embed(cuda, torch.randn(4, 12, dim, generator=generator).to(dtype), "cpu")
    for kind in KINDS:
        for dtype in (F32, BF16, F16):
            packed = pack_linear(torch.randn(16, 1056, generator=generator) / 8, kind, order="rows", group_len=32)
            x, residual = torch.randn(5, 1056).to(dtype), torch.randn(5, 16).to(dtype)
            check_linear(cuda, x, packed, torch.randn(16), True, residual, "cpu")


_CALLS = {"attention": _attention, "append": _append, "sampling": _sampling, "dense": _dense}


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("calls", sorted(_CALLS))
def test_kernels_are_clean(record: Record, sanitizer: str, calls: str) -> None:
    files = record(_CALLS[calls])
    program = gpu_host_build.build(sanitizer)
    for order in ("forward", "reverse"):
        done = _replay(program, files, order)
        assert done.returncode == 0, done.stderr[:4000]
        assert f"{len(files)} recordings replayed" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_the_whole_matrix_is_clean(sanitizer: str, tmp_path: Path) -> None:
    """All that `test_cuda_on_host` runs; minutes."""
    environment = {**os.environ, "MGK_RECORD_CALLS": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    matrix = str(Path(__file__).parent / "test_cuda_on_host.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "forward", matrix]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    files = sorted(tmp_path.iterdir())
    assert len(files) > 200
    done = _replay(gpu_host_build.build(sanitizer), files)
    assert done.returncode == 0, done.stderr[:4000]
    assert f"{len(files)} recordings replayed" in done.stdout


def _decode_case() -> AttentionCase:
    return attention_case([20, 33], [1, 1], heads=1)


BARRIERS = {
    "attention, before the states of warps are merged": (
        "attention.cu", "    __syncthreads();\n    State<1> total;", "    State<1> total;", "attention"
    ),
    "attention, before the scratch is used again": (
        "attention.cu", "    __syncthreads();  // before the scratch is used again\n", "", "attention"
    ),
    "reductions": ("device.h", "        __syncthreads();\n        T total = cells[0];", "        T total = cells[0];",
                   "dense"),
    "sampling, before z is scaled": ("sampling.cu", "    __syncthreads();  // another thread's z", "    // z",
                                     "sampling"),
    "sampling, before neighbours are read": ("sampling.cu", "    __syncthreads();  // below a thread", "    // below",
                                             "sampling"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(BARRIERS))
def test_a_removed_barrier_is_caught(record: Record, name: str) -> None:
    source, old, new, calls = BARRIERS[name]
    program = gpu_host_build.build("thread", mutation=(source, old, new))
    done = _replay(program, record(_CALLS[calls]))
    assert done.returncode == 66
    assert "data race" in done.stderr


def test_a_page_out_of_bounds_is_caught(record: Record) -> None:
    case = _decode_case()
    outside = case.page_table.clone()
    outside[1, 2] = case.cache.k.shape[0]
    files = record(lambda: attend(cuda, case, "cpu"))
    text = files[0].read_bytes()
    old, new = case.page_table.numpy().tobytes(), outside.numpy().tobytes()
    assert text.count(old) == 2
    files[0].write_bytes(text.replace(old, new))
    done = _replay(gpu_host_build.build("address"), files)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


def test_a_store_past_the_end_is_caught(record: Record) -> None:
    old = "    if (threadIdx.x < D) a.sums[at * D + threadIdx.x] = total.o[0];"
    mutation = ("attention.cu", old, old.replace("threadIdx.x < D", "threadIdx.x <= D"))
    done = _replay(
        gpu_host_build.build("address", mutation=mutation), record(lambda: attend(cuda, _decode_case(), "cpu"))
    )
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


def test_a_misaligned_load_is_caught(record: Record) -> None:
    mutation = ("norm.cu", "wide = wide && aligned16(p);", "(void)p;")
    x = torch.randn(2 * 64 + 1)[1:].view(2, 64)

    def norm() -> None:
        cuda.layer_norm(x, torch.ones(64), torch.zeros(64), None, 1e-5, torch.empty(2, 64))

    files = record(norm)
    assert _replay(gpu_host_build.build("address"), files).returncode == 0
    done = _replay(gpu_host_build.build("address", mutation=mutation), files)
    assert done.returncode != 0
    assert "misaligned address" in done.stderr


def test_a_copy_that_is_not_waited_for_is_caught(record: Record) -> None:
    mutation = ("attention.cu", "wait_copies<kStages - 1>();", "wait_copies<kStages>();")
    done = _replay(gpu_host_build.build("none", mutation=mutation), record(lambda: attend(cuda, _decode_case(), "cpu")))
    assert done.returncode == 1
    assert "other bits" in done.stderr


def test_a_barrier_that_not_all_reach_is_caught(record: Record) -> None:
    mutation = (
        "attention.cu",
        "    __syncthreads();\n    State<1> total;",
        "    if (lane) __syncthreads();\n    State<1> total;",
    )
    done = _replay(gpu_host_build.build("none", mutation=mutation), record(lambda: attend(cuda, _decode_case(), "cpu")))
    assert done.returncode != 0
    assert "others never reach" in done.stderr


def test_two_blocks_that_write_the_same_memory_are_caught(record: Record) -> None:
    old = "    const int64_t at = (token * a.rows.num_heads + head) * dim + threadIdx.x;"
    mutation = ("attention.cu", old, old.replace("* dim +", "* (dim / 2) +"))
    case = replace(attention_case([20, 33], [1, 1], heads=2))
    done = _replay(gpu_host_build.build("thread", mutation=mutation), record(lambda: attend(cuda, case, "cpu")))
    assert done.returncode == 66
    assert "data race" in done.stderr
