"""One request on its way through a replica: when its frames were complete, and how it ended. Knows no scheduler."""

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
    """How a request ended; exactly one for each."""

    FINISHED = "finished"
    LEFT = "left"
    """Its listener went away before all frames were made."""
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request."""

    request: Request
    replica: int
    end: End
    queue_s: float
    """From its arrival until it held pages; infinite if it never did."""
    first_audio_s: float
    """From the listener's wish to the first sound; infinite if there was none."""
    underrun_s: float
    num_underruns: int
    made_s: float
    """From arrival to the end."""
    frames_made: int


@dataclass(frozen=True, slots=True)
class Listening:
    """What surrounds the engine, the same for all requests; all times are assumptions."""

    frame_rate_hz: float
    before_s: float
    """Text encoder, chroma and the way there, before the engine sees the request."""
    codec_s: float
    """Codec and the way back, for each chunk."""
    prebuffer_s: float


@dataclass(slots=True, eq=False)
class Job:
    """A request in a replica. Set by the replica."""

    request: Request
    sequence: Sequence
    num_rows: int
    load_left: int
    """Row-steps still to be decoded in the current window and those after it, for the balancer."""
    steps: list[list[int]] = field(default_factory=list)
    """Ranges [first, count] of the replica's steps in which it decoded."""
    ends_at: int = 0
    """Positions a row at the end of the current window."""
    frames_base: int = 0
    """Complete frames of the piece less positions a row, in the current window."""
    kv_extra: int = 0
    """Positions of the text that each step reads besides (cross-attention)."""

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
        """When its decode step number `ordinal` (from 1) was done."""
        for first, count in self.steps:
            if ordinal <= count:
                return step_ends[first + ordinal - 1]
            ordinal -= count
        return math.inf

    def chunks(self, policy: ChunkPolicy, step_ends: array[float]) -> tuple[list[float], list[int]]:
        """When the chunks that are complete by now were, and their frames. As `EngineCore` hands them out: a chunk
        once it is as long as the policy wants, the rest with the last step."""
        max_delay = self.sequence.config.delay_pattern.max_delay
        ready, lengths = [], []
        known = done = self.request.num_known
        before, begin = 0, known  # steps and frames before the window that makes frame `done`
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
        """What its listener heard of the chunks that are complete by now; None if nothing."""
        ready, lengths = self.chunks(policy, step_ends)
        return play(
            ready,
            lengths,
            is_complete=sum(lengths) == self.request.num_new,
            frame_rate_hz=listening.frame_rate_hz,
            codec_s=listening.codec_s,
            prebuffer_s=listening.prebuffer_s,
        )
