"""What the GPU backends say of devices they cannot use; no GPU is needed, its answers are faked."""

from __future__ import annotations

import pytest
import torch
from musicgen_kernels import gpu, triton


def _pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_a_gpu_before_ampere_is_refused(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    _pretend(monkeypatch, capability)
    assert "need 8.0" in str(gpu.too_old())
    assert "need 8.0" in str(triton.unavailable("layer_norm", "cuda", torch.float32))


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_later_ones_are_taken(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    _pretend(monkeypatch, capability)
    assert gpu.too_old() is None
    assert triton.unavailable("layer_norm", "cuda", torch.float32) is None


def test_other_devices_and_dtypes_are_refused() -> None:
    assert "cuda tensors only" in str(triton.unavailable("layer_norm", "cpu", torch.float32))
    assert "no kernel for" in str(triton.unavailable("layer_norm", "cuda", torch.float64))
