"""Autoscaling up and down, and a redeployment under load: `python -m benchmarks.autoscaling`.

Starts a cluster with an autoscaled language model and short scaling delays, sends a stepped load from a separate
process, and samples the replicas every second. Then redeploys the application with a changed setting under load; no
request may fail. Prints tables, then one line of JSON; the exit status is 0 if both succeeded.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from musicgen_serving.free_ports import free_ports

from benchmarks.machine import load_average
from benchmarks.serving_load import Load, LoadProcess
from benchmarks.serving_plan import Ask, plan
from benchmarks.serving_report import Figures, Slo, aligned, by_protocol, table

PARTS = ("scale", "redeploy")
PUSH_INTERVAL = "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S"


@dataclass(frozen=True, slots=True)
class Look:
    """State of the language model's deployment at one moment."""

    at_s: float
    """Since the start of the load."""
    num_running: int
    num_starting: int
    num_stopping: int
    queued_frames: float | None
    """Over all replicas that responded; None if none did in time."""
    rate_hz: float
    """Offered requests per second."""


@dataclass(slots=True)
class Timeline:
    """Samples a deployment once a second in a thread; a context manager."""

    deployment: str
    steps: Sequence[tuple[float, float]]
    """Rate and duration of each load step."""
    looks: list[Look] = field(default_factory=list)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _began: float = 0.0

    def __enter__(self) -> Timeline:
        self._began = time.perf_counter()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        assert self._thread is not None
        self._thread.join()

    def _run(self) -> None:
        from musicgen_serving.process import APP_NAME
        from ray import serve

        handle = serve.get_deployment_handle(self.deployment, APP_NAME)
        while not self._stopped.wait(1.0):
            states = serve.status().applications[APP_NAME].deployments[self.deployment].replica_states
            by_name = {str(getattr(state, "value", state)): count for state, count in states.items()}
            self.looks.append(
                Look(
                    time.perf_counter() - self._began,
                    by_name.get("RUNNING", 0),
                    by_name.get("STARTING", 0) + by_name.get("UPDATING", 0),
                    by_name.get("STOPPING", 0),
                    _queued_frames(handle),
                    self._rate(time.perf_counter() - self._began),
                )
            )

    def _rate(self, at_s: float) -> float:
        for rate_hz, span_s in self.steps:
            if at_s < span_s:
                return rate_hz
            at_s -= span_s
        return 0.0


def _queued_frames(handle: Any) -> float | None:
    with suppress(Exception):  # the replica is busy or stopping; try again at the next sample
        loads = handle.broadcast("load").results(timeout_s=1.0, return_exceptions=True)
        known = [load.queued_frames for load in loads if not isinstance(load, Exception)]
        return float(sum(known)) if known else None
    return None


def step_plan(steps: Sequence[tuple[float, float]], args: argparse.Namespace, name: str) -> list[Ask]:
    """A stepped load with Poisson arrivals in each step."""
    asks: list[Ask] = []
    began_s = 0.0
    for number, (rate_hz, span_s) in enumerate(steps):
        if rate_hz > 0:
            own = plan(
                max(1, round(rate_hz * span_s)),
                rate_hz,
                args.durations,
                ("http", "grpc"),
                model=args.model,
                seed=args.seed + number,
                name=f"{name}-{number}",
            )
            asks += [Ask(**{**asdict(ask), "at_s": began_s + ask.at_s}) for ask in own if ask.at_s < span_s]
        began_s += span_s
    return asks


