"""What runs a decoder's steps: the environment is heard, and what the one call cannot do the operations do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from musicgen_kernels import BackendUnavailableError, new_kv_store
from musicgen_kernels import whole_step as module
from musicgen_kernels.backend import ENVIRONMENT
from musicgen_kernels.cpu_step import CpuStep
from musicgen_kernels.step import step_by_operations
from musicgen_kernels.whole_step import StepByOperations, whole_step
from test_step import LAYERS, NUM_PAGES, make_batch, make_weights, stores, texts


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)


def test_the_one_call_at_the_level_that_is_asked_for(cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (None, "cpu", "delayed_sample_step=reference", cpu):
        if name is not None:
            monkeypatch.setenv(ENVIRONMENT, name)
        step = whole_step(make_weights("fp32"))
        assert isinstance(step, CpuStep)
    assert step.level == cpu.partition(":")[2]


@pytest.mark.parametrize("name", ["reference", "linear=reference", "cpu, paged_attention=cpu:baseline"])
def test_operations_where_the_environment_names_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, name)
    weights, batch, text = make_weights("int8"), make_batch(), texts()
    step = whole_step(weights)
    assert isinstance(step, StepByOperations)
    if name != "reference":
        return
    ours, oracle = stores(torch.float16), stores(torch.float16)
    step.write_cross(*text, ours[1])
    module.write_cross_by_operations(weights, *text, oracle[1], backend="reference")
    exact = step_by_operations(weights, batch, *oracle, backend="reference")
    assert torch.equal(step.run(batch, *ours), exact)


def test_what_is_asked_for_and_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "cpu:sse9")
    with pytest.raises(BackendUnavailableError, match="sse9"):
        whole_step(make_weights("fp32"))


def test_without_the_compiled_kernels_operations_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_built(*_: object, **__: object) -> None:
        raise BackendUnavailableError("cpu", "not built")

    monkeypatch.setattr(module, "CpuStep", not_built)
    assert isinstance(whole_step(make_weights("fp32")), StepByOperations)


def test_a_head_dim_that_is_not_compiled() -> None:
    weights = replace(make_weights("fp32", cross=False), num_heads=8)
    batch = replace(make_batch(prefix=False), cross_page_table=None, cross_lens=None)
    pages, others = (new_kv_store(LAYERS, NUM_PAGES, 8, 16, torch.float32) for _ in range(2))
    got = whole_step(weights).run(batch, pages)
    assert torch.equal(got, step_by_operations(weights, batch, others, backend="reference"))
