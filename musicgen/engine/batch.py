"""The batch of one step: built by the scheduler, computed by the runner, processed by the core."""

from __future__ import annotations

from dataclasses import dataclass, field

from musicgen.engine.sequence import Row, Sequence

MAX_GUIDANCE_ROWS = 3
"""Maximum rows per sequence."""


@dataclass(frozen=True, slots=True, eq=False)
class RowChunk:
    """Positions `start` … `start + num_new` − 1 of one row, computed in this step."""

    sequence: Sequence
    row: Row
    start: int
    num_new: int

    @property
    def end(self) -> int:
        """Length of the row in positions after the step."""
        return self.start + self.num_new


@dataclass(frozen=True, slots=True, eq=False)
class ScheduledBatch:
    """One step. The rows of a deciding sequence are adjacent, and logits are computed for the last position of each."""

    chunks: list[RowChunk] = field(default_factory=list)
    deciding: list[Sequence] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    """Pages (from, to) to copy before the computation."""

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_new for chunk in self.chunks)

    @property
    def num_decoded_rows(self) -> int | None:
        """Rows of a decode-only step; None: the step also prefills."""
        num_rows = sum(sequence.num_rows for sequence in self.deciding)
        return num_rows if num_rows == len(self.chunks) == self.num_tokens else None

    @property
    def sequence(self) -> Sequence:
        """The sequence of a batch with a single one."""
        return self.chunks[0].sequence

    def by_sequence(self) -> list[ScheduledBatch]:
        """The step split by sequence; the first batch has all copies."""
        deciding = set(map(id, self.deciding))
        parts: dict[int, ScheduledBatch] = {}
        for chunk in self.chunks:
            key = id(chunk.sequence)
            if key not in parts:
                own = [chunk.sequence] if key in deciding else []
                parts[key] = ScheduledBatch(deciding=own, copies=[] if parts else self.copies)
            parts[key].chunks.append(chunk)
        return list(parts.values())