def settings(args: argparse.Namespace, ports: tuple[int, int], max_waiting: int) -> dict[str, Any]:
    """Service settings, with a language model that scales quickly."""
    scaling = {
        "min_replicas": args.min_replicas,
        "max_replicas": args.max_replicas,
        "target_load": args.target_load,
        "upscale_delay_s": args.upscale_delay_s,
        "downscale_delay_s": args.downscale_delay_s,
    }
    model = {
        "name": args.model,
        "kv_memory_bytes": 64 * 2**20,
        "max_requests": 8,
        "num_threads": 1,
        "max_waiting": max_waiting,
        "language_model": scaling,
    }
    two = {"min_replicas": 2, "max_replicas": 2}  # while one is replaced, the other serves
    return {
        "models": [model],
        "access": {"open": True},
        "admission": {"max_wait_s": 120.0},
        "http": {"port": ports[0], "ingress": two},
        "grpc": {"port": ports[1], "ingress": two},
    }


@dataclass(slots=True)
class Report:
    """Measurements."""

    rows: list[Figures] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    checks: list[tuple[str, str, str]] = field(default_factory=list)
    """Name, measurement, outcome."""
    ok: bool = True

    def check(self, what: str, measured: str, ok: bool | None = None) -> None:
        self.checks.append((what, measured, {True: "ok", False: "failed", None: ""}[ok]))
        self.ok = self.ok and ok is not False
        print(self.checks[-1], file=sys.stderr, flush=True)


def scale(args: argparse.Namespace, urls: tuple[str, str], report: Report) -> None:
    """Scale up and down."""
    steps = [(args.low_hz, args.low_s), (args.high_hz, args.high_s), (0.0, args.off_s)]
    with Timeline(f"LanguageModel-{args.model}", steps) as timeline:
        load = LoadProcess(step_plan(steps, args, "scale"), urls, args.timeout_s).result()
        while timeline.looks and timeline.looks[-1].at_s < sum(span for _, span in steps):
            time.sleep(0.5)
    report.looks = timeline.looks
    _add(report, "load in steps", load, args)
    up_at = args.low_s
    more = next((look for look in report.looks if look.num_running > args.min_replicas), None)
    most = max((look.num_running for look in report.looks), default=0)
    text = "-" if more is None else f"{more.at_s - up_at:.1f} s after the load increased; at most {most} replicas"
    report.check("scaled up", text, more is not None)
    wanted = next((look for look in report.looks if look.num_starting > 0), None)
    if wanted is not None:
        report.check("replica requested", f"{wanted.at_s - up_at:.1f} s after the load increased")
    off_at = up_at + args.high_s
    after = [look for look in report.looks if look.at_s > off_at and look.num_running <= args.min_replicas]
    text = f"{after[0].at_s - off_at:.1f} s after the load stopped" if after else "-"
    report.check("scaled down", text, bool(after))


def redeploy(args: argparse.Namespace, urls: tuple[str, str], ports: tuple[int, int], report: Report) -> None:
    """Redeploy the application with a changed setting under load."""
    from musicgen_serving.app import build_app
    from musicgen_serving.process import APP_NAME
    from ray import serve

    steps = [(args.redeploy_hz, args.redeploy_s)]
    load = LoadProcess(step_plan(steps, args, "redeploy"), urls, args.timeout_s)
    began = time.perf_counter()
    time.sleep(args.redeploy_after_s)
    changed = settings(args, ports, max_waiting=77)
    serve.run(build_app(changed), name=APP_NAME, route_prefix=None)
    seconds = time.perf_counter() - began - args.redeploy_after_s
    result = load.result()
    _add(report, "redeployment", result, args)
    statuses = Counter(outcome.status for outcome in result.outcomes)
    report.check("redeployment with a changed max_waiting", f"{seconds:.1f} s")
    within = seconds + args.redeploy_after_s < args.redeploy_s
    report.check("load lasted longer than the redeployment", "yes" if within else "no", within)
    text = ", ".join(f"{count} {status}" for status, count in statuses.items())
    report.check("requests during redeployment", text, set(statuses) == {"finished"})
    slowest = max((o.first_audio_s or 0.0 for o in result.outcomes), default=0.0)
    report.check("slowest first audio during redeployment", f"{slowest:.1f} s")


