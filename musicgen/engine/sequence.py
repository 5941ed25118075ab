"""State of one request inside the engine: its rows, their progress, and timestamps. Contains no scheduling policy."""

from __future__ import annotations

import enum
import itertools
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from musicgen_kernels import PAGE_LEN
from torch import Tensor

from musicgen.config import ModelConfig
from musicgen.delay import UNKNOWN_CODE
from musicgen.engine.forecast import Demand
from musicgen.engine.kv_cache import PageKey, num_pages_for, page_keys
from musicgen.models.language_model import GuidanceRows, PlannedRows
from musicgen.types import EngineRequest, Usage, Window


class Phase(enum.Enum):
    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Row:
    """One guidance row of the current window. Positions: the prefix, then one per step fed."""

    index: int
    """Index among the rows of its request: conditional first, null last."""
    keys: list[PageKey]
    """Keys of the full prefill pages, then of the partial page if there is one."""
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_published: int = 0


@dataclass(slots=True)
class Times:
    """Timestamps in seconds of the engine's clock."""

    arrived: float
    admitted: float | None = None
    decoding: float | None = None
    first_chunk: float | None = None


class Sequence:
    """State of a request. Written by the engine core and the scheduler; read by the runner.

    Args:
        windows: plans of the remaining windows; their inputs are computed when they open.
        slot: index in the runner's code buffer while admitted.
    """

    def __init__(
        self, request: EngineRequest, config: ModelConfig, windows: list[tuple[Window, PlannedRows]], now: float
    ) -> None:
        self.request = request
        self.config, self.pattern = config, config.delay_pattern
        self.windows = windows
        self.phase = Phase.WAITING
        self.times = Times(now)
        self.lease_until = None if request.lease_s is None else now + request.lease_s
        self.slot = -1
        self.is_open = False
        """Whether the runner has opened it."""
        self.rows: list[Row] = []
        self.num_frames = self.num_sent_frames = request.codes.num_known_frames
        """Complete frames, and frames emitted."""
        self.due_frames = self._next_due(0)
        """Frames that must be complete before the next chunk is emitted."""
        self.promised_step: int | None = None
        """The scheduler step at which it was to start when it became first in turn; see `Scheduler`."""
        self.next_codes: np.ndarray
        """`[K]` codes of the step to feed next."""
        self.window_index = 0
        self.known = self._known_codes()
        self._open_window()

    # --- the current window ---

    @property
    def num_computed(self) -> int:
        """Positions that every row has computed."""
        return min([row.num_computed for row in self.rows])

    @property
    def next_step(self) -> int:
        """The delayed step to decide next, counted from the start of the piece."""
        return self.window.start + self.num_computed - self.prefix_len + 1

    def demand(self, num_private: int = 0, num_freed: int = 0) -> Demand:
        """Its demand from now to its end.

        A piece of several windows is assumed to need its widest window throughout and to share no pages, because the
        next window may not share any.

        Args:
            num_private: held pages that no other sequence holds.
            num_freed: held pages that no other sequence will hold when it ends.
        """
        if len(self.windows) > 1:
            windows = range(self.window_index, len(self.windows))
            num_rows = max(self.windows[i][1].num_rows for i in windows)
            widest = max(self._row_len(i) for i in windows)
            return Demand(num_rows, widest, self.num_steps_left, 0, num_private, num_freed)
        length = max(self.prefill_len, self.num_computed)
        num_held = sum(len(row.pages) for row in self.rows)
        return Demand(self.num_rows, length, self.row_len - length, 1, num_held, num_freed)

    @property
    def num_steps_left(self) -> int:
        """Decode steps to the end of the piece."""
        max_delay = self.pattern.max_delay
        done = max(self.num_computed - self.prefill_len, 0)
        left = self.row_len - self.prefill_len - done
        ends = [window.end for window, _ in self.windows[self.window_index :]]
        return left + sum(end - previous + max_delay for previous, end in itertools.pairwise(ends))

    @property
    def cost(self) -> float:
        """Frames to generate, counted once per guidance row."""
        return float((self.request.codes.num_frames - self.num_frames) * self.num_rows)

    def usage(self, now: float) -> Usage:
        times = self.times
        admitted = now if times.admitted is None else times.admitted
        decoding = now if times.decoding is None else times.decoding
        return Usage(
            num_frames=self.num_frames - self.request.codes.num_known_frames,
            queue_s=admitted - times.arrived,
            prefill_s=decoding - admitted,
            decode_s=now - decoding,
        )

    def _next_due(self, num_handed_out: int) -> float:
        """Frames at which the chunk after one of `num_handed_out` is due; at the end for non-streaming requests."""
        policy = self.request.chunks
        return math.inf if policy is None else self.num_sent_frames + policy.next_frames(num_handed_out)

    # --- changes ---

    def sent(self) -> None:
        """Mark all complete frames as emitted."""
        num_handed_out, self.num_sent_frames = self.num_frames - self.num_sent_frames, self.num_frames
        self.due_frames = self._next_due(num_handed_out)

    def next_window(self, known: Tensor) -> None:
        """Advance to the next window; `known` are the `[K, T]` codes of the piece so far."""
        self.window_index += 1
        self.known = known
        self._open_window()

    def feed(self, decided: np.ndarray) -> None:
        """Feed the codes `[K]` of the step just decided in the next step.

        In the first steps of a later window the delays reach back to frames before it. The special token is used there,
        as in prefill, so that prefill and decode compute the same.
        """
        step, pattern = self.num_computed - self.prefix_len, self.pattern
        if step <= pattern.max_delay:
            is_before = np.array(pattern.delays) >= step
            decided = np.where(is_before, self.config.decoder.special_token, decided)
        self.next_codes = decided

    def prefill_codes(self) -> Tensor:
        """`[K, S]` delayed codes of the window's known steps; the first decode step feeds the last one."""
        pattern, special = self.pattern, self.config.decoder.special_token
        delayed = pattern.apply(self.known[:, self.window.start :], special)
        return delayed[:, : pattern.first_step_after(self.num_known - self.window.start)]

    def delayed_codes(self) -> Tensor:
        """`[K, S]` delayed codes of the piece up to the window's end, with `UNKNOWN_CODE` where not yet known."""
        pattern, special = self.pattern, self.config.decoder.special_token
        unknown = self.known.new_full((pattern.num_codebooks, self.window.end - self.num_known), UNKNOWN_CODE)
        return pattern.apply(torch.cat([self.known, unknown], -1), special)

    def _open_window(self) -> None:
        """Cache values that are constant within the window and used several times per step."""
        self.window, planned = self.windows[self.window_index]
        self.inputs: GuidanceRows = planned.make()
        self.num_rows, self.prefix_len = self.inputs.num_rows, self.inputs.prefix_len
        self.num_known = self.known.shape[-1]
        """Frames known when the window was opened."""
        self.prefill_len = self.prefix_len + self.num_known - self.window.start
        """Positions per row known in advance, except the last, which the first decode step feeds."""
        self.row_len = self._row_len(self.window_index)
        """Positions per row when the window is complete. The last step is decided but not fed."""
        codes = self.prefill_codes()
        self.next_codes = codes[:, -1].numpy().copy()
        prefilled = codes[:, :-1].contiguous()
        self.rows = [Row(i, self._keys(i, prefilled)) for i in range(self.num_rows)]

    def _keys(self, row: int, codes: Tensor) -> list[PageKey]:
        """Keys of the prefill pages, covering the prefix embeddings, the codes and the cross-attention inputs."""
        prefix, text = self.inputs.prefix, self.inputs.text
        attended = b"" if text is None else text[row].cpu().numpy().tobytes()
        prefix_len = self.prefix_len
        contents = []
        for page in range(num_pages_for(self.prefill_len)):
            first, last = page * PAGE_LEN, min((page + 1) * PAGE_LEN, self.prefill_len)
            content = attended if page == 0 else b""
            if prefix is not None and first < prefix_len:
                content += prefix[row, first : min(last, prefix_len)].cpu().numpy().tobytes()
            content += codes[:, max(first - prefix_len, 0) : max(last - prefix_len, 0)].numpy().tobytes()
            contents.append(content)
        return page_keys(contents)

    def _row_len(self, index: int) -> int:
        window, planned = self.windows[index]
        return planned.prefix_len + self.pattern.num_steps(window.end - window.start) - 1

    def _known_codes(self) -> Tensor:
        known = self.request.codes.known_codes
        if known is None:
            return torch.empty(self.config.decoder.num_codebooks, 0, dtype=torch.int32)
        return known.to("cpu", torch.int32)
