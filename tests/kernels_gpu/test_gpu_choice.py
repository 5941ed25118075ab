"""What the GPU backends say of devices they cannot use; no GPU is needed, its answers are faked."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from musicgen_kernels import backend, gpu, reference, triton


def _pretend(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    """GPUs of those capabilities; the first is the current one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capabilities[torch.device(device).index or 0]
    )


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_a_gpu_before_ampere_is_refused(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    _pretend(monkeypatch, capability)
    assert "need 8.0" in str(gpu.too_old("cuda"))
    assert "need 8.0" in str(triton.unavailable("layer_norm", "cuda", torch.float32))


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_later_ones_are_taken(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    _pretend(monkeypatch, capability)
    assert gpu.too_old("cuda") is None
    assert triton.unavailable("layer_norm", "cuda", torch.float32) is None


def test_each_gpu_is_asked_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, (7, 5), (9, 0))
    assert triton.unavailable("linear", "cuda:1", torch.float32) is None
    assert "7.5" in str(triton.unavailable("linear", "cuda:0", torch.float32))
    backend.choose.cache_clear()
    assert backend.choose("layer_norm", "cuda:1", torch.float32, None).backend == "triton"
    assert backend.choose("layer_norm", "cuda:0", torch.float32, None).backend == "reference"
    assert [backend.implementation("linear", torch.device("cuda", i), torch.float32, None) for i in (0, 1)] == [
        reference.linear,
        triton.linear,
    ]
    backend.choose.cache_clear()


def test_other_devices_and_dtypes_are_refused() -> None:
    assert "cuda tensors only" in str(triton.unavailable("layer_norm", "cpu", torch.float32))
    assert "no kernel for" in str(triton.unavailable("layer_norm", "cuda", torch.float64))


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """What loads under each backend's name, to be filled by the test; nothing chosen before is remembered."""
    modules: dict[str, object] = {}
    monkeypatch.setattr(backend, "_load", lambda name: modules.get(name, "not built"))
    backend.choose.cache_clear()
    yield modules
    backend.choose.cache_clear()


def _everything() -> object:
    functions = dict.fromkeys(backend.OPERATIONS, print)
    return SimpleNamespace(**functions, unavailable=lambda operation, device, dtype: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_triton_multiplies_and_cuda_does_the_rest(offered: dict[str, object], dtype: torch.dtype) -> None:
    offered.update(cuda=_everything(), triton=_everything(), reference=_everything())
    chosen = {choice.operation: choice.backend for choice in backend.report("cuda", dtype)}
    assert chosen.pop("linear") == "triton"
    assert set(chosen.values()) == {"cuda"}


@pytest.mark.parametrize("there", ["cuda", "triton"])
def test_what_is_missing_on_a_gpu_is_told(offered: dict[str, object], there: str) -> None:
    missing = "cuda" if there == "triton" else "triton"
    offered.update({there: _everything()})
    for choice in backend.report("cuda", torch.bfloat16):
        assert choice.backend == there
        preferred = backend.preference(choice.operation, "cuda")[0] == there
        assert choice.reason == ("default for this device" if preferred else f"not {missing}: not built")


def test_a_report_asks_for_a_sampler_of_float32_logits(offered: dict[str, object]) -> None:
    """What the engine samples from, whatever the dtype of the matrices."""
    only_float32 = _everything()
    only_float32.unavailable = lambda operation, device, dtype: (  # type: ignore[attr-defined]
        None if operation != "delayed_sample_step" or dtype == torch.float32 else f"has no kernel for {dtype}"
    )
    offered.update(cuda=only_float32, reference=_everything())
    chosen = {choice.operation: choice.backend for choice in backend.report("cuda", torch.bfloat16)}
    assert chosen["delayed_sample_step"] == "cuda"
