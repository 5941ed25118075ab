"""The engine: requests in, events out. A step is schedule → run → postprocess.

Synchronous and used by one thread at a time; see `thread` and `async_engine` for concurrency. Independent of text,
audio and transport.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from musicgen_kernels.errors import KernelArgumentError

from musicgen.config import EngineConfig
from musicgen.engine.batch import ScheduledBatch
from musicgen.engine.checks import check_request
from musicgen.engine.forecast import Demand
from musicgen.engine.kv_cache import PageAllocator
from musicgen.engine.runner import ModelRunner
from musicgen.engine.scheduler import Scheduler
from musicgen.engine.sequence import Phase, Sequence
from musicgen.engine.step_times import StepTimes
from musicgen.errors import DeadlineTooShortError, EngineDeadError, InvalidRequestError, OverloadedError
from musicgen.models.language_model import LanguageModel
from musicgen.types import CodeChunk, EndOfRequest, EngineEvent, EngineRequest, FinishReason

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Engine statistics. Invariant between calls: accepted = waiting + running + finished + cancelled + failed."""

    num_waiting: int
    num_running: int
    num_accepted: int
    num_finished: int
    num_cancelled: int
    num_failed: int
    pages_held: int
    pages_total: int
    waiting_frames: float
    """Frames left to decode for waiting requests, counted once per guidance row."""
    running_frames: float
    """The same for running requests."""
    step_s: float
    """Running mean of the step time."""


