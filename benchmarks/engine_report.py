"""Figures as a table and a plot. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.engine_cases import Figure

HEADINGS = (
    "case",
    "figure",
    "value",
    "bound",
    "of bound",
    "transformers",
    "×",
    "target",
    "GB/s",
    "drift",
    "others",
    "load",
)


def table(figures: Sequence[Figure]) -> str:
    """One line per figure. The columns after the target describe the machine during the measurement: read bandwidth,
    ratio of largest to smallest probe, cores kept busy by other processes, load average."""
    rows = [HEADINGS, *map(_row, figures)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def plot(figures: Sequence[Figure], path: Path) -> None:
    """Bar charts of the fraction of the bound and of the ratio to transformers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bounded = [f for f in figures if f.bound_ratio is not None and "overhead" not in f.case]
    beside = [f for f in figures if f.peer_ratio is not None]
    figure, axes = plt.subplots(
        1, 2, figsize=(13, 1.5 + 0.32 * max(len(bounded), len(beside), 1)), layout="constrained"
    )
    axes[0].barh([_label(f) for f in bounded], [100 * (f.bound_ratio or 0) for f in bounded], color="#4477aa")
    axes[0].axvline(60, color="black", linewidth=1, linestyle=":")
    axes[0].set_xlabel("% of the bound of the same run")
    axes[1].barh([_label(f) for f in beside], [f.peer_ratio or 0 for f in beside], color="#cc6677")
    axes[1].axvline(1, color="black", linewidth=1)
    axes[1].set_xlabel("× transformers in fp32")
    for axis in axes:
        axis.invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _label(figure: Figure) -> str:
    return f"{figure.case}: {figure.name}"


def _row(figure: Figure) -> tuple[str, ...]:
    machine = ("", "", "", "")
    if (r := figure.reading) is not None:
        machine = (
            f"{r.stream_bytes_s / 1e9:.1f}",
            f"{r.stream_drift:.2f}",
            f"{r.others_cores:.2f}",
            f"{r.load_average:.1f}",
        )
    return (
        *(figure.case, figure.name, f"{_number(figure.value)} {figure.unit}", _number(figure.bound)),
        *("" if figure.bound_ratio is None else f"{100 * figure.bound_ratio:.0f} %", _number(figure.peer)),
        *("" if figure.peer_ratio is None else f"{figure.peer_ratio:.2f}", figure.target, *machine),
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
