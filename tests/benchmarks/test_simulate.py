"""The simulation against hand-worked figures, the engine core itself, and a closed form."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import simulate
from benchmarks.simulation.arrivals import Arrivals, Process
from benchmarks.simulation.capacity import capacity
from benchmarks.simulation.cluster import Run, run
from benchmarks.simulation.fairness_gap import FairnessGap
from benchmarks.simulation.job import End, Listening
from benchmarks.simulation.machines import GPUS, MODELS, model_config
from benchmarks.simulation.player import Heard, play
from benchmarks.simulation.replica import ReplicaConfig
from benchmarks.simulation.search import fewest
from benchmarks.simulation.step_time import MeasuredTable, Roofline, StepLoad
from benchmarks.simulation.workload import Mix, Request, Tenant, engine_request, guidance_rows
from musicgen.config import EngineConfig, SchedulerConfig, WeightDtype
from musicgen.engine.batch import ScheduledBatch
from musicgen.engine.core import EngineCore
from musicgen.engine.sequence import Sequence
from musicgen.errors import InvalidRequestError
from musicgen.models.language_model import GuidanceRows, PlannedRows
from musicgen.types import ChunkPolicy, CodeChunk, EndOfRequest

H100, MELODY = GPUS["H100"], MODELS["melody"]
MEAN_LEN = 1007
"""Positions a row, on average over a 30 s request of a melody model."""
TENANTS = (Tenant("a", 0.7), Tenant("b", 0.3, weight=2.0))


def decode_load(num_streams: int, length: int = MEAN_LEN) -> StepLoad:
    """A step in which streams of two rows decode at one length."""
    read = np.array([2.0 * num_streams * length])
    return StepLoad(2 * num_streams, read, read)


def replica_config(*, num_pages: int = 4000, model: str = "melody", **scheduler: int) -> ReplicaConfig:
    limits = {"max_requests": 64, "max_rows": 192, "max_step_rows": 192, "prefill_tokens": 100, **scheduler}
    return ReplicaConfig(
        model=model_config(MODELS[model]),
        step_time=Roofline(H100, MODELS[model], overhead_s=1e-3),
        num_pages=num_pages,
        scheduler=SchedulerConfig(**limits),
        chunks=ChunkPolicy(),
        listening=Listening(50.0, before_s=0.02, codec_s=0.03, prebuffer_s=0.0),
    )


def mix(**changes: object) -> Mix:
    kinds = {"text": 0.4, "melody": 0.3, "double": 0.15, "continuation": 0.15}
    return replace(Mix(kinds, TENANTS, durations_s=(1.0, 6.0), known_s=(0.5, 2.0)), **changes)  # type: ignore[arg-type]


def requests_at(rate_hz: float, num: int, config: ReplicaConfig, seed: int = 3, **changes: object) -> list[Request]:
    return mix(**changes).draw(num, Arrivals("poisson", rate_hz), config.model, seed)


# --- bytes, FLOPs, seconds ---


@pytest.mark.parametrize(
    ("weights", "gigabytes"), [("float32", 5.49), ("bfloat16", 2.74), ("int8", 1.39), ("int4", 0.77)]
)
def test_the_matrices_of_melody_in_bytes(weights: WeightDtype, gigabytes: float) -> None:
    no_rows = StepLoad(0, np.zeros(1), np.zeros(1))
    seconds = Roofline(H100, MELODY, weights).seconds(no_rows)[0]
    assert seconds * H100.bytes_s / 1e9 == pytest.approx(gigabytes, abs=0.005)


def test_melody_in_flops_and_cache_bytes() -> None:
    assert 2 * MELODY.token_flops / 1e9 == pytest.approx(5.5, abs=0.05)
    assert 2 * MELODY.attended_flops * MEAN_LEN / 1e9 == pytest.approx(0.6, abs=0.01)
    assert MELODY.kv_bytes("float32") == 48 * 2 * 1536 * 4
    assert MELODY.kv_bytes("bfloat16") == 294_912
    assert MELODY.kv_bytes("int8") == 294_912 / 2 * (1 + 4 / 64)  # one 32-bit scale for each head of 64
    assert 2 * MEAN_LEN * MELODY.kv_bytes("bfloat16") / 1e9 == pytest.approx(0.60, abs=0.01)


@pytest.mark.parametrize(("num_streams", "milliseconds"), [(1, 1.0), (8, 2.25), (32, 6.6)])
def test_the_bound_of_melody_on_an_h100(num_streams: int, milliseconds: float) -> None:
    seconds = Roofline(H100, MELODY).seconds(decode_load(num_streams))[0]
    assert seconds * 1e3 == pytest.approx(milliseconds, rel=0.02)


def test_a_large_prefill_is_bound_by_arithmetic() -> None:
    """1,000 positions a row, both rows: 2 · 1000 · 2 · 1.3715e9 + 2 · (1000 · 1001 / 2) · 4 · 48 · 1536 FLOPs."""
    load = StepLoad(2000, np.array([2000.0]), np.array([1000.0 * 1001.0]))
    flops = 2000 * 2 * 1_371_537_408 + 1000 * 1001 * 4 * 48 * 1536
    assert Roofline(H100, MELODY).seconds(load)[0] == pytest.approx(flops / 989e12)


def test_shares_and_overhead() -> None:
    load = decode_load(8)
    bound = Roofline(H100, MELODY).seconds(load)[0]
    assert Roofline(H100, MELODY, bandwidth_share=0.5, overhead_s=0.003).seconds(load)[0] == pytest.approx(
        2 * bound + 0.003
    )


def test_a_measured_table_is_a_plane(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    points = [(n, kv, 2e-3 + 3e-5 * n + 4e-8 * kv) for n in (2, 64, 300) for kv in (100, 9000)]
    path.write_text("num_positions,kv_positions,seconds\n" + "\n".join(",".join(map(str, p)) for p in points))
    table = MeasuredTable.read(path)
    assert table.seconds(StepLoad(10, np.array([500.0]), np.array([0.0])))[0] == pytest.approx(2.32e-3)
    assert table.worst_error < 1e-9
    path.write_text("num_positions,kv_positions,seconds\n2,100,0.1\n4,200,0.2\n")
    with pytest.raises(InvalidRequestError, match="points that differ"):
        MeasuredTable.read(path)


# --- the player ---


def test_a_player_by_hand() -> None:
    """Chunks of 12, 18 and 20 frames, the codec 4 frames behind, 50 frames a second.

    First sound at 1.0 + 0.1 with 8 frames: silent from 1.26. The second chunk's 18 frames come at 1.5: 0.24 s of
    silence, then sound until 1.86. The third, with the 4 that were held back, comes at 1.8: no silence.
    """
    heard = play([1.0, 1.4, 1.7], [12, 18, 20], frame_rate_hz=50, codec_s=0.1)
    assert heard == Heard(pytest.approx(1.1), pytest.approx(0.24), 1)


def test_a_player_that_collects_first() -> None:
    """Half a second is there with the second chunk (26 frames, at 1.5); it lasts until 2.02."""
    heard = play([1.0, 1.4, 2.0], [12, 18, 20], frame_rate_hz=50, codec_s=0.1, prebuffer_s=0.5)
    assert heard == Heard(pytest.approx(1.5), pytest.approx(0.08), 1)


def test_a_piece_that_breaks_off_is_not_heard_to_its_last_frame() -> None:
    assert play([1.0], [4], frame_rate_hz=50, is_complete=False) is None
    assert play([1.0], [4], frame_rate_hz=50) == Heard(1.0, 0.0, 0)
    assert play([], [], frame_rate_hz=50, is_complete=False) is None


# --- the engine core as the oracle of the replica ---


class ListedModel:
    """Gives each request the rows that the workload has for it."""

    device = torch.device("cpu")

    def __init__(self, config: ReplicaConfig) -> None:
        self.config = config.model
        self.rows: dict[int, GuidanceRows] = {}

    def plan_rows(self, conditioning: object, sampling: object) -> PlannedRows:
        return PlannedRows.of(self.rows[id(conditioning)])


class TimedRunner:
    """Computes nothing; lets the clock pass as the step model says."""

    def __init__(self, config: ReplicaConfig) -> None:
        self.num_pages, self._config, self.now = config.num_pages, config, 0.0
        self._number_of: dict[int, int] = {}

    def open(self, sequence: Sequence) -> None:
        self._number_of[sequence.slot] = int(sequence.request.request_id)

    def close(self, slot: int) -> None:
        pass

    def frames(self, slot: int, start: int, end: int) -> torch.Tensor:
        return torch.full((4, end - start), self._number_of[slot], dtype=torch.int32)

    def run(self, batch: ScheduledBatch) -> np.ndarray:
        chunks = [(chunk.start, chunk.num_new) for chunk in batch.chunks]
        read = np.array([float(sum(start + new for start, new in chunks))])
        pairs = np.array([float(sum(new * start + new * (new + 1) // 2 for start, new in chunks))])
        self.now += float(self._config.step_time.seconds(StepLoad(batch.num_tokens, read, pairs))[0])
        return np.zeros((len(batch.deciding), 4), dtype=np.int32)


def serve_by_core(requests: list[Request], config: ReplicaConfig) -> tuple[dict[int, list[float]], dict[int, float]]:
    """When each request's chunks and its end came, from the engine core, one step at a time."""
    model, runner = ListedModel(config), TimedRunner(config)
    core = EngineCore(model, EngineConfig(scheduler=config.scheduler), runner=runner, clock=lambda: runner.now)  # type: ignore[arg-type]
    chunks: dict[int, list[float]] = {}
    ends: dict[int, float] = {}
    waiting = list(requests)
    arrivals = [request.arrived_s + config.listening.before_s for request in waiting]
    submitted = 0
    while submitted < len(waiting) or core.has_work:
        if not core.has_work:
            runner.now = max(runner.now, arrivals[submitted])
        while submitted < len(waiting) and arrivals[submitted] <= runner.now:
            request, now = waiting[submitted], runner.now
            engine = engine_request(request, config.model, config.chunks)
            for _, conditioning in engine.codes.windows:
                model.rows[id(conditioning)] = guidance_rows(request, config.model)
            runner.now = arrivals[submitted]
            core.add(engine)
            runner.now, submitted = now, submitted + 1
        for event in core.step():
            number = int(event.request_id)
            if isinstance(event, CodeChunk):
                chunks.setdefault(number, []).append(runner.now)
            elif isinstance(event, EndOfRequest):
                ends[number] = runner.now
    return chunks, ends