def _add(report: Report, name: str, load: Load, args: argparse.Namespace) -> None:
    rate = args.high_hz if name == "load in steps" else args.redeploy_hz
    report.rows += by_protocol(name, load, rate, Slo(2.0, 0.5), load_average())
    print(table(report.rows[-3:]), file=sys.stderr, flush=True)


def plot(report: Report, path: Path) -> None:
    """Plot replicas, queued frames and request rate over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    times = [look.at_s for look in report.looks]
    figure, axes = plt.subplots(3, 1, figsize=(9, 6), sharex=True, layout="constrained")
    axes[0].step(times, [look.rate_hz for look in report.looks], where="post")
    axes[0].set(ylabel="requests per second")
    known = [look for look in report.looks if look.queued_frames is not None]
    axes[1].plot([look.at_s for look in known], [look.queued_frames or 0.0 for look in known])
    axes[1].set(ylabel="queued decode frames")
    running = [look.num_running for look in report.looks]
    axes[2].step(times, running, where="post", label="running")
    axes[2].step(times, [look.num_starting for look in report.looks], where="post", label="starting", linestyle=":")
    axes[2].step(times, [look.num_stopping for look in report.looks], where="post", label="stopping", linestyle="--")
    axes[2].set(ylabel="language-model replicas", xlabel="seconds", ylim=(0, max([1, *running]) + 0.5))
    axes[2].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--model", default="demo")
    add("--durations", type=float, nargs="+", default=[4.0, 6.0])
    add("--min-replicas", type=int, default=1)
    add("--max-replicas", type=int, default=2)
    add("--target-load", type=float, default=600.0, help="target queued frames per replica")
    add("--upscale-delay-s", type=float, default=1.0)
    add("--downscale-delay-s", type=float, default=5.0)
    add("--low-hz", type=float, default=0.3)
    add("--low-s", type=float, default=10.0)
    add("--high-hz", type=float, default=3.0)
    add("--high-s", type=float, default=45.0)
    add("--off-s", type=float, default=50.0)
    add("--redeploy-hz", type=float, default=0.7)
    add("--redeploy-s", type=float, default=100.0)
    add("--redeploy-after-s", type=float, default=8.0)
    add("--timeout-s", type=float, default=240.0)
    add("--seed", type=int, default=0)
    add("--plot", type=Path, metavar="FILE")
    return parser.parse_args()


def _terminate(*_: object) -> None:
    raise SystemExit(143)


def main() -> int:
    args = _parse()
    # Set before importing Ray: its processes read them at startup.
    os.environ[PUSH_INTERVAL] = "1"
    os.environ.setdefault("RAY_worker_niceness", "0")
    signal.signal(signal.SIGTERM, _terminate)
    from musicgen_serving import cluster
    from musicgen_serving.settings import load_settings

    began, report = time.time(), Report()
    http_port, grpc_port = free_ports(2)
    ports = http_port, grpc_port
    urls = f"http://127.0.0.1:{http_port}", f"grpc://127.0.0.1:{grpc_port}"
    cluster.start(load_settings(settings(args, ports, max_waiting=256)))
    try:
        print(f"ready after {time.time() - began:.0f} s", file=sys.stderr, flush=True)
        if "scale" in args.parts:
            scale(args, urls, report)
        if "redeploy" in args.parts:
            redeploy(args, urls, ports, report)
    finally:
        cluster.stop()
    print(table(report.rows))
    print(aligned([("autoscaling", "measured", ""), *report.checks]))
    if args.plot is not None and report.looks:
        plot(report, args.plot)
    result = {
        "benchmark": "autoscaling",
        "options": {name: value for name, value in vars(args).items() if name != "plot"},
        "seconds": round(time.time() - began, 1),
        "load_average": load_average(),
        "loads": [asdict(row) for row in report.rows],
        "checks": report.checks,
        "timeline": [asdict(look) for look in report.looks],
    }
    print(json.dumps(result))
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
