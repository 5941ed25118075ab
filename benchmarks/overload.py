"""Overload, noisy neighbours and stalled readers: `python -m benchmarks.overload`.

On one cluster, in sequence: throughput at saturation; an open-loop load at that capacity; three times that load for a
minute; one tenant alone, then alongside a flooding tenant; readers that stop reading. Every request must have exactly
one outcome, admitted requests must not wait longer than without the overload, rejections must be fast and memory
bounded. Prints tables, then one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from musicgen_serving.tenancy import hash_key, new_key

from benchmarks.machine import load_average
from benchmarks.serving_load import Load, percentile, run_load
from benchmarks.serving_model import add_model_options, model_name, model_settings
from benchmarks.serving_plan import Ask, Outcome, plan
from benchmarks.serving_report import Figures, Slo, aligned, by_protocol, figures, table
from benchmarks.serving_service import MemoryWatch, Service, own_service
from benchmarks.serving_stalled import Stalled, stall

REJECT_S, FLOOD_RATIO = 0.05, 1.5
"""Targets: p99 of a rejection; the steady tenant's p95 during a flood relative to that alone."""
PARTS = ("capacity", "overload", "flood", "readers")
TENANTS = ("steady", "flood")


@dataclass(slots=True)
class Report:
    """All measurements. Filled in part by part."""

    capacity_audio_s: float = 0.0
    capacity_hz: float = 0.0
    rows: list[Figures] = field(default_factory=list)
    loads: dict[str, Load] = field(default_factory=dict)
    checks: list[tuple[str, str, str, str]] = field(default_factory=list)
    """Name, measurement, target, whether it was met."""
    stalled: Stalled | None = None
    memory: dict[str, list[tuple[float, int]]] = field(default_factory=dict)