FLOOD = (Tenant("flood", 0.9), Tenant("steady", 0.1))


@pytest.mark.parametrize(
    ("num", "rate_hz", "durations_s", "num_pages", "max_requests", "tenants", "gpu"),
    [
        (24, 12.0, (1.0, 4.0), 4000, 64, TENANTS, "H100"),
        (24, 400.0, (1.0, 4.0), 300, 64, TENANTS, "H100"),  # pages are short: some wait and are tried every 16 steps
        (6, 12.0, (25.0, 40.0), 1500, 64, TENANTS, "H100"),  # several windows
        (40, 12.0, (6.0, 12.0), 4000, 8, FLOOD, "H100"),  # one has more than its share: not all advance in each step
        (40, 4.0, (6.0, 12.0), 4000, 16, FLOOD, "L4"),  # and all together are slower than playback
    ],
    ids=["room", "pressure", "windows", "flood", "slow flood"],
)
def test_leaps_give_what_the_core_gives_step_by_step(
    num: int,
    rate_hz: float,
    durations_s: tuple[float, float],
    num_pages: int,
    max_requests: int,
    tenants: tuple[Tenant, ...],
    gpu: str,
) -> None:
    slow = Roofline(GPUS[gpu], MELODY, overhead_s=0.5e-3)
    config = replace(replica_config(num_pages=num_pages, max_requests=max_requests), step_time=slow)
    requests = requests_at(rate_hz, num, config, leave_share=0.0, durations_s=durations_s, tenants=tenants)
    chunks, ends = serve_by_core(requests, config)
    outcomes = run(requests, 1, config).outcomes
    assert len(ends) == len(outcomes) == num
    for outcome in outcomes:
        number, arrived = outcome.request.number, outcome.request.arrived_s
        assert outcome.end is End.FINISHED
        assert arrived + outcome.made_s == pytest.approx(ends[number], abs=1e-9)
        first = chunks[number][0] + config.listening.codec_s - arrived
        assert outcome.first_audio_s == pytest.approx(first, abs=1e-9)
    if num_pages == 300:
        assert max(o.queue_s for o in outcomes) > 0.1, "the case is meant to make requests wait"


