"""Plots of runs. Every plot is labelled as simulated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.simulation.cluster import Run
from benchmarks.simulation.job import End
from benchmarks.simulation.report import NOTICE, Floats, Summary

NUM_BINS = 60


def draw(
    path: Path,
    runs: list[tuple[str, Run, Summary]],
    title: str,
    *,
    slo_s: float,
    by_replicas: bool = False,
) -> None:
    """Four panels: first audio, underruns, occupancy over time, and a comparison of the runs.

    Args:
        runs: label, run, summary; each is one line.
        by_replicas: compare over the number of replicas, else over load.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\n({NOTICE})", fontsize=10)
    axes = figure.subplots(2, 2)
    _beyond(axes[0, 0], runs, "first_audio_s", "time to first audio (s)")
    axes[0, 0].axvline(slo_s, color="black", linestyle=":", linewidth=1)
    axes[0, 0].text(slo_s, 1, " objective", va="top", fontsize=7)
    _beyond(axes[0, 1], runs, "underrun_s", "underrun of a piece (s)")
    _over_time(axes[1, 0], runs)
    if len(runs) > 1:
        _side_by_side(axes[1, 1], [summary for _, _, summary in runs], slo_s, by_replicas)
    else:
        _pages(axes[1, 1], runs[0][1])
    figure.savefig(path, dpi=90)


def _beyond(ax: Any, runs: list[tuple[str, Run, Summary]], name: str, label: str) -> None:
    """Share of pieces beyond x."""
    for text, run, _ in runs:
        begin, end = run.config.measured_s
        finished = [o for o in run.outcomes if o.end is End.FINISHED and begin <= o.request.arrived_s < end]
        values = np.sort([getattr(o, name) for o in finished])
        beyond = 1 - np.arange(len(values)) / max(len(values), 1)
        shown = values > 0
        ax.plot(values[shown], beyond[shown], label=text if shown.any() else f"{text}: none")
    ax.set(xlabel=label, ylabel="share of pieces beyond")
    if any(len(line.get_xdata()) for line in ax.get_lines()):
        ax.set(xscale="log", yscale="log")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7)


def _binned(run: Run, values: Floats) -> tuple[Floats, Floats]:
    """Means over equal time intervals."""
    times = np.array([look.at_s for look in run.looks])
    edges = np.linspace(0, times[-1] * (1 + 1e-9), NUM_BINS + 1)
    index = np.digitize(times, edges) - 1
    counts = np.bincount(index, minlength=NUM_BINS)[:NUM_BINS]
    sums = np.bincount(index, weights=values, minlength=NUM_BINS)[:NUM_BINS]
    some = counts > 0
    return ((edges[1:] + edges[:-1]) / 2)[some], sums[some] / counts[some]


def _over_time(ax: Any, runs: list[tuple[str, Run, Summary]]) -> None:
    for i, (text, run, _) in enumerate(runs):
        running = np.array([look.num_running for look in run.looks], dtype=np.float64)
        waiting = np.array([look.num_waiting for look in run.looks], dtype=np.float64)
        ax.plot(*_binned(run, running), color=f"C{i}", label=f"{text}: running")
        ax.plot(*_binned(run, waiting), color=f"C{i}", linestyle=":")
    ax.set(xlabel="simulated time (s)", ylabel="requests per replica (dotted: waiting)")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7)


def _pages(ax: Any, run: Run) -> None:
    share = np.array([look.page_share for look in run.looks])
    ax.plot(*_binned(run, 100 * share))
    ax.set(xlabel="simulated time (s)", ylabel="pages held (%)", ylim=(0, 100))
    ax.grid(alpha=0.3)


def _side_by_side(ax: Any, summaries: list[Summary], slo_s: float, by_replicas: bool) -> None:
    ordered = sorted(summaries, key=lambda s: s.num_replicas if by_replicas else s.offered_load)
    x = [s.num_replicas if by_replicas else 100 * s.offered_load for s in ordered]
    ax.plot(x, [s.first_audio_s.p95 for s in ordered], "o-", label="first audio p95 (s)")
    ax.plot(x, [s.first_audio_s.p99 for s in ordered], "o-", label="first audio p99 (s)")
    ratios = [100 * s.underrun_ratio for s in ordered]
    ax.plot(x, ratios, "s--", color="C3", label="underrun ratio (%)")
    ax.axhline(slo_s, color="black", linestyle=":", linewidth=1)
    ax.set(xlabel="replicas" if by_replicas else "load (% of closed-form capacity)", yscale="log")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7)
