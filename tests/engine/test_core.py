"""What the core refuses, and what becomes of everyone when a step fails."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from engine.fakes import (
    CONFIG,
    MAX_FRAMES,
    FakeLanguageModel,
    FakeRunner,
    Listener,
    VirtualClock,
    alone,
    codes_request,
    new_core,
    run_all,
)

from musicgen.engine.checks import check_request
from musicgen.errors import DeadlineTooShortError, EngineDeadError, InvalidRequestError, OverloadedError
from musicgen.models.t5 import MAX_TEXT_TOKENS
from musicgen.types import (
    ChunkPolicy,
    CodesRequest,
    Conditioning,
    EndOfRequest,
    EngineRequest,
    FinishReason,
    SamplingParams,
    Window,
)

KNOWN = torch.zeros(2, 5, dtype=torch.int32)


def windows(*spans: tuple[int, int], known: torch.Tensor | None = None) -> EngineRequest:
    return EngineRequest("bad", codes_request(windows=[Window(*span) for span in spans], known=known))


def known(codes: torch.Tensor) -> EngineRequest:
    return EngineRequest("bad", codes_request(20, known=codes))


def conditioned(conditioning: Conditioning, **sampling: float) -> EngineRequest:
    return EngineRequest("bad", CodesRequest(((Window(0, 20), conditioning),), SamplingParams(**sampling)))  # type: ignore[arg-type]


BAD: dict[str, tuple[Callable[[], EngineRequest], str]] = {
    "no window": (lambda: windows(), "windows"),
    "a window beyond the model's limit": (lambda: windows((0, MAX_FRAMES + 1)), "windows"),
    "an empty window": (lambda: windows((0, 20), (20, 20)), "windows"),
    "a window before the piece": (lambda: windows((-5, 20)), "windows"),
    "a gap between windows": (lambda: windows((0, 20), (21, 40)), "windows"),
    "a window that ends before the last": (lambda: windows((0, 40), (10, 30)), "windows"),
    "a first window that needs codes": (lambda: windows((10, 30)), "known_codes"),
    "too few known codes for the windows": (lambda: windows((10, 30), known=KNOWN), "known_codes"),
    "known codes of another model": (lambda: known(KNOWN[:1]), "known_codes"),
    "known codes that are no integers": (lambda: known(KNOWN.float()), "known_codes"),
    "known codes that are true or false": (lambda: known(KNOWN.bool()), "known_codes"),
    "a known code above the range": (lambda: known(KNOWN + 64), "known_codes"),
    "a known code below the range": (lambda: known(KNOWN - 1), "known_codes"),
    "nothing left to make": (lambda: known(torch.zeros(2, 20, dtype=torch.int32)), "known_codes"),
    "more known codes than the piece has": (lambda: known(torch.zeros(2, 21, dtype=torch.int32)), "known_codes"),
    "text of another model": (lambda: conditioned(Conditioning(torch.ones(3, 2), None)), "text"),
    "text without length": (lambda: conditioned(Conditioning(torch.ones(0, 1), None)), "text"),
    "text beyond the encoder's limit": (
        lambda: conditioned(Conditioning(torch.ones(MAX_TEXT_TOKENS + 1, 1), None)),
        "text",
    ),
    "text with infinities": (lambda: conditioned(Conditioning(torch.full((3, 1), math.inf), None)), "text"),
    "a melody of another length": (lambda: conditioned(Conditioning(None, torch.ones(9, 12))), "chroma"),
    "a weight of zero": (lambda: replace(windows((0, 9)), weight=0.0), "weight"),
    "a weight that is no number": (lambda: replace(windows((0, 9)), weight=math.nan), "weight"),
    "a lease that is over": (lambda: replace(windows((0, 9)), lease_s=0.0), "lease_s"),
    "a deadline that is over": (lambda: replace(windows((0, 9)), deadline_s=-1.0), "deadline_s"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_admits_nothing(case: str) -> None:
    core = new_core()
    core.add(EngineRequest("good", codes_request(20)))
    core.step()
    before = core.stats()
    make, param = BAD[case]
    with pytest.raises(InvalidRequestError) as caught:
        core.add(make())
    assert caught.value.param == param
    assert core.stats() == before
    assert run_all(core).ends.keys() == {"good"}


def test_melody_for_a_model_without_one_is_refused() -> None:
    text_model = replace(CONFIG, chroma=None)
    with pytest.raises(InvalidRequestError, match="melody_guidance"):
        check_request(conditioned(Conditioning(torch.ones(3, 1), None), melody_guidance=2.0), text_model)
    with pytest.raises(InvalidRequestError, match="chroma"):
        check_request(conditioned(Conditioning(torch.ones(3, 1), torch.ones(2, 12))), text_model)


def test_more_than_capacity_could_ever_hold_is_refused() -> None:
    core = new_core(8, max_rows=2)
    core.add(EngineRequest("good", codes_request(20, num_rows=2)))
    before = core.stats()
    for codes, param, what in (
        (codes_request(20, num_rows=3), "guidance_scale", "at most 2 rows, got 3"),
        (codes_request(40, num_rows=2, text_len=50), "duration", "fits 8 pages, got 12 pages"),
    ):
        with pytest.raises(InvalidRequestError, match=what) as caught:
            core.add(EngineRequest("bad", codes))
        assert caught.value.param == param
    assert core.stats() == before


def test_an_id_in_use_and_a_full_queue_are_refused() -> None:
    core = new_core(8, max_waiting=2)
    for request_id in "ab":
        core.add(EngineRequest(request_id, codes_request(20)))
    with pytest.raises(InvalidRequestError, match="request_id"):
        core.add(EngineRequest("a", codes_request(20)))
    with pytest.raises(OverloadedError, match="retry later"):
        core.add(EngineRequest("c", codes_request(20)))
    assert run_all(core).ends.keys() == {"a", "b"}
    core.add(EngineRequest("a", codes_request(20)))  # its id is free again


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    core = new_core(6)  # one request of two rows and 40 frames at a time, 0.01 s a step
    core.add(EngineRequest("running", codes_request(40)))
    for _ in range(2):  # how long a step takes is known from the second on
        core.step()
    core.add(EngineRequest("waiting", codes_request(40)))
    late = EngineRequest("late", codes_request(40), deadline_s=1.0)
    with pytest.raises(DeadlineTooShortError, match="allow more time"):
        core.add(late)
    assert core.stats().num_accepted == 2
    core.add(replace(late, deadline_s=1.5))
    listener, began = Listener(), core._clock()
    while "late" not in listener.ends:
        listener.take(core.step())
    assert core._clock() - began <= 1.5


def test_a_slow_first_step_refuses_nobody() -> None:
    clock = VirtualClock()
    runner = FakeRunner(6, clock, step_s=5.0)  # threads start, memory is touched for the first time
    core = new_core(6, runner, clock)
    core.add(EngineRequest("warm-up", codes_request(8)))
    core.step()
    runner._step_s = 0.01
    run_all(core)
    assert core.stats().step_s == pytest.approx(0.01)
    core.add(EngineRequest("resumed", codes_request(40), deadline_s=1.0))
    assert run_all(core).ends.keys() == {"resumed"}


def test_one_that_cannot_be_closed_has_its_end_too() -> None:
    core = new_core(clock=(clock := VirtualClock()), runner=(runner := FakeRunner(40, clock)))
    core.add(EngineRequest("leased", codes_request(40), lease_s=1.0))
    core.step()
    runner.fail = True
    clock.now += 2.0
    with pytest.raises(EngineDeadError):
        core.step()
    (end,) = [event for event in core.take_events() if isinstance(event, EndOfRequest)]
    assert (end.request_id, end.reason) == ("leased", FinishReason.FAILED)


def test_a_failed_step_reaches_everyone() -> None:
    """Also when the runner cannot even close what it had open; nothing is accepted afterwards."""
    core = new_core(40, max_requests=3)
    for i in range(5):
        core.add(EngineRequest(str(i), codes_request(20)))
    core.step()
    core.step()
    assert isinstance(core.runner, FakeRunner)
    core.runner.fail = True
    with pytest.raises(EngineDeadError, match="told to fail"):
        core.step()
    listener = Listener()
    listener.take(core.take_events())
    assert {end.reason for end in listener.ends.values()} == {FinishReason.FAILED}
    assert listener.ends.keys() == {"0", "1", "2", "3", "4"}
    assert core.stats().pages_held == 0
    for call in (core.step, lambda: core.add(EngineRequest("new", codes_request(20)))):
        with pytest.raises(EngineDeadError, match="replace this replica"):
            call()
    core.check()


@pytest.mark.parametrize("refused", [{"0"}, {"1"}, {"2"}, {"0", "2"}, {"0", "1", "2"}])
def test_a_request_that_the_kernels_refuse_fails_alone(refused: set[str], caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the step: in its prefill or while it decodes."""
    pieces = {str(seed): codes_request(40, seed=seed) for seed in range(3)}
    for num_steps in (0, 1, 5, 30):
        core = new_core(40, max_requests=3)
        assert isinstance(core.runner, FakeRunner)
        listener = Listener()
        for name, piece in pieces.items():
            core.add(EngineRequest(name, piece))
        for _ in range(num_steps):
            listener.take(core.step())
        core.runner.refused = refused
        core.add(EngineRequest("later", codes_request(20)))
        run_all(core, listener)
        assert {name for name, end in listener.ends.items() if end.reason is FinishReason.FAILED} == refused
        for name in pieces.keys() - refused:
            assert torch.equal(listener.codes(name), alone(pieces[name]))
        assert core.stats().pages_held == 0
        core.check()
    assert "top_k" in caplog.text


