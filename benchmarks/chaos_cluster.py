"""A local service whose replicas can be located, killed and awaited.

Owns the settings of this service and the naming of Ray's processes.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from musicgen_serving import cluster
from musicgen_serving.free_ports import free_ports
from musicgen_serving.process import APP_NAME
from musicgen_serving.settings import ServeSettings

MODEL = "demo"
PARTS = {
    "LanguageModel": "language_model",
    "CodecDecoder": "codec",
    "TextEncoder": "text_encoder",
    "ChromaExtractor": "chroma",
}
"""A model's deployments, and the section of its settings for each."""
INGRESSES = {"HttpIngress": "http", "GrpcIngress": "grpc"}
KINDS = (*PARTS, "Gatekeeper", *INGRESSES)


def settings(
    replicas: Mapping[str, int], *, usage_file: Path | None = None, model: Mapping[str, Any] | None = None, **more: Any
) -> ServeSettings:
    """Settings of a small service with the demo model on free ports.

    Args:
        replicas: by kind; default 1. The gatekeeper is always a singleton.
        model, more: additional model settings, and sections of the service settings.
    """

    def how(kind: str) -> dict[str, int]:
        count = replicas.get(kind, 1)
        return {"min_replicas": count, "max_replicas": count}

    one = {"name": MODEL, "kv_memory_bytes": 256 * 2**20, "num_threads": 1}
    one |= {section: how(kind) for kind, section in PARTS.items()} | dict(model or {})
    sections: dict[str, Any] = {
        section: {"port": port, "ingress": how(kind)}
        for (kind, section), port in zip(INGRESSES.items(), free_ports(len(INGRESSES)), strict=True)
    }
    sections |= {
        "models": [one],
        "admission": {"max_wait_s": 3600.0},
        "access": {"open": True, "usage_file": None if usage_file is None else str(usage_file)},
    }
    return ServeSettings(**(sections | more))


@contextmanager
def running(how: ServeSettings) -> Iterator[cluster.Endpoints]:
    """Run the service for the duration of the context."""
    endpoints = cluster.start(how)
    try:
        yield endpoints
    finally:
        cluster.stop()


def deployment(kind: str) -> str:
    """Name of a kind's deployment."""
    return f"{kind}-{MODEL}" if kind in PARTS else kind


def handle(kind: str) -> Any:
    """A handle of a kind's deployment."""
    from ray import serve

    return serve.get_deployment_handle(deployment(kind), APP_NAME)


def replica_pids(kind: str) -> set[int]:
    """Processes of a kind's replicas, among the descendants of this process."""
    title = f"ray::ServeReplica:{APP_NAME}:{deployment(kind)}"
    found: dict[int, int] = {}
    for process in psutil.Process().children(recursive=True):
        try:
            words = process.cmdline()
            if words and words[0].split(".")[0].rstrip() == title:
                found[process.pid] = process.ppid()
        except psutil.Error:
            continue
    # A process freshly forked by a replica has the same title until it execs.
    return {pid for pid, parent in found.items() if parent not in found}


def kill(pid: int) -> None:
    """Kill without warning."""
    os.kill(pid, signal.SIGKILL)


def wait_whole(kind: str, count: int, without: set[int], timeout_s: float = 120.0) -> float:
    """Wait until `count` replicas are running, none of them in `without`; returns the seconds it took.

    Raises:
        TimeoutError: they did not start in time.
    """
    from ray import serve

    began = time.monotonic()
    while time.monotonic() - began < timeout_s:
        if len(replica_pids(kind)) == count and not replica_pids(kind) & without:
            states = serve.status().applications[APP_NAME].deployments[deployment(kind)].replica_states
            if {str(getattr(state, "value", state)): n for state, n in states.items()} == {"RUNNING": count}:
                return time.monotonic() - began
        time.sleep(0.1)
    raise TimeoutError(f"expected {count} replicas of {kind} within {timeout_s:g} s, got {len(replica_pids(kind))}")