# --- whole runs ---


def small_run(seed: int = 0, *, leaps: bool = True, balancing: str = "two") -> Run:
    """Slow replicas with few pages, a short queue and impatient listeners."""
    slow = Roofline(GPUS["L4"], MELODY, overhead_s=1e-3)
    config = replace(replica_config(num_pages=300, max_waiting=1), step_time=slow, deadline_factor=3.0)
    requests = requests_at(60.0, 80, config, leave_share=0.3, durations_s=(1.0, 3.0))
    return run(requests, 3, config, seed=seed, leaps=leaps, balancing=balancing)  # type: ignore[arg-type]


def test_every_request_ends_once_and_nothing_is_held() -> None:
    result = small_run()
    assert [o.request.number for o in result.outcomes] == list(range(80))
    ends = [o.end for o in result.outcomes]
    assert all(ends.count(end) > 3 for end in End), "the case is meant to have every kind of end"
    for outcome in result.outcomes:
        if outcome.end is End.FINISHED:
            assert outcome.frames_made == outcome.request.num_new
            assert outcome.queue_s < outcome.first_audio_s <= outcome.made_s + 0.03 + 1e-9
        if outcome.end is End.REJECTED:
            assert outcome.frames_made == 0
            assert math.isinf(outcome.first_audio_s)