def test_the_reason_of_an_end_is_logged_and_told_to_everyone(caplog: pytest.LogCaptureFixture) -> None:
    core = new_core()
    for name in ("running", "waiting"):
        core.add(EngineRequest(name, codes_request(20)))
    assert isinstance(core.runner, FakeRunner)
    core.runner.fail = True
    reason = "RunnerError: told to fail"
    with caplog.at_level(logging.ERROR), pytest.raises(EngineDeadError, match=reason):
        core.step()
    (record,) = caplog.records
    assert record.exc_info is not None
    assert "told to fail" in str(record.exc_info[1])
    ends = [event for event in core.take_events() if isinstance(event, EndOfRequest)]
    assert [end.error for end in ends] == [f"the engine failed: {reason}"] * 2
    with pytest.raises(EngineDeadError, match=reason):
        core.add(EngineRequest("late", codes_request(20)))


def test_a_cancelled_request_frees_its_pages_at_once_and_frees_a_waiting_one() -> None:
    core = new_core(6)
    core.add(EngineRequest("first", codes_request(40)))
    core.add(EngineRequest("second", codes_request(40)))
    core.step()
    assert core.abort("first")
    assert core.stats().pages_held == 0
    core.step()
    assert core.stats().num_running == 1


def test_a_request_cancelled_with_a_copy_under_way_leaves_nothing_behind() -> None:
    """Twins open their second window in one step; one copies the part page that the other had kept."""
    piece = codes_request(60, num_rows=1)
    for num_steps in range(1, 60):
        core = new_core(40)
        for request_id in ("first", "second"):
            core.add(EngineRequest(request_id, piece))
            for _ in range(3):
                core.step()
        for _ in range(num_steps):
            core.step()
        core.check()
        core.abort("second")
        core.check()
        run_all(core)
        assert core.stats().pages_held == 0


