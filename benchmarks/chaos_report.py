"""Results of killing replicas, merged over runs, as a table. Measures nothing."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Kill:
    """One killed replica."""

    kind: str
    num_replicas: int
    """Replicas of this kind before the kill."""
    silence_s: float = 0.0
    """The longest interval without audio at any listener that overlaps the time after the kill."""
    replaced_s: float | None = None
    """Time until the original number of replicas was running again; None: not observed."""


@dataclass(slots=True)
class Outcome:
    """One run."""

    group: str
    num_replicas: int
    num_streams: int
    kills: list[Kill] = field(default_factory=list)
    num_finished: int = 0
    num_different: int = 0
    """Finished with audio that differs from the undisturbed piece."""
    num_failed: int = 0
    """Admitted, but not finished."""
    num_refused: int = 0
    """Not admitted."""
    errors: dict[str, int] = field(default_factory=dict)
    num_quiet: int = 0
    """Pieces that finished before the first kill."""
    quiet_silences_s: list[float] = field(default_factory=list)
    """The longest interval without audio at any listener, in intervals before the first kill."""
    quiet_underruns_s: list[float] = field(default_factory=list)
    """Underrun of each piece with one, before the first kill."""
    underruns_s: list[float] = field(default_factory=list)
    """The same after the first kill."""


def merged(path: Path) -> list[Outcome]:
    """The outcomes in a file of JSON lines; outcomes with equal conditions are merged."""
    found: dict[tuple[str, int, int], Outcome] = {}
    for line in path.read_text().splitlines():
        values: dict[str, Any] = json.loads(line)
        del values["benchmark"]
        new = Outcome(**values | {"kills": [Kill(**kill) for kill in values["kills"]]})
        key = (new.group, new.num_replicas, new.num_streams)
        if key in found:
            _add(found[key], new)
        else:
            found[key] = new
    return list(found.values())


def _add(known: Outcome, new: Outcome) -> None:
    for name in ("kills", "quiet_silences_s", "quiet_underruns_s", "underruns_s"):
        getattr(known, name).extend(getattr(new, name))
    for name in ("num_finished", "num_different", "num_failed", "num_refused", "num_quiet"):
        setattr(known, name, getattr(known, name) + getattr(new, name))
    for error, count in new.errors.items():
        known.errors[error] = known.errors.get(error, 0) + count


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown tables: kills by kind, and pieces by run."""
    head = ("killed", "replicas", "kills", "longest silence s: median", "max", "replaced after s: median", "max")
    lines = [_line(head), _line(["---"] * len(head))]
    for outcome in outcomes:
        lines.append(_line(["(before any kill)", "", "", *_two(outcome.quiet_silences_s), "", ""]))
        for kind in dict.fromkeys(kill.kind for kill in outcome.kills):
            kills = [kill for kill in outcome.kills if kill.kind == kind]
            replaced_s = [kill.replaced_s for kill in kills if kill.replaced_s is not None]
            silences_s = [kill.silence_s for kill in kills]
            row = [kind, str(kills[0].num_replicas), str(len(kills)), *_two(silences_s), *_two(replaced_s)]
            lines.append(_line(row))
    head = ("group", "finished", "different audio", "failed", "rejected", "pieces with a gap", "gap s: median", "max")
    lines += ["", _line(head), _line(["---"] * len(head))]
    for o in outcomes:
        counts = [o.num_finished, o.num_different, o.num_failed, o.num_refused]
        quiet = f"{len(o.underruns_s)} (before: {len(o.quiet_underruns_s)} of {o.num_quiet})"
        lines.append(_line([o.group, *map(str, counts), quiet, *_two(o.underruns_s)]))
        lines += [f"- {count} × {error}" for error, count in o.errors.items()]
    return "\n".join(lines)


def _two(seconds: Sequence[float]) -> list[str]:
    return [f"{statistics.median(seconds):.2f}", f"{max(seconds):.2f}"] if seconds else ["", ""]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
