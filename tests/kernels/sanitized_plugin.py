"""pytest plugin: the tests of one level, on a library of it that was compiled with sanitizers.

    MGK_SANITIZED_LEVEL=avx2 MGK_SANITIZED_LIBRARY=….so python -m pytest -p sanitized_plugin tests/kernels

Only tests that take this level remain, so that none passes without having touched the library.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from importlib.util import module_from_spec

import pytest

LEVEL, LIBRARY = os.environ["MGK_SANITIZED_LEVEL"], os.environ["MGK_SANITIZED_LIBRARY"]


def pytest_configure(config: pytest.Config) -> None:
    """Put the library in the place of the shipped one."""
    import torch  # noqa: F401  # its OpenMP runtime comes first

    name = f"_cpu_{LEVEL}"
    loader = ExtensionFileLoader(name, LIBRARY)
    module = module_from_spec(ModuleSpec(name, loader, origin=LIBRARY))
    loader.exec_module(module)
    sys.modules[f"musicgen_kernels.{name}"] = module


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests of the level."""

    def takes(item: pytest.Item) -> bool:
        spec = getattr(item, "callspec", None)
        return spec is not None and f"cpu:{LEVEL}" in spec.params.values()

    config.hook.pytest_deselected(items=[item for item in items if not takes(item)])
    items[:] = [item for item in items if takes(item)]