def test_the_same_seed_gives_the_same_run() -> None:
    first, again, other = small_run(), small_run(), small_run(seed=1)
    assert first.outcomes == again.outcomes
    assert first.uses == again.uses
    assert first.outcomes != other.outcomes


def test_leaps_change_nothing() -> None:
    leaping, stepping = small_run(), small_run(leaps=False)
    assert [(o.end, o.replica) for o in leaping.outcomes] == [(o.end, o.replica) for o in stepping.outcomes]
    for a, b in zip(leaping.outcomes, stepping.outcomes, strict=True):
        assert a.first_audio_s == pytest.approx(b.first_audio_s, abs=1e-9)
        assert a.underrun_s == pytest.approx(b.underrun_s, abs=1e-9)
    for used, expected in zip(leaping.uses, stepping.uses, strict=True):
        assert used.num_steps == expected.num_steps
        assert used.most_pages == expected.most_pages
        assert used.page_s == pytest.approx(expected.page_s)
        assert used.row_steps == expected.row_steps


def test_throughput_at_saturation_is_the_closed_form() -> None:
    """Of one tenant: several keep a place free for each other, and do not always advance together."""
    config = replica_config(num_pages=20_000, max_requests=24, prefill_tokens=256)
    alone = (Tenant("a", 1.0, 1.0),)
    requests = requests_at(1e4, 120, config, leave_share=0.0, repeat_share=0.0, durations_s=(2.0, 6.0), tenants=alone)
    expected = capacity(requests, config.model, config.step_time, config.num_pages, config.scheduler)
    assert expected.num_streams == 24
    begin, end = 20 / expected.requests_s, 95 / expected.requests_s  # before the queue runs dry
    use = run(requests, 1, replace(config, measured_s=(begin, end))).uses[0]
    frames_s = use.stream_steps / (end - begin) * expected.frames_s / (expected.num_streams / expected.step_s)
    assert use.stream_steps / use.num_steps == pytest.approx(24, rel=0.05)
    assert frames_s == pytest.approx(expected.frames_s, rel=0.05)


