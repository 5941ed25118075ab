"""What was seen while replicas were killed, added up over runs, as a table. Measures nothing."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Kill:
    """One replica that was killed."""

    kind: str
    num_replicas: int
    """Of this kind, before."""
    silence_s: float = 0.0
    """The longest time without audio of a listener, of such times that overlap with the seconds after it."""
    replaced_s: float | None = None
    """Until as many replicas ran as before; None: not seen."""


@dataclass(slots=True)
class Outcome:
    """One run."""

    group: str
    num_replicas: int
    num_streams: int
    kills: list[Kill] = field(default_factory=list)
    num_finished: int = 0
    num_different: int = 0
    """Finished, with other audio than undisturbed."""
    num_failed: int = 0
    """Taken in and not finished."""
    num_refused: int = 0
    """Not taken in."""
    errors: dict[str, int] = field(default_factory=dict)
    num_quiet: int = 0
    """Pieces that finished before the first kill."""
    quiet_silences_s: list[float] = field(default_factory=list)
    """The longest time without audio of a listener, in intervals before the first kill."""
    quiet_underruns_s: list[float] = field(default_factory=list)
    """Of pieces before the first kill whose player fell silent, the seconds of silence."""
    underruns_s: list[float] = field(default_factory=list)
    """The same from then on."""


def merged(path: Path) -> list[Outcome]:
    """The outcomes in a file of JSON lines, those of equal conditions added up."""
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
    """In Markdown: for each kind its kills, for each run its pieces."""
    head = ("killed", "replicas", "kills", "longest silence s: median", "max", "replaced after s: median", "max")
    lines = [_line(head), _line(["---"] * len(head))]
    for outcome in outcomes:
        lines.append(_line(["(none, before)", "", "", *_two(outcome.quiet_silences_s), "", ""]))
        for kind in dict.fromkeys(kill.kind for kill in outcome.kills):
            kills = [kill for kill in outcome.kills if kill.kind == kind]
            replaced_s = [kill.replaced_s for kill in kills if kill.replaced_s is not None]
            silences_s = [kill.silence_s for kill in kills]
            row = [kind, str(kills[0].num_replicas), str(len(kills)), *_two(silences_s), *_two(replaced_s)]
            lines.append(_line(row))
    head = ("group", "finished", "other audio", "failed", "refused", "pieces with a gap", "gap s: median", "max")
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