class EngineCore:
    """Continuous batching of requests to one language model.

    Args:
        lm: the model.
        clock: time in seconds, for queue times, leases and playback.
    """

    def __init__(
        self,
        lm: LanguageModel,
        config: EngineConfig | None = None,
        *,
        runner: ModelRunner | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        config = config or EngineConfig()
        self.config = replace(config, scheduler=config.scheduler.resolved(lm.device.type))
        self.model_config = lm.config
        self._lm, self._clock = lm, clock
        self.runner = runner or ModelRunner(lm, config)
        self.allocator = PageAllocator(self.runner.num_pages)
        self.scheduler = Scheduler(self.config.scheduler, self.allocator, lm.config.frame_rate_hz)
        self._sequences: dict[str, Sequence] = {}
        self._ended: dict[FinishReason, int] = dict.fromkeys(FinishReason, 0)
        self._num_accepted = 0
        self._step_times = StepTimes()
        self._events: list[EngineEvent] = []
        self._fatal: str | None = None

    # --- requests ---

    def add(self, request: EngineRequest) -> float:
        """Accept a request; returns the estimated seconds until it starts.

        Raises:
            InvalidRequestError: it can never run on this engine; not accepted.
            OverloadedError: the waiting queue is full; not accepted.
            DeadlineTooShortError: its deadline cannot be met; not accepted.
            EngineDeadError: the engine has failed.
        """
        self._check_alive()
        if request.request_id in self._sequences:
            raise InvalidRequestError("an unused request id", request.request_id, param="request_id")
        check_request(request, self.model_config)
        if len(self.scheduler.waiting) >= self.config.scheduler.max_waiting:
            raise OverloadedError(
                f"expected fewer than {self.config.scheduler.max_waiting} waiting requests; retry later"
            )
        sequence = self._new_sequence(request)
        if not self.scheduler.fits_alone(sequence):
            raise self._too_large(sequence.demand())
        quoted_steps = self.scheduler.steps_to_start(sequence)
        total_s = (quoted_steps + sequence.num_steps_left) * self._step_times.mean_s
        if request.deadline_s is not None and total_s > request.deadline_s:
            raise DeadlineTooShortError(
                f"expected a deadline of at least {total_s:.1f} s, got {request.deadline_s:.1f} s; "
                "allow more time or request less audio"
            )
        self._sequences[request.request_id] = sequence
        self._num_accepted += 1
        self.scheduler.add(sequence)
        return quoted_steps * self._step_times.mean_s

    def abort(self, request_id: str) -> bool:
        """Cancel a request and free its pages at once. False if it has ended or never existed."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        self._end(sequence, FinishReason.CANCELLED)
        return True

    def renew(self, request_id: str) -> None:
        """Extend the lease of a request by its length."""
        sequence = self._sequences.get(request_id)
        if sequence is not None and sequence.request.lease_s is not None:
            sequence.lease_until = self._clock() + sequence.request.lease_s

    @property
    def has_work(self) -> bool:
        """Whether `step` has work to do."""
        return bool(self._sequences or self._events)

    def stats(self) -> EngineStats:
        waiting = self.scheduler.waiting.all()
        return EngineStats(
            num_waiting=len(waiting),
            num_running=len(self.scheduler.running),
            num_accepted=self._num_accepted,
            num_finished=self._ended[FinishReason.FINISHED],
            num_cancelled=self._ended[FinishReason.CANCELLED],
            num_failed=self._ended[FinishReason.FAILED],
            pages_held=self.allocator.num_held,
            pages_total=self.allocator.num_pages,
            waiting_frames=sum(s.cost for s in waiting),
            running_frames=sum(s.num_steps_left * s.num_rows for s in self.scheduler.running),
            step_s=self._step_times.mean_s,
        )

    # --- a step ---

    def step(self) -> list[EngineEvent]:
        """Run one step; returns the events since the last call.

        Raises:
            EngineDeadError: the step failed. All requests have failed (see `take_events`), and every later call
                raises.
        """
        self._check_alive()
        began = self._clock()
        try:
            self._expire(began)
            batch = self.scheduler.schedule(began, self._step_times)
            self._open_admitted(batch)
            if batch.chunks:
                num_rows = batch.num_decoded_rows
                self._postprocess(*self._compute(batch))
                self._step_times.add(self._clock() - began, num_rows)
        except Exception as error:
            raise self.die(error) from error
        return self.take_events()

    def take_events(self) -> list[EngineEvent]:
        """The events since the last call, without running a step."""
        events, self._events = self._events, []
        return events

    def _compute(self, batch: ScheduledBatch) -> tuple[ScheduledBatch, np.ndarray]:
        """Run a step; returns the batch that was computed, and its codes.

        Kernels reject invalid arguments before writing anything, but cannot tell which sequence is at fault. The
        sequences are then run one by one: rejected ones fail, the others get the same codes as in the whole batch.
        """
        try:
            return batch, self.runner.run(batch)
        except KernelArgumentError:
            parts = batch.by_sequence()
        computed, codes = ScheduledBatch(), []
        for part in parts:
            try:
                codes.append(self.runner.run(part))
            except KernelArgumentError:
                logger.exception("request %s: rejected by the kernels", part.sequence.request.request_id)
                self._end(part.sequence, FinishReason.FAILED, "the model's kernels rejected this request")
            else:
                computed.chunks.extend(part.chunks)
                computed.deciding.extend(part.deciding)
        return computed, np.concatenate([*codes, np.empty((0, self.model_config.decoder.num_codebooks), np.int32)])

    def _postprocess(self, batch: ScheduledBatch, codes: np.ndarray) -> None:
        for chunk in batch.chunks:
            chunk.row.num_computed += chunk.num_new
            self.scheduler.pages.publish(chunk.sequence, chunk.row)
        for sequence, decided in zip(batch.deciding, codes, strict=True):
            self._advance(sequence, decided)

    def _advance(self, sequence: Sequence, decided: np.ndarray) -> None:
        """Process the codes that a sequence decided in one step."""
        if sequence.phase is Phase.PREFILL:
            self.scheduler.began_decoding(sequence)
            if sequence.times.decoding is None:
                sequence.times.decoding = self._clock()
        sequence.feed(decided)
        num_steps, end = sequence.next_step, sequence.window.end  # decided steps, step 0 included
        sequence.num_frames = max(sequence.num_frames, min(sequence.pattern.num_complete_frames(num_steps), end))
        is_last = num_steps == sequence.pattern.num_steps(end)
        has_more = is_last and sequence.window_index + 1 < len(sequence.windows)
        if sequence.num_frames >= sequence.due_frames or (is_last and not has_more):
            self._send(sequence)
        if has_more:
            known = self.runner.frames(sequence.slot, 0, sequence.num_frames)
            self.scheduler.pages.release(sequence)
            sequence.next_window(known)
            self.scheduler.open_window(sequence)
            self.runner.open(sequence)
        elif is_last:
            self._end(sequence, FinishReason.FINISHED)

    def _send(self, sequence: Sequence) -> None:
        """Emit the complete frames."""
        if sequence.num_frames == sequence.num_sent_frames:
            return
        codes = self.runner.frames(sequence.slot, sequence.num_sent_frames, sequence.num_frames)
        self._events.append(CodeChunk(sequence.request.request_id, codes, sequence.num_sent_frames))
        sequence.sent()
        if sequence.times.first_chunk is None:
            sequence.times.first_chunk = self._clock()

    def _open_admitted(self, batch: ScheduledBatch) -> None:
        for chunk in batch.chunks:
            if not chunk.sequence.is_open:
                self.runner.open(chunk.sequence)
                chunk.sequence.is_open = True

    # --- ends ---

    def _expire(self, now: float) -> None:
        for sequence in list(self._sequences.values()):
            if sequence.lease_until is not None and now > sequence.lease_until:
                self._end(sequence, FinishReason.CANCELLED, "its lease expired without renewal")

    def _end(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        """The only place where a request ends. If closing it fails, it stays registered and fails with the engine."""
        if self._fatal is None:
            if sequence.is_open:
                self.runner.close(sequence.slot)
            self.scheduler.remove(sequence)
        else:  # every request gets its event, in whatever state the failure left it
            with contextlib.suppress(Exception):
                self.scheduler.remove(sequence)
        del self._sequences[sequence.request.request_id]
        self._ended[reason] += 1
        usage = sequence.usage(self._clock())
        self._events.append(EndOfRequest(sequence.request.request_id, reason, usage, error))

    def die(self, error: Exception) -> EngineDeadError:
        """Fail every request and every later call with `error`; returns the exception to raise."""
        self._fatal = f"{type(error).__name__}: {error}"
        logger.error("the engine failed", exc_info=error)
        reason = f"the engine failed: {self._fatal}"
        for sequence in list(self._sequences.values()):
            self._end(sequence, FinishReason.FAILED, reason)
        return EngineDeadError(reason)

    def _check_alive(self) -> None:
        if self._fatal is not None:
            raise EngineDeadError(f"the engine has failed: {self._fatal}; replace this replica")

    def check(self) -> None:
        """Assert that pages, counters and page tables are consistent. For tests and idle time."""
        running = self.scheduler.running
        self.allocator.check(row.pages for sequence in running for row in sequence.rows)
        stats = self.stats()
        assert stats.num_accepted == len(self._sequences) + sum(self._ended.values())
        assert stats.num_waiting + stats.num_running == len(self._sequences)

    def _new_sequence(self, request: EngineRequest) -> Sequence:
        """The sequence with the plans of its remaining windows; their inputs are computed when they open."""
        codes = request.codes
        windows = [
            (window, self._lm.plan_rows(conditioning, codes.sampling))
            for window, conditioning in codes.windows
            if window.end > codes.num_known_frames
        ]
        return Sequence(request, self.model_config, windows, self._clock())

    def _too_large(self, demand: Demand) -> InvalidRequestError:
        most_rows, most_pages = self.config.scheduler.max_rows, self.allocator.num_pages
        if demand.num_rows > most_rows:
            remedy = "reduce guidance, or raise the engine's max_rows"
            return InvalidRequestError(
                f"at most {most_rows} rows", str(demand.num_rows), remedy, param="guidance_scale"
            )
        expected, got = f"a request that fits {most_pages} pages", f"{demand.most_pages} pages"
        return InvalidRequestError(expected, got, "shorten the piece, or give the engine more memory", param="duration")