class Overload:
    """The parts of the benchmark, against one service.

    Args:
        keys: API keys of the two tenants, by name.
    """

    def __init__(self, args: argparse.Namespace, service: Service, keys: dict[str, str]) -> None:
        self.args, self.service, self.keys = args, service, keys
        self.slo = Slo(args.slo_first_audio, 0.5)
        self.model = model_name(args)
        self.report = Report()

    def run(self) -> Report:
        self._load("warm-up", 1.0, 4, "steady")
        self._capacity()
        for part in ("overload", "flood", "readers"):
            if part in self.args.parts:
                getattr(self, f"_{part}")()
        return self.report

    def _capacity(self) -> None:
        """Throughput at saturation; the guessed rate only needs to be too high."""
        rate = self.args.guess_hz
        load = self._load("saturated", rate, round(rate * self.args.saturate_s), "steady")
        audio_s = figures("", load.outcomes, rate, self.slo, 0.0).audio_s_per_s
        self.report.capacity_audio_s = audio_s
        self.report.capacity_hz = audio_s / (sum(self.args.durations) / len(self.args.durations))

    def _overload(self) -> None:
        rate, args = self.report.capacity_hz, self.args
        at = self._load("at capacity", rate, round(rate * args.duration_s / 2), "steady")
        over = self._load(
            f"{args.factor:g} times", args.factor * rate, round(args.factor * rate * args.duration_s), "steady"
        )
        num_bad = sum(o.num_terminal != 1 or o.status in ("cut", "timeout") for o in over.outcomes)
        self._check("requests without exactly one outcome", f"{num_bad} of {len(over.outcomes)}", "0", num_bad == 0)
        at_s, over_s = (_first(load.outcomes, 99) for load in (at, over))
        ratio = over_s / at_s
        text = f"{over_s:.2f} s; {at_s:.2f} s at capacity: × {ratio:.2f}"
        self._check("first audio p99 of admitted requests", text, "flat (≤ 1.5 ×)", ratio <= 1.5)
        third_s = max(o.planned_s for o in over.outcomes) / 3
        thirds = [[o for o in over.outcomes if int(o.planned_s / third_s) == i] for i in range(3)]
        text = ", ".join(f"{_first(third, 99):.2f} s" for third in thirds)
        steady = _first(thirds[2], 99) <= 1.25 * _first(thirds[0], 99)
        self._check("the same in each third of the run", text, "does not grow", steady)
        refusals = [o.answer_s for o in over.outcomes if o.status in ("overloaded", "rate_limit_exceeded")]
        for protocol in ("http", "grpc"):
            times = [
                o.answer_s
                for o in over.outcomes
                if o.protocol == protocol and o.status in ("overloaded", "rate_limit_exceeded")
            ]
            p99_s = percentile(times, 99)
            text = f"p50 {_ms(percentile(times, 50))}, p99 {_ms(p99_s)} of {len(times)}"
            self._check(
                f"rejections over {protocol}", text, f"p99 < {_ms(REJECT_S)}", p99_s is not None and p99_s < REJECT_S
            )
        own = over.own
        text = f"p50 {_ms(own.health_p50_s)}, p99 {_ms(own.health_p99_s)}"
        self._check("/healthz on the same path", text, "", None)
        text = f"p50 {_ms(own.loop_lag_p50_s)}, p99 {_ms(own.loop_lag_p99_s)}; sent late p99 {_ms(own.sent_late_p99_s)}"
        self._check("delays of the client itself", text, "", None)
        self._check("rejected", f"{len(refusals)} of {len(over.outcomes)}", "", None)

    def _flood(self) -> None:
        """The steady tenant requests less than half the capacity, the other one several times the capacity."""
        rate, args = self.report.capacity_hz, self.args
        steady_hz = args.steady_share * rate
        num = max(10, round(steady_hz * args.flood_s))
        alone = self._load("steady alone", steady_hz, num, "steady")
        steady = self._plan("steady beside", steady_hz, num, "steady", seed=7)
        span_s = steady[-1].at_s
        # The flood starts earlier and ends later, so that no steady request finds an idle engine.
        flood_hz = args.factor * rate
        flood = self._plan("flood", flood_hz, round(flood_hz * (span_s + 6)), "flood", seed=8)
        shifted = [Ask(**{**asdict(ask), "at_s": ask.at_s + 4}) for ask in steady]
        beside = run_load([*flood, *shifted], self.service.urls, self.args.timeout_s)
        self._add("both tenants", beside, steady_hz + flood_hz)
        mine = [o for o in beside.outcomes if o.api_key == self.keys["steady"]]
        self.report.rows.append(figures("of it steady", mine, steady_hz, self.slo, load_average()))
        for what, value in (("first audio", _first), ("whole piece", _whole)):
            alone_s, beside_s = value(alone.outcomes, 95), value(mine, 95)
            text = f"{beside_s:.2f} s; {alone_s:.2f} s alone: × {beside_s / alone_s:.2f}"
            target = f"≤ {FLOOD_RATIO:g} ×" if what == "first audio" else ""
            met = beside_s / alone_s <= FLOOD_RATIO if target else None
            self._check(f"steady tenant's p95 of {what}", text, target, met)
        num_refused = sum(o.status != "finished" for o in mine)
        self._check("steady tenant's rejected requests", f"{num_refused} of {len(mine)}", "", None)

    def _readers(self) -> None:
        args = self.args
        with MemoryWatch(self.service) as watch:
            time.sleep(3)
            self.report.stalled = asyncio.run(
                stall(
                    self.service.http_url or "",
                    self.service.grpc_url or "",
                    args.readers,
                    args.stalled_s,
                    args.reader_watch_s,
                    self.model,
                    self.keys["steady"],
                )
            )
            time.sleep(3)
        self.report.memory = watch.samples
        piece_mb = 4 * 32000 * args.stalled_s / 1e6
        for name in ("HttpIngress", "GrpcIngress"):
            if samples := watch.samples.get(name):
                grown = (max(rss for _, rss in samples) - samples[0][1]) / 1e6
                most = args.readers * piece_mb
                text = f"+{grown:.1f} MB at most; all pieces together: {most:.0f} MB"
                self._check(f"memory of {name}", text, "bounded", grown <= 1.5 * most + 50)
        stalled = self.report.stalled
        late = stalled.ended_s[-1] if stalled.ended_s else float("nan")
        num_refused = stalled.states.get("status 404", 0)  # never admitted
        text = f"{len(stalled.ended_s)} of {stalled.num_readers - num_refused} admitted, after {late:.1f} s"
        all_ended = len(stalled.ended_s) == stalled.num_readers - num_refused > 0
        self._check("stalled readers' requests that ended", f"{text}: {stalled.states}", "all", all_ended)

    def _plan(self, name: str, rate_hz: float, num: int, tenant: str, seed: int = 0) -> list[Ask]:
        options: dict[str, Any] = {
            "model": self.model,
            "seed": self.args.seed + seed,
            "name": re.sub("[^a-z0-9]+", "-", name).strip("-"),  # valid characters of request ids
        }
        return plan(num, rate_hz, self.args.durations, ("http", "grpc"), api_key=self.keys[tenant], **options)

    def _load(self, name: str, rate_hz: float, num: int, tenant: str) -> Load:
        load = run_load(self._plan(name, rate_hz, num, tenant), self.service.urls, self.args.timeout_s)
        if name != "warm-up":
            self._add(name, load, rate_hz)
        return load

    def _add(self, name: str, load: Load, rate_hz: float) -> None:
        rows = by_protocol(name, load, rate_hz, self.slo, load_average())
        self.report.rows += rows[:1]
        self.report.loads[name] = load
        print(table(rows), file=sys.stderr)

    def _check(self, what: str, measured: str, target: str, met: bool | None) -> None:
        self.report.checks.append((what, measured, target, {True: "met", False: "missed", None: ""}[met]))
        print(self.report.checks[-1], file=sys.stderr)


def _first(outcomes: Sequence[Outcome], percent: float) -> float:
    """Percentile of the time to first audio of admitted requests."""
    values = [o.first_audio_s for o in outcomes if o.first_audio_s is not None]
    return percentile(values, percent) or float("nan")


