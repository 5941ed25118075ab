"""Open-loop load generator in a separate process: each request is sent on schedule, regardless of earlier ones.

Reads a plan as JSON lines and writes outcomes as JSON lines, followed by one line with the delays of the generator
itself. Started by `run_load`; never runs in the process of a service or a benchmark.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

import httpx2

from benchmarks.serving_clients import Listener
from benchmarks.serving_plan import Ask, Outcome, asks, outcomes, to_lines

BEAT_S = 0.05
LEAD_S = 0.3
"""From the start of the load's clock to the first request."""


@dataclass(frozen=True, slots=True)
class Own:
    """Delays added by the load generator and the machine."""

    loop_lag_p50_s: float
    loop_lag_p99_s: float
    """Wake-up delay of the event loop."""
    health_p50_s: float | None
    health_p99_s: float | None
    """Latency of `/healthz` during the load; None without HTTP."""
    sent_late_p99_s: float
    """Delay of sending after the planned time."""


@dataclass(frozen=True, slots=True)
class Load:
    """A finished load."""

    outcomes: list[Outcome]
    own: Own


class LoadProcess:
    """A running load."""

    def __init__(self, plan: Sequence[Ask], urls: tuple[str | None, str | None], timeout_s: float) -> None:
        command = [sys.executable, "-m", "benchmarks.serving_load", f"--timeout-s={timeout_s}"]
        for name, url in zip(("http", "grpc"), urls, strict=True):
            command += [f"--{name}-url={url}"] if url else []
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None
        self._process.stdin.write(to_lines(plan))
        self._process.stdin.close()

    def result(self) -> Load:
        """Wait until it has ended. Raises: RuntimeError: it failed."""
        with self._process as process:
            assert process.stdout is not None
            text = process.stdout.read()
        if process.returncode != 0:
            raise RuntimeError("the load generator failed; see its output above")
        *lines, last = text.splitlines()
        return Load(list(outcomes(lines)), Own(**json.loads(last)))


def run_load(plan: Sequence[Ask], urls: tuple[str | None, str | None], timeout_s: float = 600.0) -> Load:
    """Run a plan against a service and wait for the end.

    Args:
        urls: HTTP and gRPC URL.
    """
    return LoadProcess(plan, urls, timeout_s).result()


def _go_first() -> None:
    """Use real-time priority, where permitted: real clients run on their own machines.

    Niceness is not enough: on two busy cores, Linux delayed a client with niceness -10 by up to 70 ms.
    """
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


async def _run(plan: list[Ask], http_url: str | None, grpc_url: str | None, timeout_s: float) -> Load:
    listener = Listener(http_url, grpc_url, timeout_s)
    await listener.warm_up({ask.protocol for ask in plan})
    lags: list[float] = []
    health: list[float] = []
    beats = [asyncio.create_task(_beat(lags))]
    if http_url is not None:
        beats.append(asyncio.create_task(_ask_health(http_url, health)))
    listener.began = time.perf_counter() + LEAD_S
    tasks = []
    for ask in sorted(plan, key=lambda ask: ask.at_s):
        await asyncio.sleep(max(0.0, ask.at_s - listener.now))
        tasks.append(asyncio.create_task(listener.listen(ask)))
    done = list(await asyncio.gather(*tasks))
    for beat in beats:
        beat.cancel()
    await asyncio.gather(*beats, return_exceptions=True)
    await listener.close()
    late = percentile([outcome.sent_s - outcome.planned_s for outcome in done], 99) or 0.0
    own = Own(
        percentile(lags, 50) or 0.0,
        percentile(lags, 99) or 0.0,
        percentile(health, 50),
        percentile(health, 99),
        late,
    )
    return Load(done, own)


async def _beat(lags: list[float]) -> None:
    while True:
        began = time.perf_counter()
        await asyncio.sleep(BEAT_S)
        lags.append(time.perf_counter() - began - BEAT_S)


async def _ask_health(url: str, seconds: list[float]) -> None:
    async with httpx2.AsyncClient(base_url=url, timeout=30) as client:
        await client.get("/healthz")
        while True:
            began = time.perf_counter()
            await client.get("/healthz")
            seconds.append(time.perf_counter() - began)
            await asyncio.sleep(4 * BEAT_S)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Nearest rank; None if empty."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--http-url")
    parser.add_argument("--grpc-url")
    parser.add_argument("--timeout-s", type=float, default=600.0)
    args = parser.parse_args()
    _go_first()
    load = asyncio.run(_run(list(asks(sys.stdin)), args.http_url, args.grpc_url, args.timeout_s))
    print(to_lines(load.outcomes) + json.dumps(asdict(load.own)))


if __name__ == "__main__":
    main()
