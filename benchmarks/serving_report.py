"""Loads as figures, a table and a plot. Measures nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from musicgen_serving.player import Player
from musicgen_serving.request_metrics import CONTINUITY_LIMIT_S

from benchmarks.serving_load import Load, percentile
from benchmarks.serving_plan import Outcome

REJECTS = ("overloaded", "rate_limit_exceeded")
HEADINGS = (
    "load", "offered/s", "protocol", "sent", "finished", "rejected", "other", "audio s/s", "first p50", "p95", "p99",
    "gap p50", "gap p99", "underrun s", "continuous", "goodput/s", "load avg",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Slo:
    """The service-level objective of a request."""

    first_audio_s: float
    buffer_s: float
    """Buffer of the simulated player, which may underrun for at most `CONTINUITY_LIMIT_S`."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Results of one load, over one protocol or both."""

    name: str
    offered_hz: float | None
    """None: all at once."""
    protocol: str
    num_asked: int
    num_finished: int
    num_rejected: int
    others: dict[str, int]
    """By status: neither finished nor rejected."""
    num_without_one_end: int
    """Requests without exactly one terminal status."""
    audio_s_per_s: float
    """Seconds of audio received, over the time from the first request to the last end."""
    first_audio_s: tuple[float | None, float | None, float | None]
    """p50, p95, p99, from the planned time."""
    gap_s: tuple[float | None, float | None]
    """p50, p99 between consecutive chunks of a stream."""
    underrun_s: float
    num_underruns: int
    continuity: float | None
    """Share of finished streams that played without gaps."""
    goodput_hz: float
    """Requests per second that finished within the objective."""
    reject_s: tuple[float | None, float | None]
    """p50, p99 of rejections, from sending to the response."""
    load_average: float


def figures(
    name: str, load: Sequence[Outcome], offered_hz: float | None, slo: Slo, load_average: float, protocol: str = "both"
) -> Figures:
    """Results of a load; a `protocol` other than `both` selects its requests."""
    own = [o for o in load if protocol in ("both", o.protocol)]
    finished = [o for o in own if o.status == "finished"]
    rejected = [o for o in own if o.status in REJECTS]
    players = {o.request_id: _played(o, slo.buffer_s) for o in finished}
    continuous = [o for o in finished if players[o.request_id].underrun_s <= CONTINUITY_LIMIT_S]
    good = [o for o in continuous if (o.first_audio_s or 0.0) <= slo.first_audio_s]
    span_s = max((o.ended_s for o in own), default=0.0) - min((o.sent_s for o in own), default=0.0)
    firsts = [o.first_audio_s for o in finished if o.first_audio_s is not None]
    gaps = [late[0] - early[0] for o in finished for early, late in zip(o.chunks, o.chunks[1:], strict=False)]
    refusals = [o.answer_s for o in rejected]
    return Figures(
        name,
        offered_hz,
        protocol,
        len(own),
        len(finished),
        len(rejected),
        dict(Counter(o.status for o in own if o.status != "finished" and o.status not in REJECTS)),
        sum(o.num_terminal != 1 for o in own),
        sum(o.audio_s for o in own) / span_s if span_s else 0.0,
        (percentile(firsts, 50), percentile(firsts, 95), percentile(firsts, 99)),
        (percentile(gaps, 50), percentile(gaps, 99)),
        sum(player.underrun_s for player in players.values()),
        sum(player.num_underruns for player in players.values()),
        len(continuous) / len(finished) if finished else None,
        len(good) / span_s if span_s else 0.0,
        (percentile(refusals, 50), percentile(refusals, 99)),
        load_average,
    )


def by_protocol(name: str, load: Load, offered_hz: float | None, slo: Slo, load_average: float) -> list[Figures]:
    """Both protocols together, then each, if there are two."""
    protocols = sorted({o.protocol for o in load.outcomes})
    kinds = ["both", *protocols] if len(protocols) > 1 else list(protocols)
    return [figures(name, load.outcomes, offered_hz, slo, load_average, kind) for kind in kinds]


def _played(outcome: Outcome, buffer_s: float) -> Player:
    """A player that has played a finished stream."""
    player = Player(buffer_s)
    for number, (at_s, audio_s) in enumerate(outcome.chunks, start=1):
        player.receive(at_s, audio_s, last=number == len(outcome.chunks))
    return player


def table(rows: Sequence[Figures]) -> str:
    return aligned([HEADINGS, *map(_row, rows)])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Align the columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _row(f: Figures) -> tuple[str, ...]:
    others = ", ".join(f"{count} {status}" for status, count in f.others.items())
    return (
        f.name,
        "at once" if f.offered_hz is None else f"{f.offered_hz:.2f}",
        f.protocol,
        *(str(f.num_asked), str(f.num_finished), str(f.num_rejected), others or "-"),
        f"{f.audio_s_per_s:.2f}",
        *map(seconds, (*f.first_audio_s, *f.gap_s)),
        f"{f.underrun_s:.2f}",
        "-" if f.continuity is None else f"{100 * f.continuity:.0f} %",
        f"{f.goodput_hz:.2f}",
        f"{f.load_average:.1f}",
    )


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def plot(loads: Sequence[tuple[Figures, Sequence[Outcome]]], slo: Slo, path: Path, title: str) -> None:
    """Plot the distribution of time to first audio, and audio received over time, for each load."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for row, load in loads:
        label = row.name
        firsts = sorted(o.first_audio_s for o in load if o.status == "finished" and o.first_audio_s is not None)
        if firsts:
            axes[0].step(firsts, [(i + 1) / len(firsts) for i in range(len(firsts))], where="post", label=label)
        arrivals = sorted((at, audio) for o in load for at, audio in o.chunks)
        total, line = 0.0, []
        for _at, audio in arrivals:
            total += audio
            line.append(total)
        axes[1].plot([at for at, _ in arrivals], line, label=label)
    axes[0].axvline(slo.first_audio_s, color="black", linewidth=1, linestyle=":")
    axes[0].set(xlabel="time to first audio, s", ylabel="share of finished requests", xlim=(0, None), ylim=(0, 1))
    axes[1].set(xlabel="seconds after the load's start", ylabel="seconds of audio received", xlim=(0, None))
    axes[1].legend()
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
