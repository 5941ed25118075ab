"""The service under benchmark: an existing one, or a cluster started with `musicgen serve`.

Owns starting, stopping and memory sampling of the cluster's processes. Independent of loads.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from musicgen_serving.free_ports import free_ports

START_S = 300.0
STOP_S = 60.0
MARK = "MUSICGEN_BENCHMARK_RUN"
"""Environment variable that marks every process of a started cluster, to find leftover ones."""


@dataclass(frozen=True, slots=True)
class Service:
    """A running service."""

    http_url: str | None
    grpc_url: str | None
    run_id: str | None = None
    """Set for a started cluster."""

    @property
    def urls(self) -> tuple[str | None, str | None]:
        return self.http_url, self.grpc_url

    def processes(self) -> dict[str, psutil.Process]:
        """Processes of a started cluster by their Ray name, such as `HttpIngress`, numbered if there are several."""
        found: dict[str, psutil.Process] = {}
        for process in processes_of(self.run_id or ""):
            with suppress(psutil.Error):
                name = role(" ".join(process.cmdline()))
                if name is not None:
                    number = sum(other.partition(" ")[0] == name for other in found)
                    found[name if number == 0 else f"{name} {number + 1}"] = process
        return found


def role(command: str) -> str | None:
    """Role of a Ray process, from its command line."""
    match = re.match(r"ray::(?:ServeReplica:[^:]+:)?([A-Za-z]+)", command)
    return match[1] if match else None


def processes_of(run_id: str) -> list[psutil.Process]:
    """All live processes of a run, including descendants."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if run_id and process.environ().get(MARK) == run_id and process.pid != os.getpid():
                found.append(process)
    return found


@contextmanager
def own_service(settings: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Iterator[Service]:
    """Start a cluster with these settings on free ports, and stop it at the end, also on SIGTERM.

    Ray runs its workers at low priority, so that the clients would take their cores; here they have normal priority.

    Raises:
        RuntimeError: it did not become ready.
    """
    signal.signal(signal.SIGTERM, _terminate)
    http_port, grpc_port = free_ports(2)
    values = {
        "access": {"open": True},
        **settings,
        "http": {"port": http_port, **settings.get("http", {})},
        "grpc": {"port": grpc_port, **settings.get("grpc", {})},
    }
    run_id = uuid.uuid4().hex
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "service.yaml"
        config.write_text(yaml.safe_dump(values))
        command = [sys.executable, "-m", "musicgen", "serve", "--config", str(config)]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "RAY_worker_niceness": "0", **(environment or {}), MARK: run_id},
            start_new_session=True,
        )
        try:
            _wait_ready(process)
            yield Service(f"http://127.0.0.1:{http_port}", f"grpc://127.0.0.1:{grpc_port}", run_id)
        finally:
            _stop(process, run_id)


def _terminate(*_: object) -> None:
    raise SystemExit(143)


def _wait_ready(process: subprocess.Popen[str]) -> None:
    stdout = process.stdout
    assert stdout is not None
    timer = threading.Timer(START_S, process.kill)
    timer.start()
    try:
        for line in stdout:
            if line.startswith("ready:"):
                return
        raise RuntimeError("the service did not start; see its output above")
    finally:
        timer.cancel()


def _stop(process: subprocess.Popen[str], run_id: str) -> None:
    """Interrupt it twice (the second signal ends draining), then kill the remaining processes of this run."""
    for wait_s in (2.0, STOP_S):
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(wait_s)
    left = processes_of(run_id)
    for one in left:
        with suppress(psutil.Error):
            one.kill()
    psutil.wait_procs(left, timeout=10)


class MemoryWatch:
    """Samples the resident memory of a cluster's processes twice a second in a thread; a context manager.

    `samples`: by process, (seconds since the start, bytes).
    """

    def __init__(self, service: Service, period_s: float = 0.5) -> None:
        self._service, self._period_s = service, period_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.samples: dict[str, list[tuple[float, int]]] = {}

    def __enter__(self) -> MemoryWatch:
        self.began = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        processes = self._service.processes()
        while not self._stopped.wait(self._period_s):
            for name, process in processes.items():
                with suppress(psutil.Error):
                    at = time.perf_counter() - self.began
                    self.samples.setdefault(name, []).append((at, process.memory_info().rss))
