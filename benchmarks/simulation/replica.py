"""One replica on a virtual clock: the real scheduler and page allocator, no tensors, steps of modelled duration.

Replicates what `EngineCore` does around the scheduler, but takes runs of identical steps at once. The results equal
those of single steps: the end, pages and rows of each step are computed, only the calls are saved.
"""

from __future__ import annotations

import heapq
import math
from array import array
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.simulation.fairness_gap import FairnessGap
from benchmarks.simulation.job import End, Job, Listening, Outcome
from benchmarks.simulation.leaping import LeapingScheduler
from benchmarks.simulation.step_time import Floats, StepLoad, StepTime
from benchmarks.simulation.workload import Request, new_sequence
from musicgen.config import ModelConfig, SchedulerConfig
from musicgen.engine.batch import ScheduledBatch
from musicgen.engine.kv_cache import PageAllocator
from musicgen.engine.sequence import Phase, Sequence
from musicgen.engine.step_times import StepTimes
from musicgen.types import ChunkPolicy

LONGEST_LEAP = 512
MAX_EMPTY_STEPS = 64


@dataclass(frozen=True, slots=True)
class ReplicaConfig:
    """Configuration shared by all replicas.

    Args:
        deadline_factor: reject a request if its estimated time to completion exceeds this multiple of its duration
            (infinite: never).
        measured_s: start and end of the measured interval.
    """

    model: ModelConfig
    step_time: StepTime
    num_pages: int
    scheduler: SchedulerConfig
    chunks: ChunkPolicy
    listening: Listening
    deadline_factor: float = math.inf
    measured_s: tuple[float, float] = (0.0, math.inf)


@dataclass(slots=True)
class Use:
    """Usage of a replica in the measured interval."""

    num_steps: int = 0
    busy_s: float = 0.0
    page_s: float = 0.0
    """Pages held, integrated over time."""
    row_steps: int = 0
    stream_steps: int = 0
    """Decode steps, counted per stream."""
    most_pages: int = 0


