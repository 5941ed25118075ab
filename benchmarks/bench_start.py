"""Startup, idle and shutdown cost of the service: `python -m benchmarks.bench_start`.

Measures the demo model from the command to the "ready" line, then idle for a while, then SIGINT. CPU time covers all
processes of the run that are alive when it is ready, and their terminated children. Prints a table of medians, then one
line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import suppress
from dataclasses import asdict, dataclass

import psutil

from benchmarks.machine import load_average
from benchmarks.serving_report import aligned
from benchmarks.serving_service import Service, own_service, processes_of


@dataclass(frozen=True, slots=True)
class Start:
    """One run. Seconds; `rest_cores`: CPU seconds per second when idle; `resident_mb`: by Ray process name."""

    ready_s: float
    processor_s: float
    rest_cores: float
    stop_s: float
    resident_mb: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rest-s", type=float, default=30.0, help="idle time to measure")
    args = parser.parse_args()
    runs = [measure(args.rest_s) for _ in range(args.runs)]
    print(table(runs))
    print(json.dumps({"benchmark": "start", "load_average": load_average(), "runs": [asdict(run) for run in runs]}))


def measure(rest_s: float) -> Start:
    """Start the service once, let it idle, stop it."""
    began = time.monotonic()
    with own_service({"models": [{"name": "demo"}]}) as service:
        ready_s, at_ready_s = time.monotonic() - began, _processor_s(service)
        resident = {name: process.memory_info().rss / 1e6 for name, process in service.processes().items()}
        time.sleep(rest_s)
        rest_cores = (_processor_s(service) - at_ready_s) / rest_s
        ending = time.monotonic()
    return Start(ready_s, at_ready_s, rest_cores, time.monotonic() - ending, resident)


def table(runs: list[Start]) -> str:
    """Median, minimum and maximum over all runs."""
    rows = [("", "median", "lowest", "highest")]
    for name, unit in (("ready_s", "s"), ("processor_s", "s"), ("rest_cores", "cores"), ("stop_s", "s")):
        values = [getattr(run, name) for run in runs]
        rows.append((name, *(f"{f(values):.2f} {unit}" for f in (statistics.median, min, max))))
    for name in sorted(runs[0].resident_mb):
        values = [run.resident_mb[name] for run in runs if name in run.resident_mb]
        rows.append((f"resident {name}", *(f"{f(values):.0f} MB" for f in (statistics.median, min, max))))
    return aligned(rows)


def _processor_s(service: Service) -> float:
    total_s = 0.0
    for process in processes_of(service.run_id or ""):
        with suppress(psutil.Error):
            times = process.cpu_times()
            total_s += times.user + times.system + times.children_user + times.children_system
    return total_s


if __name__ == "__main__":
    main()
