"""Makes `deploy_files` importable, keeps the tests' settings free of this shell's, and bears Ray's own warnings."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Ray's modules, as they are imported
    from ray import serve  # noqa: F401


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MUSICGEN_")]:
        monkeypatch.delenv(name)