class Replica:
    """A simulated replica. Call `advance` before reading its state or submitting."""

    def __init__(self, index: int, config: ReplicaConfig, leaps: bool = True) -> None:
        self.index, self.config = index, config
        self.allocator = PageAllocator(config.num_pages)
        self.scheduler = LeapingScheduler(config.scheduler.resolved("cuda"), self.allocator, config.model.frame_rate_hz)
        self.now = 0.0
        self.load_left = 0
        """Remaining row-steps of all requests."""
        self.use, self.fairness = Use(), FairnessGap()
        self.outcomes: list[Outcome] = []
        self._jobs: dict[int, Job] = {}
        self._leaving: list[tuple[float, int]] = []
        self._step_ends: array[float] = array("d")
        self._step_times = StepTimes()
        self._leaps = leaps
        self._num_empty = 0

    # --- arrivals and departures ---

    def submit(self, request: Request, now: float) -> None:
        """A request reaches the engine at `now`, to which the replica has been advanced."""
        if not self._jobs:
            self.now = max(self.now, now)
        sequence = new_sequence(request, self.config.model, self.config.chunks, now)
        if self._is_refused(sequence):
            self.outcomes.append(Outcome(request, self.index, End.REJECTED, math.inf, math.inf, 0.0, 0, 0.0, 0))
            return
        num_rows = sequence.num_rows
        job = Job(request, sequence, num_rows, sequence.num_steps_left * num_rows)
        job.open_window()
        if sequence.inputs.text is not None:
            job.kv_extra = request.text_len * (num_rows - 1)
        self._jobs[id(sequence)] = job
        self.load_left += job.load_left
        self.scheduler.add(sequence)
        self.fairness.came(request.tenant.name)
        if request.leaves_after_s < math.inf:
            heapq.heappush(self._leaving, (request.arrived_s + request.leaves_after_s, request.number))

    def _is_refused(self, sequence: Sequence) -> bool:
        """Same conditions as in `EngineCore.add`."""
        if len(self.scheduler.waiting) >= self.config.scheduler.max_waiting:
            return True
        if not self.scheduler.fits_alone(sequence):
            return True
        if math.isinf(self.config.deadline_factor):
            return False
        deadline_s = self.config.deadline_factor * sequence.request.codes.num_frames / self.config.model.frame_rate_hz
        num_steps = self.scheduler.steps_to_start(sequence) + sequence.num_steps_left
        return num_steps * self._step_times.mean_s > deadline_s

    def advance(self, until: float) -> None:
        """Execute all steps that start before `until`."""
        while self._jobs:
            self._let_leave()
            if self.now >= until or not self._jobs:
                return
            limit = min(until, self._leaving[0][0]) if self._leaving else until
            if not (self._leaps and self._leap(limit)):
                self._step()

    def _let_leave(self) -> None:
        while self._leaving and self._leaving[0][0] <= self.now:
            _, number = heapq.heappop(self._leaving)
            job = next((job for job in self._jobs.values() if job.request.number == number), None)
            if job is not None:
                if job.sequence.phase is Phase.WAITING:
                    self.fairness.left(job.request.tenant.name)
                self._end(job, End.LEFT)

    # --- one step, as in the core ---

    def _step(self) -> None:
        num_running = len(self.scheduler.running)
        batch = self.scheduler.schedule(self.now, self._step_times)
        for sequence in self.scheduler.running[num_running:]:
            self.fairness.began(sequence.request.tenant, sequence.cost / sequence.request.weight)
        if not batch.chunks:
            self._num_empty += 1
            assert self._num_empty < MAX_EMPTY_STEPS, "the scheduler has work but schedules nothing"
            return
        self._num_empty = 0
        num_rows = sum(s.num_rows for s in batch.deciding)
        pages = np.array([self.allocator.num_held], dtype=np.float64)
        first_step = len(self._step_ends)
        seconds = self.config.step_time.seconds(self._load_of(batch))
        self._pass(seconds, pages, num_rows, len(batch.deciding))
        self._step_times.add(float(seconds[0]), batch.num_decoded_rows)
        for chunk in batch.chunks:
            chunk.row.num_computed += chunk.num_new
            self.scheduler.pages.publish(chunk.sequence, chunk.row)
        for sequence in batch.deciding:
            if sequence.phase is Phase.PREFILL:
                self.scheduler.began_decoding(sequence)
                if sequence.times.decoding is None:
                    sequence.times.decoding = self.now
            self._decoded(self._jobs[id(sequence)], first_step, 1)

    def _load_of(self, batch: ScheduledBatch) -> StepLoad:
        num_positions = kv_positions = attended = 0
        for chunk in batch.chunks:
            num_positions += chunk.num_new
            kv_positions += chunk.start + chunk.num_new
            attended += chunk.num_new * chunk.start + chunk.num_new * (chunk.num_new + 1) // 2
        if self.config.model.chroma is None:
            texts = sum(self._jobs[id(s)].kv_extra for s in {id(c.sequence): c.sequence for c in batch.chunks}.values())
            kv_positions += texts
            attended += texts
        return StepLoad(num_positions, np.array([kv_positions], np.float64), np.array([attended], np.float64))

    # --- many identical steps ---

    def _leap(self, limit: float) -> bool:
        """Execute the quiet steps that start before `limit`; False if there are fewer than two."""
        quiet = self.scheduler.quiet_steps()
        if quiet < 2:
            return False
        running = self.scheduler.running
        jobs = [self._jobs[id(s)] for s in running]
        most = min(quiet, LONGEST_LEAP, *(job.ends_at - job.sequence.rows[0].num_computed for job in jobs))
        if most < 2:
            return False
        num_rows = sum(job.num_rows for job in jobs)
        read = sum((job.sequence.rows[0].num_computed + 1) * job.num_rows + job.kv_extra for job in jobs)
        kv_positions = (read + num_rows * np.arange(most)).astype(np.float64)
        seconds = self.config.step_time.seconds(StepLoad(num_rows, kv_positions, kv_positions))
        begins = np.cumsum(np.concatenate([[self.now], seconds]))[:-1]
        num_steps = int(np.searchsorted(begins, limit, "left"))
        slowest_s = max(float(seconds[num_steps - 1]), self._step_times.mean_s, self._step_times.of(num_rows) or 0.0)
        if slowest_s * self.config.model.frame_rate_hz > 1 and self.scheduler.some_modest:
            return False
        taken = np.array(self.scheduler.pages_after(), dtype=np.float64)
        pages = self.allocator.num_held + np.cumsum(np.resize(taken, num_steps))
        self.scheduler.leap(num_steps)
        first_step = len(self._step_ends)
        self._pass(seconds[:num_steps], pages, num_rows, len(running))
        for step_s in seconds[:num_steps].tolist():
            self._step_times.add(step_s, num_rows)
        for job in jobs:
            self._decoded(job, first_step, num_steps)
        return True

    # --- bookkeeping ---

    def _pass(self, seconds: Floats, pages: Floats, num_rows: int, num_streams: int) -> None:
        """Advance the clock by steps of these durations and record their usage."""
        ends = np.cumsum(np.concatenate([[self.now], seconds]))
        self._step_ends.extend(ends[1:].tolist())
        first, last = np.searchsorted(ends[:-1], self.config.measured_s, "left")
        use, inside = self.use, slice(first, last)
        use.num_steps += int(last - first)
        use.busy_s += float(seconds[inside].sum())
        use.page_s += float(pages[inside] @ seconds[inside])
        use.row_steps += num_rows * int(last - first)
        use.stream_steps += num_streams * int(last - first)
        use.most_pages = max(use.most_pages, int(pages[-1]))
        self.now = float(ends[-1])

    def _decoded(self, job: Job, first_step: int, num_steps: int) -> None:
        """A job has decoded `num_steps` steps; follows `EngineCore._advance`."""
        job.decoded(first_step, num_steps)
        job.load_left -= num_steps * job.num_rows
        self.load_left -= num_steps * job.num_rows
        sequence = job.sequence
        computed = sequence.rows[0].num_computed
        if (complete := job.frames_base + computed) > sequence.num_frames:
            while sequence.due_frames <= complete:
                sequence.num_frames = int(sequence.due_frames)
                sequence.sent()
                if sequence.times.first_chunk is None:
                    sequence.times.first_chunk = self._step_ends[sequence.num_frames - complete - 1]
            sequence.num_frames = complete
        if computed == job.ends_at:
            if sequence.window_index + 1 < len(sequence.windows):
                self._open_next_window(job)
            else:
                self._end(job, End.FINISHED)

    def _open_next_window(self, job: Job) -> None:
        sequence = job.sequence
        codes = torch.full((4, sequence.num_frames), job.request.number, dtype=torch.int32)
        self.scheduler.pages.release(sequence)
        sequence.next_window(codes)
        self.scheduler.open_window(sequence)
        job.open_window()

    def _end(self, job: Job, end: End) -> None:
        """The only place where an accepted request ends."""
        request, sequence, listening = job.request, job.sequence, self.config.listening
        heard = job.heard(self.config.chunks, self._step_ends, listening)
        del self._jobs[id(sequence)]
        self.load_left -= job.load_left
        self.scheduler.remove(sequence)
        admitted = sequence.times.admitted
        self.outcomes.append(
            Outcome(
                request=request,
                replica=self.index,
                end=end,
                queue_s=math.inf if admitted is None else admitted - sequence.times.arrived,
                first_audio_s=math.inf if heard is None else heard.first_audio_s - request.arrived_s,
                underrun_s=0.0 if heard is None else heard.underrun_s,
                num_underruns=0 if heard is None else heard.num_underruns,
                made_s=self.now - request.arrived_s,
                frames_made=sequence.num_frames - request.num_known,
            )
        )

    def check(self) -> None:
        """Assert that pages, rows and counters are consistent."""
        self.allocator.check(row.pages for s in self.scheduler.running for row in s.rows)
        assert len(self._jobs) == len(self.scheduler.running) + len(self.scheduler.waiting)
        assert self.load_left == sum(job.load_left for job in self._jobs.values())
