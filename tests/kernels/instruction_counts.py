"""How many instructions a kernel call takes, counted by valgrind's callgrind: the same number in every run, however
busy the machine is.

    python tests/kernels/instruction_counts.py             compare with instructions.json
    python tests/kernels/instruction_counts.py --update    write the budget anew and say what changed

The calls are those of `counted_calls.py`, on the libraries of the package, one thread; only what runs inside the
kernel's function is counted. Valgrind knows no AVX-512, so that level has no budget.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import native_build  # noqa: E402
from counted_calls import CASES  # noqa: E402

BUDGET = HERE / "instructions.json"
LEVELS = ("baseline", "avx2")
TOLERANCE = 0.03
"""Share by which a count may differ from its budget, in either direction."""

Counts = dict[str, int]
"""Case → instructions."""

_FUNCTIONS = {
    "attention": "{0}::paged_attention({0}::KVPages const&, {0}::RaggedRows const&, bool, float const*, long, long, "
    "float, float*, int)",
    "sampling": "{0}::delayed_sample_step({0}::SampleArguments const&, int)",
    "linear": "{0}::linear({0}::PackedMatrix const&, float const*, {0}::LinearOutput const&, long, int)",
}
"""First word of a case's name → what callgrind calls the function, with {0} for the level's namespace."""


def missing(level: str) -> str | None:
    """Why a level cannot be counted here; None if it can."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed: instructions are not counted"
    if native_build.library(level) is None:
        return f"the kernels are not built for {level}"
    return None


def count(level: str) -> Counts:
    """Run every case of a level under callgrind.

    Raises:
        RuntimeError: valgrind failed, or did not find the kernels' functions.
    """
    counts: Counts = {}
    for word, function in _FUNCTIONS.items():  # one at a time: callgrind mixes up the options of several functions
        cases = [name for name in CASES if name.split()[0] == word]
        counts |= zip(cases, _totals(level, function.format(f"mgk::{level}"), cases), strict=True)
    return counts


def _totals(level: str, function: str, cases: list[str]) -> list[int]:
    """Instructions between entering and leaving the function, for each case."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        tool = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}"]
        tool += [f"--zero-before={function}", f"--dump-after={function}"]
        script = [str(HERE / "counted_calls.py"), level, str(native_build.library(level)), *cases]
        done = subprocess.run([*tool, sys.executable, "-I", "-S", *script], capture_output=True, text=True)
        dumps = [Path(f"{out}.{i + 1}") for i in range(len(cases))]
        if done.returncode or not all(dump.exists() for dump in dumps):
            raise RuntimeError(f"{' '.join(tool + script)}\n{done.stderr}")
        totals = [re.findall(r"^totals: (\d+)$", dump.read_text(), re.MULTILINE) for dump in dumps]
    return [int(total) for (total,) in totals]


def made_of(level: str) -> dict[str, Any]:
    """What a count depends on beside the sources: compiler and flags."""
    path = native_build.library(level)
    return {"compiler": native_build.compiler(path) if path else "none", "flags": native_build.flags(level)}


def load() -> dict[str, Any]:
    """The checked-in budget: level → {"compiler": …, "flags": …, "instructions": Counts}."""
    budget: dict[str, Any] = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    return budget


def differences(budget: Counts, counts: Counts) -> list[str]:
    """Cases outside the tolerance, one line each, with what it means."""
    lines = [f"{name}: in the budget, not counted any more" for name in budget if name not in counts]
    for name, got in counts.items():
        if name not in budget:
            lines.append(f"{name}: {got:,} instructions, no budget")
            continue
        change = got / budget[name] - 1
        if abs(change) > TOLERANCE:
            meaning = "more work for the same result" if change > 0 else "better: lower the budget, so that it stays so"
            told = f"{budget[name]:,} → {got:,} instructions ({change:+.1%}, allowed ±{TOLERANCE:.0%})"
            lines.append(f"{name}: {told}; {meaning}")
    return lines


def main() -> int:
    """Compare or update; exit status 1 if something differs or could not be counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--level", nargs="+", choices=LEVELS, default=list(LEVELS))
    options = parser.parse_args()
    budget, lines = load(), []
    for level in options.level:
        if reason := missing(level):
            lines.append(f"{level}: {reason}")
            continue
        counts, entry = count(level), budget.get(level, {"instructions": {}})
        lines += [f"{level} {line}" for line in differences(entry["instructions"], counts)]
        now = made_of(level)
        lines += [f"{level}: {key} {entry.get(key)} → {now[key]}" for key in now if entry.get(key) != now[key]]
        budget[level] = {**now, "instructions": counts}
    print("\n".join(lines) or "within the budget")
    if options.update:
        BUDGET.write_text(json.dumps(budget, indent=1, sort_keys=True) + "\n")
    return bool(lines) and not options.update


if __name__ == "__main__":
    sys.exit(main())
