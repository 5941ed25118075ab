"""Random lives of the engine over a fake runner: whatever is added, cancelled, forgotten or resumed, the books agree.

The short profile runs with the other tests. `ENGINE_TRANSITIONS=100000` runs about so many transitions.
"""

from __future__ import annotations

import os

import pytest
import torch
from engine.fakes import MAX_FRAMES, FakeRunner, Listener, RunnerError, VirtualClock, alone, codes_request, new_core
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from musicgen.errors import EngineDeadError, InvalidRequestError
from musicgen.types import ChunkPolicy, CodesRequest, EngineRequest, FinishReason

NUM_TRANSITIONS = int(os.environ.get("ENGINE_TRANSITIONS", "3000"))
STEPS_A_LIFE = 100
MOST_STEPS = 200
"""A bound on the engine's steps for one piece of one to four windows, prefill at 1 position a step included."""

_alone: dict[tuple[object, ...], torch.Tensor] = {}
counted = {"transitions": 0, "steps": 0, "finished": 0, "cancelled": 0, "failed": 0, "waited": 0, "shared": 0}

pieces = st.fixed_dictionaries(
    {
        "num_frames": st.sampled_from([1, 2, 7, 15, 16, 40, 41, 70, 90]),
        "text": st.integers(1, 2),
        "text_len": st.sampled_from([1, 14, 30, 45]),
        "seed": st.integers(0, 1),
        "num_rows": st.integers(1, 3),
    }
)


