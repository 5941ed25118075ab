"""One request in a replica: when its frames were completed, and how it ended. Independent of the scheduler."""

from __future__ import annotations

import enum
import math
from array import array
from dataclasses import dataclass, field

from benchmarks.simulation.player import Heard, play
from benchmarks.simulation.workload import Request
from musicgen.engine.sequence import Sequence
from musicgen.types import ChunkPolicy


class End(enum.Enum):
    """How a request ended; exactly one per request."""

    FINISHED = "finished"
    LEFT = "left"
    """Its listener disconnected before all frames were generated."""
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Outcome of one request."""

    request: Request
    replica: int
    end: End
    queue_s: float
    """From arrival until it held pages; infinite if it never did."""
    first_audio_s: float
    """From the listener's request to the first audio; infinite if there was none."""
    underrun_s: float
    num_underruns: int
    made_s: float
    """From arrival to the end."""
    frames_made: int


@dataclass(frozen=True, slots=True)
class Listening:
    """Everything around the engine, the same for all requests; all times are assumptions."""

    frame_rate_hz: float
    before_s: float
    """Text encoder, chroma and network, before the request reaches the engine."""
    codec_s: float
    """Codec and network, per chunk."""
    prebuffer_s: float


@dataclass(slots=True, eq=False)
class Job:
    """A request in a replica. Set by the replica."""

    request: Request
    sequence: Sequence
    num_rows: int
    load_left: int
    """Remaining row-steps in the current and later windows, for the balancer."""
    steps: list[list[int]] = field(default_factory=list)
    """Ranges [first, count] of the replica's steps in which it decoded."""
    ends_at: int = 0
    """Positions per row at the end of the current window."""
    frames_base: int = 0
    """Complete frames of the piece minus positions per row, in the current window."""
    kv_extra: int = 0
    """Additional text positions read by each step (cross-attention)."""

    def open_window(self) -> None:
        """Its sequence has opened a window."""
        sequence = self.sequence
        max_delay = sequence.config.delay_pattern.max_delay
        self.ends_at = sequence.row_len
        self.frames_base = sequence.window.start - sequence.inputs.prefix_len - max_delay

    def decoded(self, first_step: int, num_steps: int) -> None:
        """It decoded in the replica's steps `first_step` … `first_step + num_steps` − 1."""
        if self.steps and sum(self.steps[-1]) == first_step:
            self.steps[-1][1] += num_steps
        else:
            self.steps.append([first_step, num_steps])

    def time_of(self, ordinal: int, step_ends: array[float]) -> float:
        """End time of its decode step number `ordinal` (from 1)."""
        for first, count in self.steps:
            if ordinal <= count:
                return step_ends[first + ordinal - 1]
            ordinal -= count
        return math.inf

    def chunks(self, policy: ChunkPolicy, step_ends: array[float]) -> tuple[list[float], list[int]]:
        """Completion times and lengths of the chunks completed so far. As in `EngineCore`: a chunk is emitted once it
        has the length required by the policy, the rest with the last step."""
        max_delay = self.sequence.config.delay_pattern.max_delay
        ready, lengths = [], []
        known = done = self.request.num_known
        before, begin = 0, known  # steps and frames before the window that generates frame `done`
        ends = [window.end for window, _ in self.sequence.windows]
        last = 0
        while done < ends[-1]:
            last = min(policy.next_frames(last), ends[-1] - done)
            done += last
            while done > ends[0]:
                before, begin = before + ends[0] - begin + max_delay, ends[0]
                ends = ends[1:]
            time = self.time_of(before + done - begin + max_delay, step_ends)
            if math.isinf(time):
                break
            ready.append(time)
            lengths.append(last)
        return ready, lengths

    def heard(self, policy: ChunkPolicy, step_ends: array[float], listening: Listening) -> Heard | None:
        """Playback of the chunks completed so far; None if nothing was played."""
        ready, lengths = self.chunks(policy, step_ends)
        return play(
            ready,
            lengths,
            is_complete=sum(lengths) == self.request.num_new,
            frame_rate_hz=listening.frame_rate_hz,
            codec_s=listening.codec_s,
            prebuffer_s=listening.prebuffer_s,
        )
