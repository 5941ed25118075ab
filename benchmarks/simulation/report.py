"""Outcomes → figures, table and JSON. Every table is labelled as simulated."""

from __future__ import annotations

import csv
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.simulation.cluster import Run
from benchmarks.simulation.job import End, Outcome

NOTICE = "simulated; no GPU was measured"
AUDIBLE_S = 0.1
"""A piece with more underrun than this counts as broken."""
CSV_COLUMNS = (
    *("number", "arrived_s", "tenant", "kind", "num_new_frames", "replica", "end"),
    *("queue_s", "first_audio_s", "underrun_s", "made_s"),
)
QUANTILES = (0.5, 0.95, 0.99)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Spread:
    """Three quantiles in seconds; infinite if too many requests have no value."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Floats) -> Spread:
        if not len(values):
            return cls(math.nan, math.nan, math.nan)
        return cls(*(float(q) for q in np.quantile(values, QUANTILES, method="inverted_cdf")))


@dataclass(frozen=True, slots=True)
class Summary:
    """One run. Figures cover requests that arrived in the measured interval, and replicas within it."""

    num_replicas: int
    offered_load: float
    """Fraction of the closed-form capacity."""
    rate_hz: float
    listeners: float
    """Mean number of concurrent listeners: rate × mean duration."""
    num_requests: int
    num_finished: int
    num_left: int
    num_rejected: int
    num_unheard: int
    """Disconnected before the first audio; excluded from the quantiles."""
    first_audio_s: Spread
    """Rejected requests count as infinite."""
    queue_s: Spread
    underrun_ratio: float
    """Seconds of underrun per second of music, over finished pieces."""
    underrun_share: float
    """Share of finished pieces with any underrun."""
    broken_share: float
    """Share of finished pieces with more than 0.1 s of underrun."""
    goodput_hz: float
    """Requests per second that finished, started within the objective and had at most 0.1 s of underrun."""
    goodput_share: float
    frames_s: float
    """Decode steps of all streams, per second and replica."""
    streams_a_step: float
    step_s: float
    busy_share: float
    pages_mean: float
    """Mean share of pages held over time."""
    pages_most: float
    fairness_gap: float
    """Maximum gap between two waiting tenants, in weighted row-frames, on the worst replica."""
    fairness_bound: float
    """Twice the most expensive request."""
    first_audio_p95_s: dict[str, float] = field(default_factory=dict)
    """By tenant."""


def summarise(
    run: Run, *, offered_load: float, rate_hz: float, first_audio_slo_s: float, mean_duration_s: float
) -> Summary:
    """Summarize a run."""
    begin, end = run.config.measured_s
    outcomes = [o for o in run.outcomes if begin <= o.request.arrived_s < end]
    finished = [o for o in outcomes if o.end is End.FINISHED]
    unheard = [o for o in outcomes if o.end is End.LEFT and math.isinf(o.first_audio_s)]
    heard = [o for o in outcomes if not (o.end is End.LEFT and math.isinf(o.first_audio_s))]
    good = [o for o in finished if o.first_audio_s <= first_audio_slo_s and o.underrun_s <= AUDIBLE_S]
    frame_rate = run.config.model.frame_rate_hz
    music_s = sum(o.request.num_new for o in finished) / frame_rate
    uses, span_s = run.uses, end - begin
    num_steps = sum(use.num_steps for use in uses)
    stream_steps = sum(use.stream_steps for use in uses)
    busy_s = sum(use.busy_s for use in uses)
    total_page_s = run.config.num_pages * len(uses) * span_s
    by_tenant = {
        tenant: Spread.of(_first_audio(o for o in heard if o.request.tenant.name == tenant)).p95
        for tenant in sorted({o.request.tenant.name for o in heard})
    }
    return Summary(
        num_replicas=len(uses),
        offered_load=offered_load,
        rate_hz=rate_hz,
        listeners=rate_hz * mean_duration_s,
        num_requests=len(outcomes),
        num_finished=len(finished),
        num_left=sum(o.end is End.LEFT for o in outcomes),
        num_rejected=sum(o.end is End.REJECTED for o in outcomes),
        num_unheard=len(unheard),
        first_audio_s=Spread.of(_first_audio(heard)),
        queue_s=Spread.of(np.array([o.queue_s for o in outcomes if math.isfinite(o.queue_s)])),
        underrun_ratio=sum(o.underrun_s for o in finished) / max(music_s, 1e-9),
        underrun_share=sum(o.num_underruns > 0 for o in finished) / max(len(finished), 1),
        broken_share=sum(o.underrun_s > AUDIBLE_S for o in finished) / max(len(finished), 1),
        goodput_hz=len(good) / span_s,
        goodput_share=len(good) / max(len(outcomes), 1),
        frames_s=stream_steps / span_s / len(uses),
        streams_a_step=stream_steps / max(num_steps, 1),
        step_s=busy_s / max(num_steps, 1),
        busy_share=busy_s / span_s / len(uses),
        pages_mean=sum(use.page_s for use in uses) / total_page_s,
        pages_most=max(use.most_pages for use in uses) / run.config.num_pages,
        fairness_gap=max(gap.widest for gap in run.fairness),
        fairness_bound=2 * max(gap.dearest for gap in run.fairness),
        first_audio_p95_s=by_tenant,
    )


def _first_audio(outcomes: object) -> Floats:
    return np.array([o.first_audio_s for o in outcomes])  # type: ignore[attr-defined]


def _ms(spread: Spread) -> str:
    return " / ".join(f"{value:.2f}" for value in (spread.p50, spread.p95, spread.p99))


def table(summaries: list[Summary]) -> str:
    """One column per run."""
    rows = [
        ("replicas", [f"{s.num_replicas}" for s in summaries]),
        ("load, of closed-form capacity", [f"{s.offered_load:.0%}" for s in summaries]),
        ("requests/s", [f"{s.rate_hz:.2f}" for s in summaries]),
        ("concurrent listeners", [f"{s.listeners:.0f}" for s in summaries]),
        ("requests measured", [f"{s.num_requests}" for s in summaries]),
        ("finished / left / rejected", [f"{s.num_finished} / {s.num_left} / {s.num_rejected}" for s in summaries]),
        ("first audio p50 / p95 / p99 (s)", [_ms(s.first_audio_s) for s in summaries]),
        ("queue time p50 / p95 / p99 (s)", [_ms(s.queue_s) for s in summaries]),
        ("underrun ratio", [f"{s.underrun_ratio:.3%}" for s in summaries]),
        ("pieces with any underrun", [f"{s.underrun_share:.2%}" for s in summaries]),
        ("pieces with > 0.1 s of underrun", [f"{s.broken_share:.2%}" for s in summaries]),
        ("goodput (requests/s; share)", [f"{s.goodput_hz:.2f}; {s.goodput_share:.2%}" for s in summaries]),
        ("stream-steps/s per replica", [f"{s.frames_s:.0f}" for s in summaries]),
        ("streams per step; step (ms)", [f"{s.streams_a_step:.1f}; {s.step_s * 1e3:.2f}" for s in summaries]),
        ("busy", [f"{s.busy_share:.1%}" for s in summaries]),
        ("pages in use, mean; maximum", [f"{s.pages_mean:.1%}; {s.pages_most:.1%}" for s in summaries]),
        ("fairness gap; bound", [f"{s.fairness_gap:.0f}; {s.fairness_bound:.0f}" for s in summaries]),
    ]
    names = sorted({name for s in summaries for name in s.first_audio_p95_s})
    rows += [
        (f"first audio p95, {name} (s)", [f"{s.first_audio_p95_s.get(name, math.nan):.2f}" for s in summaries])
        for name in names
    ]
    width = max(len(cell) for _, cells in rows for cell in cells)
    lines = [f"{name:<32}" + "".join(f"  {cell:>{width}}" for cell in cells) for name, cells in rows]
    return "\n".join([f"-- {NOTICE} --", *lines])


def as_json(summary: Summary) -> dict[str, object]:
    """JSON-compatible values: infinite and undefined numbers become null."""
    cleaned: dict[str, object] = _clean(asdict(summary))  # type: ignore[assignment]
    return cleaned


def _clean(value: object) -> object:
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def write_csv(path: Path, outcomes: list[Outcome]) -> None:
    """Write one line per request."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        for o in outcomes:
            request = o.request
            asked = [request.number, f"{request.arrived_s:.6f}", request.tenant.name, request.kind, request.num_new]
            times = [f"{value:.6f}" for value in (o.queue_s, o.first_audio_s, o.underrun_s, o.made_s)]
            writer.writerow([*asked, o.replica, o.end.value, *times])
