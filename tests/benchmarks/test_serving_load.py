"""The load of the service's benchmarks: when requests are sent, what is made of their outcomes, and one real run."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from benchmarks.autoscaling import step_plan
from benchmarks.fuzz_serving import SETTINGS, problems, settled
from benchmarks.serving_fuzzers import FUZZERS, Findings
from benchmarks.serving_load import percentile, run_load
from benchmarks.serving_local import Held, LocalProcess, local_process
from benchmarks.serving_plan import Outcome, asks, outcomes, plan, to_lines
from benchmarks.serving_report import Slo, figures, table
from benchmarks.serving_service import role

SLO = Slo(1.0, 0.5)


@pytest.fixture(scope="module")
def local() -> Iterator[LocalProcess]:
    with local_process(SETTINGS) as running:
        yield running


def test_a_plan_has_its_rate_and_is_the_same_again() -> None:
    made = plan(4000, 5.0, [1.0, 2.0, 3.0], ["http", "grpc"], seed=3)
    times = [ask.at_s for ask in made]
    assert times == sorted(times)
    assert times[-1] / 4000 == pytest.approx(0.2, rel=0.05)
    gaps = [late - early for early, late in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert deviation / mean == pytest.approx(1.0, rel=0.1)  # Poisson
    assert made == plan(4000, 5.0, [1.0, 2.0, 3.0], ["http", "grpc"], seed=3)
    assert made != plan(4000, 5.0, [1.0, 2.0, 3.0], ["http", "grpc"], seed=4)
    assert len({ask.request_id for ask in made}) == 4000


@pytest.mark.parametrize("num_durations", [1, 2, 3, 4])
def test_every_duration_meets_every_protocol_equally_often(num_durations: int) -> None:
    made = plan(240, math.inf, [float(i + 1) for i in range(num_durations)], ["http", "grpc"])
    counts = Counter((ask.duration_s, ask.protocol) for ask in made)
    assert len(counts) == 2 * num_durations
    assert len(set(counts.values())) == 1
    assert {ask.at_s for ask in made} == {0.0}


def test_bursts_are_burstier() -> None:
    made = plan(4000, 5.0, [1.0], ["http"], burstiness=3.0)
    gaps = [late.at_s - early.at_s for early, late in itertools.pairwise(made)]
    mean = sum(gaps) / len(gaps)
    assert math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) / mean == pytest.approx(3.0, rel=0.2)


def test_plans_and_outcomes_travel() -> None:
    made = plan(5, 2.0, [1.0], ["grpc"], api_key="k")
    assert list(asks(to_lines(made).splitlines())) == made
    outcome = _outcome(chunks=[(0.5, 0.25), (0.6, 0.75)])
    assert list(outcomes(to_lines([outcome]).splitlines())) == [outcome]


def _outcome(**fields: object) -> Outcome:
    values = {"request_id": "a", "protocol": "http", "duration_s": 1.0, "planned_s": 0.0, "ended_s": 2.0}
    values |= {"status": "finished", "num_terminal": 1, "chunks": [(0.5, 0.5), (0.9, 0.5)]}
    return Outcome(**{**values, **fields})  # type: ignore[arg-type]


def test_figures_of_a_load() -> None:
    silent = _outcome(request_id="b", protocol="grpc", chunks=[(0.5, 0.5), (1.5, 0.5)])
    late = _outcome(request_id="c", chunks=[(1.2, 1.0)])
    refused = _outcome(request_id="d", status="overloaded", chunks=[], sent_s=1.0, ended_s=1.02)
    cut = _outcome(request_id="e", status="cut", num_terminal=0, chunks=[(0.7, 0.5)])
    made = figures("x", [_outcome(), silent, late, refused, cut], 2.5, SLO, 0.0)
    assert (made.num_asked, made.num_finished, made.num_rejected, made.others) == (5, 3, 1, {"cut": 1})
    assert made.num_without_one_end == 1
    assert made.audio_s_per_s == pytest.approx(3.5 / 2.0)
    assert made.underrun_s == pytest.approx(0.5)  # `silent` had half a second and waited for one
    assert made.continuity == pytest.approx(2 / 3)
    assert made.goodput_hz == pytest.approx(1 / 2.0)  # neither `silent` nor `late`
    assert made.reject_s == (pytest.approx(0.02), pytest.approx(0.02))
    assert figures("x", [_outcome(), silent], 1.0, SLO, 0.0, "grpc").num_asked == 1
    assert "67 %" in table([made])


def test_percentiles() -> None:
    assert percentile([], 50) is None
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([float(i) for i in range(100)], 99) == 99.0


def test_names_of_rays_processes() -> None:
    assert role("ray::ServeReplica:musicgen:LanguageModel-demo.generate") == "LanguageModel"
    assert role("ray::ProxyActor") == "ProxyActor"
    assert role("ray::ServeReplica:musicgen:HttpIngress") == "HttpIngress"
    assert role("python -m something") is None


def test_a_load_in_steps() -> None:
    args = argparse.Namespace(durations=[1.0], model="demo", seed=0)
    made = step_plan([(1.0, 50.0), (10.0, 50.0), (0.0, 20.0)], args, "s")
    low, high = [a for a in made if a.at_s < 50], [a for a in made if a.at_s >= 50]
    assert 25 <= len(low) <= 50
    assert 400 <= len(high) <= 500
    assert max(ask.at_s for ask in made) <= 100
    assert len({ask.request_id for ask in made}) == len(made)


def test_every_request_of_a_load_has_one_end(local: LocalProcess) -> None:
    made = plan(12, 20.0, [0.3, 0.6], ["http", "grpc"], name="load")
    longer = replace(made[0], request_id="too-long", duration_s=50.0, protocol="grpc")
    load = run_load([*made, longer, replace(longer, request_id="too-long-2", protocol="http")], _urls(local), 60.0)
    ends = {outcome.request_id: outcome for outcome in load.outcomes}
    assert len(ends) == 14
    for outcome in ends.values():
        assert outcome.num_terminal == 1
        if outcome.duration_s < 50:
            assert outcome.status == "finished"
            assert outcome.audio_s == pytest.approx(outcome.duration_s, abs=0.021)
            assert 0 < (outcome.first_audio_s or 0) <= outcome.ended_s - outcome.planned_s
        else:
            assert outcome.status == "invalid_request"
    assert load.own.health_p50_s is not None


def _urls(local: LocalProcess) -> tuple[str, str]:
    return local.http_url, local.grpc_url


# --- fuzz ---


def test_some_hundred_broken_requests(local: LocalProcess) -> None:
    before = local.look()
    shares = {"openapi": 60, "protobuf": 160, "audio": 60, "wire": 80}
    found = {}
    for name, num in shares.items():
        found[name] = FUZZERS[name](*_urls(local), num, 5)
        assert found[name].num_sent >= 0.8 * num
        assert len(found[name].by_answer) > 1
    after = settled(local, before)
    assert problems(before, before, after, found) == []
    assert after.admitted > before.admitted


def _held(**fields: object) -> Held:
    values = {"rss_bytes": 10**9, "num_files": 20, "num_threads": 5, "num_tasks": 17, "pages": 3, "pieces": 0}
    values |= {"running": 0, "backlog": 0, "admitted": 2, "ended": {"finished": 1, "cancelled": 1, "failed": 0}}
    values["engine"] = {"accepted": 2, "finished": 1, "cancelled": 1, "failed": 0}
    return Held(**{**values, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"running": 1}, "running"),
        ({"pieces": 1}, "pieces"),
        ({"backlog": 1}, "backlog"),
        ({"admitted": 3}, "admitted"),
        ({"balanced": "the ledger says 1"}, "ledger"),
        ({"pages": 4}, "pages"),
        ({"num_files": 30}, "files"),
        ({"num_tasks": 25}, "tasks"),
        ({"rss_bytes": 2 * 10**9}, "MB"),
        ({"engine": {"accepted": 3, "finished": 1, "cancelled": 1, "failed": 0}}, "engine"),
    ],
)
def test_leaks_are_told(change: dict[str, object], word: str) -> None:
    held = _held()
    assert problems(held, held, _held(), {}) == []
    (problem,) = problems(held, held, _held(**change), {})
    assert word in problem


def test_bad_answers_are_told() -> None:
    held, findings = _held(), Findings()
    findings.answer("500", 0.1, "POST /x: 500")
    assert problems(held, held, held, {"openapi": findings}) == ["openapi: POST /x: 500"]


def test_a_failed_load_is_told() -> None:
    command = [sys.executable, "-m", "benchmarks.serving_load", "--http-url=http://127.0.0.1:9"]
    ask = json.dumps({"not": "an ask"})
    done = subprocess.run(command, input=ask, capture_output=True, text=True, check=False)
    assert done.returncode != 0
