"""Fixtures of the kernel tests: every backend of this machine, every instruction-set level of the CPU's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from musicgen_kernels import BackendUnavailableError
from musicgen_kernels.isa import LEVELS, load_level

CPU_BACKENDS = [f"cpu:{level}" for level in LEVELS]


def require(backend: str) -> str:
    """The backend's name; skips, saying why, where it cannot run."""
    if backend.startswith("cpu"):
        try:
            load_level(backend.partition(":")[2] or None)
        except BackendUnavailableError as error:
            pytest.skip(str(error))
    return backend


@pytest.fixture(params=CPU_BACKENDS)
def cpu(request: pytest.FixtureRequest) -> str:
    """A level of the CPU backend."""
    return require(request.param)


@pytest.fixture(params=["reference", *CPU_BACKENDS])
def backend(request: pytest.FixtureRequest) -> str:
    """The reference, or a level of the CPU backend."""
    return require(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1234)
