"""What the GPU backends say of devices they cannot use; no GPU is needed, its answers are faked."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from gpu_cases import attention_case
from musicgen_kernels import (
    BackendUnavailableError,
    backend,
    cross_attention,
    cuda,
    gpu,
    paged_attention,
    reference,
    triton,
)


@pytest.fixture(autouse=True)
def _nothing_is_remembered() -> Iterator[None]:
    """No choice outlives the test whose fakes it depends on."""
    backend.choose.cache_clear()
    yield
    backend.choose.cache_clear()


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
    assert backend.choose("layer_norm", "cuda:1", torch.float32, None).backend == "triton"
    assert backend.choose("layer_norm", "cuda:0", torch.float32, None).backend == "reference"
    assert [backend.implementation("linear", torch.device("cuda", i), torch.float32, None) for i in (0, 1)] == [
        reference.linear,
        triton.linear,
    ]


def test_other_devices_and_dtypes_are_refused() -> None:
    assert "cuda tensors only" in str(triton.unavailable("layer_norm", "cpu", torch.float32))
    assert "no kernel for" in str(triton.unavailable("layer_norm", "cuda", torch.float64))


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What loads under each backend's name, to be filled by the test."""
    modules: dict[str, object] = {}
    monkeypatch.setattr(backend, "_load", lambda name: modules.get(name, "not built"))
    return modules


def _everything() -> object:
    functions = dict.fromkeys(backend.OPERATIONS, print)
    return SimpleNamespace(**functions, unavailable=lambda operation, device, dtype, head_dim: None)


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
    only_float32.unavailable = lambda operation, device, dtype, head_dim: (  # type: ignore[attr-defined]
        None if operation != "delayed_sample_step" or dtype == torch.float32 else f"has no kernel for {dtype}"
    )
    offered.update(cuda=only_float32, reference=_everything())
    chosen = {choice.operation: choice.backend for choice in backend.report("cuda", torch.bfloat16)}
    assert chosen["delayed_sample_step"] == "cuda"


@pytest.mark.parametrize(
    ("head_dim", "attention"), [(32, "cuda"), (64, "cuda"), (128, "cuda"), (48, "triton"), (96, "triton")]
)
def test_a_head_dim_that_cuda_lacks_is_for_triton(
    monkeypatch: pytest.MonkeyPatch, head_dim: int, attention: str
) -> None:
    _pretend(monkeypatch, (9, 0))
    monkeypatch.setattr(cuda, "native", lambda: SimpleNamespace(device_type="cuda"))
    choices = {choice.operation: choice for choice in backend.report("cuda", torch.float16, head_dim)}
    for operation in ("paged_attention", "cross_attention"):
        assert choices[operation].backend == attention
        assert attention == "cuda" or f"not cuda: has no kernel for head_dim {head_dim}" in choices[operation].reason
    assert choices["append_paged_kv"].backend == "cuda"
    with pytest.raises(BackendUnavailableError, match="head_dim 48"):
        backend.choose("paged_attention", "cuda", torch.float16, "cuda", 48)


def test_attention_of_such_a_head_dim_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public operation asks for the head dim of its query; the host build has none for 48."""
    monkeypatch.setattr(cuda, "native", lambda: SimpleNamespace(device_type="cpu"))
    monkeypatch.setattr(backend, "_PREFERENCE", {"cpu": ("cuda", "reference")})
    case = attention_case([5], [1], dim=48)
    expected = torch.empty_like(case.query)
    reference.paged_attention(case.query, *case.arguments, 48**-0.5, expected)
    assert torch.equal(paged_attention(case.query, *case.arguments), expected)
    reference.cross_attention(case.query, *case.arguments, 48**-0.5, expected)
    assert torch.equal(cross_attention(case.query, *case.arguments), expected)


def test_a_gpu_without_kernels_is_a_fallback_unless_it_was_asked_for(
    offered: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    offered.update(reference=_everything())
    monkeypatch.setenv(backend.ENVIRONMENT, "layer_norm=reference")
    choices = {choice.operation: choice.reason for choice in backend.fallbacks("cuda", 64)}
    assert set(choices) == set(backend.OPERATIONS) - {"layer_norm"}
    assert choices["paged_attention"] == "not cuda: not built; not triton: not built"
    offered.update(triton=_everything())
    backend.choose.cache_clear()
    assert not backend.fallbacks("cuda", 64)
