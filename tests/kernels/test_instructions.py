"""Instructions of an attention, a sampling and two quantised linear calls stay within their budget, which is
`instructions.json`. To accept a change: `python tests/kernels/instruction_counts.py --update`.
"""

from __future__ import annotations

import instruction_counts as counting
import native_build
import pytest


@pytest.mark.parametrize("level", counting.LEVELS)
def test_instructions_are_within_budget(level: str) -> None:
    if reason := counting.missing(level) or native_build.unavailable(level):
        pytest.skip(reason)
    entry, made = counting.load()[level], counting.made_of(level)
    if entry["compiler"] != made["compiler"]:
        pytest.skip(f"the budget is for {entry['compiler']}, the kernels were made by {made['compiler']}")
    update = "\nif that is meant: python tests/kernels/instruction_counts.py --update"
    assert entry["flags"] == made["flags"], f"setup.py gives other flags than those of the budget{update}"
    lines = counting.differences(entry["instructions"], counting.count(level))
    assert not lines, "\n".join(lines) + update


def test_the_budget_is_whole() -> None:
    budget = counting.load()
    assert set(budget) == set(counting.LEVELS)
    for entry in budget.values():
        assert set(entry["instructions"]) == set(counting.CASES)
    for case in counting.CASES:  # wider registers, fewer instructions
        assert budget["avx2"]["instructions"][case] < budget["baseline"]["instructions"][case]


def test_a_difference_is_explained() -> None:
    budget = {"a": 1000, "b": 1000, "c": 1000, "gone": 1}
    lines = counting.differences(budget, {"a": 1029, "b": 1031, "c": 900, "new": 7})
    assert lines == [
        "gone: in the budget, not counted any more",
        "b: 1,000 → 1,031 instructions (+3.1%, allowed ±3%); more work for the same result",
        "c: 1,000 → 900 instructions (-10.0%, allowed ±3%); better: lower the budget, so that it stays so",
        "new: 7 instructions, no budget",
    ]
