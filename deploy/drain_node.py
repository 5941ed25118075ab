"""Drains one node of a Ray cluster without interrupting its requests: the pods' preStop hook.

Tells Ray that the node is draining, so that Serve starts replicas elsewhere, sends no new requests here and lets
running ones finish; then waits until no Serve replica is left in this container. Returns early if there is nothing to
wait for: Ray is not running here, the head is gone (the whole cluster is being deleted), or Ray rejected the drain.
Always exits with 0: a failing hook would only add an event.

Identifies replicas by the process titles that Ray sets, and the node id by the flag that Ray passes to its raylet.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable

import psutil

REPLICA_TITLE = "ray::ServeReplica"
NODE_ID = re.compile(r"^--node[_-]id=([0-9a-f]+)$")
HEAD_TRIES = 3
"""Consecutive failed connections after which the head counts as gone."""

CommandLines = Callable[[], list[list[str]]]


def command_lines() -> list[list[str]]:
    """Command line of every process in the container."""
    return [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]


def node_id(lines: Iterable[list[str]]) -> str | None:
    """The id of this container's node; None if no raylet is running."""
    matches = (NODE_ID.match(argument) for line in lines for argument in line)
    return next((match[1] for match in matches if match), None)


def num_serving(lines: Iterable[list[str]]) -> int:
    """Number of Serve replicas in this container."""
    return sum(bool(line) and line[0].startswith(REPLICA_TITLE) for line in lines)


def drain(address: str, node: str, timeout_s: int) -> bool:
    """Ask Ray to drain the node; returns whether it accepted."""
    command = ["ray", "drain-node", "--address", address, "--node-id", node]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the pod is being stopped"]
    command += ["--deadline-remaining-seconds", str(timeout_s)]
    return subprocess.run(command, check=False, timeout=60).returncode == 0


def head_answers(address: str) -> bool:
    """Whether something listens at `host:port`."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=3):
            return True
    except OSError:
        return False


def wait_until_idle(
    address: str,
    timeout_s: float,
    *,
    lines: CommandLines = command_lines,
    answers: Callable[[str], bool] = head_answers,
    sleep: Callable[[float], None] = time.sleep,
    poll_s: float = 2.0,
) -> str:
    """Wait until the last replica has ended; returns why the wait ended."""
    num_failed = 0
    for _ in range(int(timeout_s / poll_s)):
        if num_serving(lines()) == 0:
            return "idle"
        num_failed = 0 if answers(address) else num_failed + 1
        if num_failed == HEAD_TRIES:
            return "the head is gone"
        sleep(poll_s)
    return "out of time"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--timeout-s", type=int, required=True, help="longest wait")
    timeout_s = parser.parse_args().timeout_s
    node, address = node_id(command_lines()), os.environ.get("RAY_ADDRESS")
    if node is None or not address:
        print("nothing to drain: no raylet, or RAY_ADDRESS is not set")
        return 0
    try:
        accepted = drain(address, node, timeout_s)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"could not ask for a drain: {type(error).__name__}")
        return 0
    print(wait_until_idle(address, timeout_s) if accepted else "Ray refused the drain")
    return 0


if __name__ == "__main__":
    sys.exit(main())
