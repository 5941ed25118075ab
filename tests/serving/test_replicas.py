"""Processes of replicas: what computes steps back, what answers does not."""

from __future__ import annotations

import json
import subprocess
import sys

SCRIPT = """
import asyncio, json, os, threading
from musicgen_serving.replicas import COMPUTE_NICENESS, set_up
from musicgen_serving.settings import ObservabilitySettings

def niceness():
    return os.getpriority(os.PRIO_PROCESS, 0)  # of this thread

def of_a_child():
    found = []
    child = threading.Thread(target=lambda: found.append(niceness()))
    child.start()
    child.join()
    return found[0]

async def run():
    before = niceness()
    set_up("codec", ObservabilitySettings(), num_threads=1)
    own = await asyncio.to_thread(niceness), await asyncio.to_thread(of_a_child)
    print(json.dumps([COMPUTE_NICENESS, niceness() - before, *(value - before for value in own)]))

asyncio.run(run())
"""


def test_threads_that_compute_step_back_and_the_loop_does_not() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True, check=True)
    by, loop, own, childs = json.loads(done.stdout.splitlines()[-1])
    assert (loop, own, childs) == (0, by, by)
    assert by > 0
