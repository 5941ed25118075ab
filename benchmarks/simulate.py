"""Capacity planning beyond this machine: the real scheduler on a virtual clock, with 1 to 1,000 replicas.

    python -m benchmarks.simulate --help

All results are simulated; no GPU was measured. See docs/capacity.md for what is modelled and what is not.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

from benchmarks.simulation import options as cli
from benchmarks.simulation.arrivals import Arrivals
from benchmarks.simulation.capacity import Capacity, capacity
from benchmarks.simulation.cells import run_cells
from benchmarks.simulation.cluster import Run, run
from benchmarks.simulation.plot import draw
from benchmarks.simulation.report import NOTICE, Summary, as_json, summarise, table, write_csv
from benchmarks.simulation.search import fewest
from musicgen.errors import InvalidRequestError

NUM_SAMPLED = 2000
"""Sample size of the closed form's averages."""
WARM_UP_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Plan:
    """One simulation to run."""

    options: argparse.Namespace
    num_replicas: int
    rate_hz: float
    capacity: Capacity

    @property
    def load(self) -> float:
        return self.rate_hz / (self.capacity.requests_s * self.num_replicas)


def simulate(plan: Plan) -> tuple[Run, Summary]:
    """Run one plan; prints progress to stderr."""
    options, settings = plan.options, cli.settings(plan.options)
    arrivals = Arrivals(options.arrivals, plan.rate_hz, options.burstiness)
    requests = settings.mix.draw(options.requests, arrivals, settings.replica.model, options.seed)
    measured_s = (requests[int(len(requests) * WARM_UP_SHARE)].arrived_s, requests[-1].arrived_s)
    config = replace(settings.replica, measured_s=measured_s)
    where = {"balancing": options.balancing, "seed": options.seed}
    if options.cells > 1:
        result = run_cells(requests, plan.num_replicas, config, num_cells=options.cells, **where)
    else:
        result = run(requests, plan.num_replicas, config, on_progress=_progress(plan), **where)
    mean_frames = sum(request.num_new for request in requests) / len(requests)
    summary = summarise(
        result,
        offered_load=plan.load,
        rate_hz=plan.rate_hz,
        first_audio_slo_s=options.slo_first_audio,
        mean_duration_s=mean_frames / settings.replica.model.frame_rate_hz,
    )
    return result, summary


def _progress(plan: Plan) -> Callable[[int, int], None]:
    began = time.monotonic()

    def report(sent: int, total: int) -> None:
        if sent % max(1000, total // 20 // 1000 * 1000) == 0:
            spent = time.monotonic() - began
            print(
                f"{plan.num_replicas} replicas, load {plan.load:.0%}: {sent} of {total}, {spent:.0f} s",
                file=sys.stderr,
            )

    return report


def _capacity(options: argparse.Namespace) -> tuple[Capacity, float]:
    """Capacity of one replica, and the mean requested duration."""
    settings = cli.settings(options)
    replica = settings.replica
    sample = settings.mix.draw(NUM_SAMPLED, Arrivals("poisson", 1.0), replica.model, options.seed)
    of_one = capacity(sample, replica.model, replica.step_time, replica.num_pages, replica.scheduler)
    return of_one, of_one.frames_s / of_one.requests_s / replica.model.frame_rate_hz


def _rates(options: argparse.Namespace, of_one: Capacity, duration_s: float) -> list[float]:
    if options.rate is not None:
        return [options.rate]
    if options.listeners is not None:
        return [options.listeners / duration_s]
    return [load * of_one.requests_s * options.replicas for load in options.load or [0.8]]


def _search(options: argparse.Namespace, rate_hz: float, of_one: Capacity) -> tuple[int, list[tuple[Run, Summary]]]:
    """The minimum number of replicas that meets the objective, and all runs of the search."""
    runs: dict[int, tuple[Run, Summary]] = {}

    def meets(num_replicas: int) -> bool:
        runs[num_replicas] = simulate(Plan(options, num_replicas, rate_hz, of_one))
        s = runs[num_replicas][1]
        ok = s.first_audio_s.p95 <= options.slo_first_audio
        ok = ok and (options.slo_underrun is None or s.underrun_ratio <= options.slo_underrun)
        print(
            f"{num_replicas:>5} replicas: first audio p95 {s.first_audio_s.p95:.2f} s, underrun ratio "
            f"{s.underrun_ratio:.3%}: {'enough' if ok else 'too few'}  ({NOTICE})"
        )
        return ok

    found = fewest(meets, start=max(1, math.ceil(rate_hz / of_one.requests_s)))
    return found, [runs[num] for num in sorted(runs)]


def _print_setting(options: argparse.Namespace, of_one: Capacity) -> None:
    replica = cli.settings(options).replica
    print(f"-- {NOTICE} --")
    print(f"step: {replica.step_time.describe()}")
    print(f"pages: {replica.num_pages}; balancing: {options.balancing}; arrivals: {options.arrivals}")
    print(
        f"closed form, one saturated replica: {of_one.num_streams:.0f} streams, "
        f"{of_one.step_s * 1e3:.1f} ms per step, {of_one.requests_s:.2f} requests/s, "
        f"{of_one.real_time_streams:.0f} listeners"
    )


def main(arguments: list[str] | None = None) -> int:
    """Parse the options, simulate, print; returns the exit status."""
    options = cli.parser().parse_args(arguments)
    began = time.monotonic()
    try:
        of_one, duration_s = _capacity(options)
        rates = _rates(options, of_one, duration_s)
        _print_setting(options, of_one)
        found = None
        if options.find_replicas:
            found, results = _search(options, rates[0], of_one)
        else:
            results = _run_all([Plan(options, options.replicas, rate, of_one) for rate in rates], options.processes)
    except InvalidRequestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    summaries = [summary for _, summary in results]
    print(table(summaries))
    if found is not None:
        print(f"replicas needed: {found}")
    _write(options, results)
    report = {
        "note": NOTICE,
        "command": vars(options) | {name: str(getattr(options, name)) for name in ("plot", "csv", "step_table")},
        "replicas_needed": found,
        "wall_s": round(time.monotonic() - began, 1),
        "runs": [as_json(summary) for summary in summaries],
    }
    print(json.dumps(report, default=str).replace("Infinity", "null"))
    return 0


def _run_all(plans: list[Plan], num_processes: int) -> list[tuple[Run, Summary]]:
    if num_processes == 1 or len(plans) == 1:
        return [simulate(plan) for plan in plans]
    with ProcessPoolExecutor(min(num_processes, len(plans))) as pool:
        return list(pool.map(simulate, plans))


def _write(options: argparse.Namespace, results: list[tuple[Run, Summary]]) -> None:
    if options.csv is not None:
        write_csv(options.csv, results[-1][0].outcomes)
    if options.plot is not None:
        label = "{0.num_replicas} replicas" if options.find_replicas else "load {0.offered_load:.0%}"
        title = f"{options.model} on {options.gpu}, {options.weights} weights, {options.kv} KV"
        if not options.find_replicas:
            title += f", {options.replicas} replicas"
        draw(
            options.plot,
            [(label.format(summary), result, summary) for result, summary in results],
            title,
            slo_s=options.slo_first_audio,
            by_replicas=options.find_replicas,
        )


if __name__ == "__main__":
    sys.exit(main())
