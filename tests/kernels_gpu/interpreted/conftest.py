"""These tests run only in the process that `test_triton_interpreter.py` starts; elsewhere they are not collected."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
