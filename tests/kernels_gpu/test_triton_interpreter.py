"""The Triton kernels against the oracle in Triton's interpreter, which must be switched on before Triton is
imported: so in a process of its own, whose tests are in `interpreted/`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

_FOLDER = Path(__file__).parent / "interpreted"
_FILES = sorted(path.name for path in _FOLDER.glob("test_*.py"))


@pytest.mark.parametrize("name", _FILES)
def test_in_the_interpreter(name: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(_FOLDER / name)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