class Life(RuleBasedStateMachine):
    """One engine from its first request to rest."""

    @initialize(
        num_pages=st.integers(12, 40),
        max_requests=st.sampled_from([1, 3, 8]),
        max_rows=st.sampled_from([3, 6, 12]),
        max_step_rows=st.sampled_from([3, 4, 64]),
        prefill_tokens=st.sampled_from([1, 5, 64]),
        idle_prefill_tokens=st.sampled_from([16, 512]),
    )
    def begin(self, num_pages: int, **scheduler: int) -> None:
        self.clock = VirtualClock()
        self.runner = FakeRunner(num_pages, self.clock)
        self.core = new_core(runner=self.runner, clock=self.clock, **scheduler)
        self.listener = Listener()
        self.requests: dict[str, EngineRequest] = {}
        self.pieces: dict[str, tuple[object, ...]] = {}
        self.dead = False

    # --- rules ---

    @rule(
        piece=pieces,
        tenant=st.sampled_from(["a", "b", "c"]),
        weight=st.sampled_from([1.0, 3.0]),
        priority=st.sampled_from([0, 0, 0, 1]),
        chunks=st.sampled_from([None, ChunkPolicy(1, 4), ChunkPolicy()]),
        lease_s=st.sampled_from([None, None, 0.1, 2.0]),
    )
    def add(self, piece: dict[str, int], **options: object) -> None:
        self._add(codes_request(**piece), tuple(piece.items()), **options)

    @precondition(lambda self: self.listener.chunks)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        """A request that was told some frames comes back with them, and the windows of the first time."""
        request_id = data.draw(st.sampled_from(sorted(self.listener.chunks)))
        request, made = self.requests[request_id], self.listener.codes(request_id)
        known = request.codes.known_codes
        codes = made if known is None else torch.cat([known, made], -1)
        num_known = data.draw(st.integers(1, codes.shape[-1]))
        if num_known < request.codes.num_frames:
            resumed = CodesRequest(request.codes.windows, request.codes.sampling, codes[:, :num_known])
            self._add(resumed, self.pieces[request_id])

    @rule(num_steps=st.integers(1, 30))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            counted["transitions"] += 1
            if self.dead:
                return
            self.listener.take(self.core.step())
            self._look()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        is_live = request_id not in self.listener.ends
        assert self.core.abort(request_id) is is_live
        assert not self.core.abort(request_id)
        self.listener.take(self.core.take_events())

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        self.core.renew(data.draw(st.sampled_from(sorted(self.requests))))

    @rule(seconds=st.sampled_from([0.05, 0.2, 3.0]))
    def forget(self, seconds: float) -> None:
        """Time passes, and nobody renews."""
        self.clock.now += seconds
        due = {
            i for i, s in self.core._sequences.items() if s.lease_until is not None and self.clock.now > s.lease_until
        }
        if not self.dead:
            self.listener.take(self.core.step())
            assert due <= self.listener.ends.keys()
            assert all(self.listener.ends[i].reason is FinishReason.CANCELLED for i in due)

    @precondition(lambda self: not self.dead and len(self.requests) % 4 == 3 and self.core.scheduler.running)
    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        """The kernels refuse one of them from now on."""
        running = sorted(s.request.request_id for s in self.core.scheduler.running)
        self.runner.refused.add(data.draw(st.sampled_from(running)))

    @precondition(lambda self: not self.dead and len(self.requests) > 6 and self.core.scheduler.running)
    @rule()
    def fail(self) -> None:
        self.runner.fail = self.dead = True
        live = set(self.core._sequences)
        with pytest.raises(EngineDeadError) as caught:
            self.core.step()
        assert isinstance(caught.value.__cause__, RunnerError)
        self.listener.take(self.core.take_events())
        assert all(self.listener.ends[i].reason is FinishReason.FAILED for i in live)

    # --- what must hold ---

    def _add(self, codes: CodesRequest, piece: tuple[object, ...], **options: object) -> None:
        counted["transitions"] += 1
        request_id = str(len(self.requests))
        request = EngineRequest(request_id, codes, **options)  # type: ignore[arg-type]
        before = self.core.stats()
        try:
            self.core.add(request)
        except InvalidRequestError:
            assert self.core.stats() == before
        except EngineDeadError:
            assert self.dead
        else:
            self.requests[request_id], self.pieces[request_id] = request, piece

    def _look(self) -> None:
        self.core.check()
        stats, running = self.core.stats(), self.core.scheduler.running
        ends = len(self.listener.ends)
        assert stats.num_accepted == len(self.requests) == stats.num_waiting + stats.num_running + ends
        whole = self.core.scheduler.whole_capacity
        assert sum(s.num_rows for s in running) <= whole.num_rows
        assert len(running) <= whole.num_requests
        counted["steps"] += 1
        counted["waited"] += bool(stats.num_waiting)
        held = sum(len(row.pages) for s in running for row in s.rows)
        counted["shared"] += held > stats.pages_held

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        if not self.dead:
            for _ in range(MOST_STEPS * (1 + len(self.requests))):
                if not self.core.has_work:
                    break
                self.listener.take(self.core.step())
                self._look()
        assert not self.core.has_work, "somebody starves"
        assert self.listener.ends.keys() == self.requests.keys()
        assert self.core.stats().pages_held == 0
        assert self.runner.most_step_rows <= self.core.config.scheduler.max_step_rows
        for request_id, end in self.listener.ends.items():
            counted[end.reason.value] += 1
            if end.reason is FinishReason.FINISHED:
                self._check_codes(request_id)

    def _check_codes(self, request_id: str) -> None:
        codes = self.requests[request_id].codes
        made, first = self.listener.codes(request_id), self.listener.chunks[request_id][0].frame_offset
        assert first == codes.num_known_frames
        assert first + made.shape[-1] == codes.num_frames
        piece = self.pieces[request_id]
        if piece not in _alone:
            _alone[piece] = alone(codes_request(**dict(piece)))  # type: ignore[arg-type]
        assert torch.equal(made, _alone[piece][:, first:]), "other codes than alone"


def test_any_life_ends_at_rest() -> None:
    num_lives = max(1, NUM_TRANSITIONS // 350)
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=num_lives,
            stateful_step_count=STEPS_A_LIFE,
            deadline=None,
            derandomize=NUM_TRANSITIONS <= 10_000,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(counted)
    for what in ("finished", "cancelled", "failed", "waited", "shared"):
        assert counted[what] > 0, f"no life in which anything was {what}"
    assert MAX_FRAMES < 90  # some pieces have several windows
