"""Every shipped GPU kernel compiles, without spills, and costs what `resources.json` says.

Quick: the combinations a 16-bit model uses, for two architectures. `slow`: everything for all six. To accept a
change: `python tests/kernels_gpu/gpu_resources.py --update`.
"""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("triton", reason="Triton is not installed; its wheel also brings the tools that read cubins")

import gpu_nvcc
import gpu_resources

QUICK_ARCHITECTURES = [80, 90]
_UPDATE = "\nif that is meant: python tests/kernels_gpu/gpu_resources.py --update"


def _hold(backend: str, architectures: list[int], quick: bool) -> None:
    rows = gpu_resources.measure([backend], architectures, 2, quick)[backend]
    lines = gpu_resources.compare(backend, rows, complete=False)
    assert not lines, "\n".join(lines) + _UPDATE


def _skip_without_nvcc(architectures: list[int]) -> None:
    for architecture in architectures:
        if reason := gpu_nvcc.missing(architecture):
            pytest.skip(reason)


def test_triton_kernels_of_a_16_bit_model() -> None:
    _hold("triton", QUICK_ARCHITECTURES, quick=True)


def test_cuda_kernels() -> None:
    _skip_without_nvcc(QUICK_ARCHITECTURES)
    _hold("cuda", QUICK_ARCHITECTURES, quick=True)


@pytest.mark.slow
def test_triton_kernels_for_all_architectures() -> None:
    """All combinations compile without spills; what the table does not hold is not compared."""
    rows = gpu_resources.measure(["triton"], list(gpu_resources.ARCHITECTURES), 2)["triton"]
    known = gpu_resources.load()["triton"]["kernels"]
    held = {
        kernel: {arch: row for arch, row in by_arch.items() if arch in known.get(kernel, {})}
        for kernel, by_arch in rows.items()
        if kernel in known
    }
    lines = gpu_resources.violations(rows) + gpu_resources.compare("triton", held, complete=False)
    assert not lines, "\n".join(lines) + _UPDATE


@pytest.mark.slow
def test_cuda_kernels_for_all_architectures() -> None:
    _skip_without_nvcc(list(gpu_resources.ARCHITECTURES))
    _hold("cuda", list(gpu_resources.ARCHITECTURES), quick=False)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_table_is_whole(backend: str) -> None:
    """Every row has all architectures, no spills, and kernels that stream weights or pages load 16 bytes."""
    table = gpu_resources.load()[backend]["kernels"]
    wanted = {f"sm_{arch}" for arch in gpu_resources.ARCHITECTURES}
    streaming = ("decode", "prefill", "linear", "_split<")
    for kernel, by_arch in table.items():
        assert set(by_arch) >= wanted, kernel
        for row in by_arch.values():
            assert row["spill_bytes"] == 0, kernel
            if any(word in kernel for word in streaming) and "merge_splits" not in kernel:
                assert row["widest_load_bits"] >= 128, kernel


def test_a_difference_is_told() -> None:
    old = {"kernel": {"sm_80": {"registers": 40, "spill_bytes": 0, "shared_bytes": 0, "widest_load_bits": 128}}}
    new = copy.deepcopy(old)
    assert not gpu_resources.differences(old, new, complete=True)
    new["kernel"]["sm_80"]["widest_load_bits"] = 32
    new["kernel"]["sm_80"]["spill_bytes"] = 8
    lines = gpu_resources.differences(old, new, complete=True)
    assert len(lines) == 2
    assert "widest_load_bits 128 → 32; the narrower" in lines[1]
    assert gpu_resources.violations(new) == ["kernel sm_80: 8 bytes spilled"]
    assert gpu_resources.differences(old, {}, complete=True) == ["kernel: in the table, not compiled any more"]
    assert gpu_resources.differences({}, old, complete=True) == ["kernel: new, not in the table"]
