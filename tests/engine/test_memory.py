"""The pages of an engine: within its budget, or a share of what is free on its own device."""

from __future__ import annotations

import pytest
import torch
from engine.fakes import CONFIG
from musicgen_kernels import page_bytes

from musicgen.config import CacheConfig, EngineConfig, SchedulerConfig
from musicgen.engine.memory import max_row_len, new_pages, num_pages
from musicgen.errors import InvalidRequestError

SIZE = page_bytes(1, 1, 1, torch.float16)


def config(cache: CacheConfig, **scheduler: int) -> EngineConfig:
    return EngineConfig(cache, SchedulerConfig(**scheduler), "bfloat16").resolved("cuda")


def test_a_share_of_what_is_free_on_the_engines_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cuda:0": 40 * SIZE, "cuda:1": 80 * SIZE}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free[str(device or "cuda:0")], 0))
    half = config(CacheConfig(memory_share=0.5), max_rows=100)
    assert num_pages(CONFIG, half, torch.device("cuda:1")) == 40
    assert num_pages(CONFIG, half, torch.device("cuda:0")) == 20


def test_not_more_than_rows_can_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (2**40, 0))
    few = config(CacheConfig(), max_rows=3)
    assert num_pages(CONFIG, few, torch.device("cuda:1")) == 3 * max_row_len(CONFIG) // 16


def test_a_budget_is_kept_and_one_without_a_page_refused() -> None:
    cpu = torch.device("cpu")
    assert num_pages(CONFIG, config(CacheConfig(memory_bytes=5 * SIZE + 1)), cpu) == 5
    with pytest.raises(InvalidRequestError, match="one page"):
        num_pages(CONFIG, config(CacheConfig(memory_bytes=SIZE - 1)), cpu)


def test_a_page_more_for_rows_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    monkeypatch.setattr("musicgen.engine.memory.new_kv_store", lambda *sizes, device: shapes.append(sizes[:4]))
    for graphs in (True, False):
        new_pages(CONFIG, EngineConfig(cuda_graphs=graphs).resolved("cpu"), 7, torch.device("cpu"))
    assert shapes == [(1, 8, 1, 1), (1, 7, 1, 1)]
