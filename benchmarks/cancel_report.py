"""The cancellation matrix as a table. Measures nothing."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cancel_types import Cell


def merged(path: Path) -> list[Cell]:
    """The cells in a file of JSON lines."""
    return [Cell(**values) for line in path.read_text().splitlines() for values in json.loads(line)["cells"]]


def table(cells: list[Cell]) -> str:
    """One line per cell."""
    head = (
        "method", "phase", "protocol", "ended in phase", "elsewhere", "lost", "released after ms: median", "max",
        "steps: median", "max",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + [row(cell) for cell in cells])


def row(cell: Cell) -> str:
    """One cell, in Markdown."""

    def two(values: Sequence[float], scale: float, digits: int) -> list[str]:
        if not values:
            return ["", ""]
        return [f"{scale * statistics.median(values):.{digits}f}", f"{scale * max(values):.{digits}f}"]

    counts = [str(cell.num_hits), str(cell.num_missed), str(cell.num_lost)]
    columns = [
        cell.way,
        cell.phase,
        cell.protocol,
        *counts,
        *two(cell.release_s, 1e3, 0),
        *two(cell.release_steps, 1, 0),
    ]
    return "| " + " | ".join(columns) + " |"
