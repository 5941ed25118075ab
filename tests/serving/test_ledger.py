"""Usage lines as they are on disk, and counts that agree with the registry or say so."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from musicgen_serving.ledger import Ledger, UsageLine

from musicgen.errors import InvalidRequestError
from musicgen.types import FinishReason

TIME = 1_700_000_000.25


def line(request_id: str = "r", reason: FinishReason = FinishReason.FINISHED, **fields: Any) -> UsageLine:
    values: dict[str, Any] = {
        "tenant": "a",
        "tenant_class": "paid",
        "model": "demo",
        "asked_s": 10.0,
        "billed_s": 7.123456,
        "time_to_first_audio_s": 0.25,
        "total_s": 3.5,
        "num_failovers": 1,
        "error_code": None,
    }
    return UsageLine(request_id, reason=reason, **(values | fields))


def test_a_line_is_on_disk_when_the_request_has_ended(tmp_path: Path) -> None:
    file = tmp_path / "usage.jsonl"
    ledger = Ledger(file)
    ledger.admit("paid", "demo")
    ledger.end(line("r\n1"), TIME)
    (text,) = file.read_text().splitlines()
    assert json.loads(text) == {
        "time": "2023-11-14T22:13:20.250+00:00",
        "request_id": "r\n1",
        "tenant": "a",
        "tenant_class": "paid",
        "model": "demo",
        "reason": "finished",
        "asked_s": 10.0,
        "billed_s": 7.123,
        "time_to_first_audio_s": 0.25,
        "total_s": 3.5,
        "num_failovers": 1,
        "error_code": None,
    }
    ledger.close()


def test_lines_are_added_after_what_is_there_and_after_a_line_that_was_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "usage.jsonl"
    for text, kept in (("", 0), ('{"old": 1}\n', 1), ('{"old": 1}\n{"cut', 2)):
        file.write_text(text)
        ledger = Ledger(file)
        ledger.end(line(), TIME)
        ledger.close()
        lines = file.read_text().splitlines()
        assert "\n".join(lines[:kept]) == text.strip()
        assert [json.loads(new)["request_id"] for new in lines[kept:]] == ["r"]


def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="usage_file"):
        Ledger(tmp_path / "no folder" / "usage.jsonl")


def test_a_disk_that_fails_later_loses_lines_but_no_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger(tmp_path / "usage.jsonl")
    ledger.close()
    ledger.admit("paid", "demo")
    ledger.end(line("r-7"), TIME)
    assert ledger.num_lines_lost == ledger.counts({}).num_lines_lost == 1
    assert "r-7" in caplog.text
    ledger.check(Counter())


def test_counts_by_class_and_model() -> None:
    ledger = Ledger(None)
    for kind, model in (("paid", "demo"), ("paid", "demo"), ("paid", "large"), ("free", "demo"), ("free", "demo")):
        ledger.admit(kind, model)
    ledger.end(line(), TIME)
    ledger.end(line(reason=FinishReason.CANCELLED, tenant_class="free"), TIME)
    ledger.end(line(reason=FinishReason.FAILED, tenant_class="free"), TIME)
    ledger.reject("free", "demo", "overloaded")
    counts = ledger.counts({})
    assert counts.admitted == {("paid", "demo"): 2, ("paid", "large"): 1, ("free", "demo"): 2}
    assert counts.finished == {("paid", "demo"): 1}
    assert counts.cancelled == counts.failed == {("free", "demo"): 1}
    assert counts.rejected == {("free", "demo", "overloaded"): 1}
    assert counts.running_by == {("paid", "demo"): 1, ("paid", "large"): 1, ("free", "demo"): 0}
    ledger.check(Counter({("paid", "demo"): 1, ("paid", "large"): 1}))


@pytest.mark.parametrize(
    "running",
    [
        Counter(),
        Counter({("paid", "demo"): 2}),
        Counter({("free", "demo"): 1}),
        Counter({("paid", "demo"): 1, ("free", "demo"): 1}),
    ],
)
def test_books_that_do_not_balance_are_found(running: Counter[tuple[str, str]]) -> None:
    ledger = Ledger(None)
    ledger.admit("paid", "demo")
    with pytest.raises(RuntimeError, match="ledger"):
        ledger.check(running)


def test_an_end_without_an_admission_is_found() -> None:
    ledger = Ledger(None)
    ledger.end(line(), TIME)
    with pytest.raises(RuntimeError, match="ledger"):
        ledger.check(Counter())