def _whole(outcomes: Sequence[Outcome], percent: float) -> float:
    """Percentile of the time from planned start to end, of finished requests."""
    return percentile([o.ended_s - o.planned_s for o in outcomes if o.status == "finished"], percent) or float("nan")


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{1000 * value:.1f} ms"


def settings(args: argparse.Namespace, keys: dict[str, str]) -> dict[str, Any]:
    """Service settings: two tenants of equal weight, short admission wait and reader stall timeout."""
    return {
        "models": [model_settings(args, kv_memory_bytes=args.kv_memory_mb * 2**20, max_requests=args.max_requests)],
        "admission": {"max_wait_s": args.max_wait_s},
        "limits": {"reader_stall_s": args.reader_stall_s},
        "access": {
            "open": False,
            "tenants": [{"name": name, "key_sha256": [hash_key(key)]} for name, key in keys.items()],
        },
    }


def plot(report: Report, path: Path) -> None:
    """Plot time to first audio and to rejection of each load, and memory while readers stall."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for name, load in report.loads.items():
        firsts = sorted(o.first_audio_s for o in load.outcomes if o.first_audio_s is not None)
        _step(axes[0], firsts, name)
        _step(axes[1], sorted(1000 * o.answer_s for o in load.outcomes if o.status == "overloaded"), name)
    for name in ("HttpIngress", "GrpcIngress"):
        samples = report.memory.get(name, [])
        axes[2].plot([at for at, _ in samples], [rss / 1e6 for _, rss in samples], label=name)
    axes[0].set(xlabel="time to first audio of admitted requests, s", ylabel="share", ylim=(0, 1))
    axes[1].set(xlabel="time to rejection, ms", ylabel="share", ylim=(0, 1), xlim=(0, 200))
    axes[1].axvline(1000 * REJECT_S, color="black", linewidth=1, linestyle=":")
    axes[2].set(xlabel="s (readers stall from 3 s on)", ylabel="resident MB")
    for axis in axes:
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _step(axis: Any, values: Sequence[float], label: str) -> None:
    if values:
        axis.step(values, [(i + 1) / len(values) for i in range(len(values))], where="post", label=label)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add_model_options(parser)
    add("--url", nargs=2, metavar=("HTTP", "GRPC"), help="URLs of a running service; requires --keys")
    add("--keys", nargs=2, metavar=("STEADY", "FLOOD"), help="API keys of its two tenants")
    add("--factor", type=float, default=3.0)
    add("--duration-s", type=float, default=60.0, help="duration of the overload")
    add("--flood-s", type=float, default=40.0)
    add(
        "--durations",
        type=float,
        nargs="+",
        default=[1.0, 2.0, 3.0],
        help="durations of pieces in seconds, in rotation",
    )
    add("--guess-hz", type=float, default=12.0, help="request rate that saturates the service")
    add("--saturate-s", type=float, default=12.0)
    add("--steady-share", type=float, default=0.25, help="load of the steady tenant over capacity")
    add("--max-requests", type=int, default=8)
    add("--kv-memory-mb", type=int, default=256)
    add("--max-wait-s", type=float, default=2.0)
    add("--readers", type=int, default=20)
    add("--stalled-s", type=float, default=60.0, help="duration of the unread pieces")
    add("--reader-stall-s", type=float, default=5.0)
    add("--reader-watch-s", type=float, default=90.0)
    add("--slo-first-audio", type=float, default=2.0)
    add("--timeout-s", type=float, default=120.0)
    add("--seed", type=int, default=0)
    add("--plot", type=Path, metavar="FILE")
    return parser.parse_args()


def main() -> None:
    args = _parse()
    began = time.time()
    given = args.keys or [new_key() for _ in TENANTS]
    keys = dict(zip(TENANTS, given, strict=True))
    running = nullcontext(Service(*args.url)) if args.url else own_service(settings(args, keys))
    with running as service:
        report = Overload(args, service, keys).run()
    print(f"capacity: {report.capacity_audio_s:.2f} seconds of audio per second, {report.capacity_hz:.2f} requests/s")
    print(table(report.rows))
    print(aligned([("overload", "measured", "target", ""), *report.checks]))
    if args.plot is not None:
        plot(report, args.plot)
    result = {
        "benchmark": "overload",
        "options": {name: value for name, value in vars(args).items() if name not in ("plot", "keys")},
        "seconds": round(time.time() - began, 1),
        "load_average": load_average(),
        "capacity_audio_s": report.capacity_audio_s,
        "capacity_hz": report.capacity_hz,
        "loads": [asdict(row) for row in report.rows],
        "clients": {name: asdict(load.own) for name, load in report.loads.items()},
        "checks": report.checks,
        "stalled": None if report.stalled is None else asdict(report.stalled),
    }
    print(json.dumps(result, default=str))


if __name__ == "__main__":
    main()
