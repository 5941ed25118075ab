"""What a compiled step leaves alone: Python's lock while it runs, and the allocator once it has run."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from musicgen_kernels.cpu_step import CpuStep
from test_step import CODEBOOKS, CODES, LENS, make_batch, make_weights, part, stores, texts

COUNTER = Path(__file__).with_name("malloc_counter.c")


def test_python_runs_while_a_step_does(cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread gets on although nobody takes the lock from the one that steps."""
    step, batch, (pages, cross) = CpuStep(make_weights("fp32"), backend=cpu), make_batch(), stores(torch.float32)
    step.write_cross(*texts(), cross)
    out = step.run(batch, pages, cross)
    call = step.prepare(batch, pages, cross, out=out)
    ticks, done = [0], threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks[0] += 1
            time.sleep(0)

    ticker, before = threading.Thread(target=tick), sys.getswitchinterval()
    ticker.start()
    sys.setswitchinterval(60)
    try:
        for _ in range(500):  # on a busy machine a step may be over before the other thread has had its turn
            seen = ticks[0]
            call()
            if ticks[0] > seen:
                return
    finally:
        sys.setswitchinterval(before)
        done.set()
        ticker.join()
    pytest.fail("the lock was held in all of 500 steps")


def test_a_step_allocates_nothing_once_it_has_run(cpu: str, tmp_path: Path) -> None:
    """But for what Python does with the arguments of the call, which the numbers of layers and rows do not change."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no cc to compile what counts allocations")
    counter = tmp_path / "counter.so"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-fno-builtin", "-o", counter, COUNTER], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(counter), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, __file__, cpu], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *later = map(int, done.stdout.split())
    assert first > 2
    assert max(later) <= 2


def _count(backend: str) -> None:
    """Prints the allocations of each of several steps, the longest one first."""
    allocations = ctypes.CDLL(None).allocations
    allocations.restype = ctypes.c_long
    step, batch, (pages, cross) = CpuStep(make_weights("int4"), backend=backend), make_batch(), stores(torch.int8)
    decode = part(batch, [(row, length - 1, length) for row, length in enumerate(LENS)])
    alone = part(batch, [(2, 0, 1)])
    for each in (batch, decode, decode, batch, alone, decode):
        out = torch.empty(each.logit_tokens.shape[0], CODEBOOKS, CODES)
        call = step.prepare(each, pages, cross, out=out, num_threads=2)
        before = allocations()
        call()
        print(allocations() - before)


if __name__ == "__main__":
    _count(sys.argv[1])