def test_the_inputs_of_a_window_are_made_when_it_opens_and_gone_afterwards() -> None:
    core = new_core()
    model = core._lm
    assert isinstance(model, FakeLanguageModel)
    piece = codes_request(30 * MAX_FRAMES)
    num_windows = len(piece.windows)
    core.add(EngineRequest("long", piece))
    assert len(model.made) == 1
    most_alive = 0
    while core.has_work:
        core.step()
        most_alive = max(most_alive, sum(prefix() is not None for prefix in model.made))
    assert len(model.made) == num_windows > 20
    assert most_alive == 1


def test_a_lease_that_nobody_renews_ends_the_request_and_a_renewed_one_does_not() -> None:
    clock, listener = VirtualClock(), Listener()
    core = new_core(clock=clock)
    for name in ("left", "renewed"):
        core.add(EngineRequest(name, codes_request(40), lease_s=0.3))
    core.add(EngineRequest("without", codes_request(40)))
    while core.has_work:
        core.renew("renewed")
        core.renew("without")  # nothing to extend
        core.renew("nobody")
        clock.now += 0.05
        listener.take(core.step())
        core.check()
    assert listener.ends["left"].reason is FinishReason.CANCELLED
    assert "lease" in (listener.ends["left"].error or "")
    assert 0 < listener.ends["left"].usage.num_frames < 40 or "left" not in listener.chunks
    assert {listener.ends[name].reason for name in ("renewed", "without")} == {FinishReason.FINISHED}


def test_every_piece_of_several_windows_goes_on_where_it_was_at_any_length() -> None:
    """Windows are prefilled again from the codes, within one request; one event ends it."""
    for num_frames in (MAX_FRAMES, MAX_FRAMES + 1, 3 * MAX_FRAMES):
        core = new_core()
        core.add(EngineRequest("long", codes_request(num_frames), chunks=ChunkPolicy(1, 7)))
        listener = run_all(core)
        assert listener.codes("long").shape[-1] == num_frames
        assert listener.ends["long"].usage.num_frames == num_frames
        assert listener.codes("long").equal(alone(codes_request(num_frames)))


def test_usage_and_ledger() -> None:
    core = new_core(6)
    core.add(EngineRequest("first", codes_request(20)))
    core.add(EngineRequest("second", codes_request(40)))
    listener = run_all(core)
    usage = listener.ends["second"].usage
    assert usage.num_frames == 40
    assert usage.queue_s > 0.1
    assert usage.decode_s > 0.3
    assert core.stats().num_finished == 2