def test_text_models_read_their_texts_and_finish() -> None:
    config = replica_config(model="small")
    short = requests_at(20.0, 30, config, leave_share=0.0, text_lens=(4, 4))
    long = [replace(request, text_len=400) for request in short]
    times = [sum(use.busy_s for use in run(requests, 1, config).uses) for requests in (short, long)]
    assert times[1] > times[0]


def test_the_fairness_gap_by_hand() -> None:
    """While both wait a is served 5 + 5 and b 4: the gap is widest at 10. What a got while b was away counts not."""
    gap = FairnessGap()
    for tenant in "aaaab":
        gap.came(tenant)
    gap.began("a", 5)
    gap.began("a", 5)
    gap.began("b", 4)
    gap.began("a", 50)
    assert gap.widest == 10
    assert gap.dearest == 50


@pytest.mark.parametrize("process", ["poisson", "gamma", "bursts"])
def test_arrivals_keep_their_rate_and_burstiness(process: Process) -> None:
    times = Arrivals(process, 20.0, 4.0).times(100_000, np.random.default_rng(0))
    assert (np.diff(times) >= 0).all()
    assert len(times) / times[-1] == pytest.approx(20, rel=0.15)
    variation = np.std(np.diff(times)) / np.mean(np.diff(times))
    counts = np.histogram(times, np.arange(0, times[-1], 1.0))[0]
    dispersion = counts.var() / counts.mean()
    if process == "poisson":
        assert variation == pytest.approx(1, rel=0.02)
        assert dispersion == pytest.approx(1, rel=0.2)
    if process == "gamma":
        assert variation == pytest.approx(4, rel=0.05)
    if process == "bursts":
        assert dispersion > 5  # 1 + share 0.2 · 0.8 · (50 − 12.5 a second)² / 20, less what a burst of 10 s blurs


@pytest.mark.parametrize("start", [1, 9, 40])
@pytest.mark.parametrize("least", [1, 2, 9, 17])
def test_the_fewest(least: int, start: int) -> None:
    tried: list[int] = []

    def meets(num: int) -> bool:
        tried.append(num)
        return num >= least

    assert fewest(meets, start=start) == least
    assert len(tried) == len(set(tried)) <= 12


# --- the command ---


def test_the_command_prints_a_table_and_one_json_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot, csv = tmp_path / "plot.png", tmp_path / "requests.csv"
    arguments = ["--requests", "60", "--durations", "2", "4", "--plot", str(plot), "--csv", str(csv)]
    assert simulate.main([*arguments, "--replicas", "2", "--load", "0.5", "0.9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert "no GPU was measured" in lines[0]
    assert "no GPU was measured" in report["note"]
    assert [r["offered_load"] for r in report["runs"]] == [0.5, 0.9]
    for summary in report["runs"]:
        ends = summary["num_finished"] + summary["num_left"] + summary["num_rejected"]
        assert ends == summary["num_requests"] == 53
        assert 0 < summary["first_audio_s"]["p50"] <= summary["first_audio_s"]["p95"]
    assert plot.stat().st_size > 10_000
    assert len(csv.read_text().splitlines()) == 61


def test_the_command_finds_replicas(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--find-replicas", "--listeners", "300", "--requests", "100", "--durations", "3", "3"]
    assert simulate.main([*arguments, "--slo-first-audio", "0.12"]) == 0
    out = capsys.readouterr().out
    report = json.loads(out.splitlines()[-1])
    found = report["replicas_needed"]
    by_number = {s["num_replicas"]: s["first_audio_s"]["p95"] for s in report["runs"]}
    assert by_number[found] <= 0.12 < by_number[found - 1]


def test_bad_input_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate.main(["--kinds", "dance=1"]) == 2
    assert "kinds of text" in capsys.readouterr().err
    assert simulate.main(["--gpu", "L4", "--model", "large", "--weights", "float32", "--memory-share", "0.5"]) == 2
    assert "a model that fits" in capsys.readouterr().err
