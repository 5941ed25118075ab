"""Stops one node of a Ray cluster without cutting what it does: the pods' preStop hook.

Tells Ray that the node is going, so that Serve starts replicas elsewhere, sends nothing new here and lets what runs
end; then waits until no replica of Serve is left in this container. Returns early when there is nobody to
wait for: no Ray here, the head gone (the whole cluster is being deleted), or the request refused. Always exits with 0:
a hook that fails would only add an event.

Knows processes by the titles that Ray gives them, and the node's id by the flag that Ray starts its raylet with.
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
"""Failed connections in a row after which the head counts as gone."""

CommandLines = Callable[[], list[list[str]]]


def command_lines() -> list[list[str]]:
    """Arguments of every process in the container."""
    return [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]


def node_id(lines: Iterable[list[str]]) -> str | None:
    """The id of this container's node; None: no raylet runs."""
    matches = (NODE_ID.match(argument) for line in lines for argument in line)
    return next((match[1] for match in matches if match), None)


def num_serving(lines: Iterable[list[str]]) -> int:
    """Replicas of Serve in this container."""
    return sum(bool(line) and line[0].startswith(REPLICA_TITLE) for line in lines)


def drain(address: str, node: str, timeout_s: int) -> bool:
    """Ask Ray to move what is on the node; returns whether it will."""
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
    """Wait for the last replica; returns why the wait ended."""
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
