"""What a step is told of its rows and of the sequences that decide, as arrays. Knows neither devices nor kernels."""

from __future__ import annotations

import numpy as np

from musicgen.engine.batch import MAX_GUIDANCE_ROWS, RowChunk, ScheduledBatch
from musicgen.engine.sequence import Sequence


def row_id(chunk: RowChunk) -> int:
    """A row's number among those that can be open at the same time."""
    return chunk.sequence.slot * MAX_GUIDANCE_ROWS + chunk.row.index


def is_decode(batch: ScheduledBatch) -> bool:
    """Whether every row feeds one step's codes and decides the next: no prefix, no prefill."""
    return bool(batch.chunks) and all(
        chunk.num_new == 1 and chunk.start >= chunk.sequence.prefill_len for chunk in batch.chunks
    )


def fed_codes(sequence: Sequence) -> np.ndarray:
    """`[K]` codes of the position behind the prefill, and of those that follow."""
    if sequence.next_codes is None:
        first: np.ndarray = sequence.prefill_codes()[:, -1].numpy()
        return first
    return sequence.next_codes


def decided_steps(batch: ScheduledBatch) -> list[int]:
    """The delayed step, counted from the beginning of the piece, that each deciding sequence decides."""
    last_position = {id(chunk.sequence): chunk.start + chunk.num_new - 1 for chunk in batch.chunks}
    return [s.window.start + last_position[id(s)] - s.inputs.prefix_len + 1 for s in batch.deciding]


def sampling_parameters(sequences: list[Sequence], codebook_size: int) -> dict[str, np.ndarray]:
    """The fields of a `SampleBatch` of those sequences; `steps` are zeros, to be overwritten at each step."""
    params = [sequence.request.codes.sampling for sequence in sequences]

    def ints(values: list[int]) -> np.ndarray:
        return np.array(values, dtype=np.int32)

    def floats(values: list[float]) -> np.ndarray:
        return np.array(values, dtype=np.float32)

    return {
        "row_offsets": np.cumsum([0, *(sequence.num_rows for sequence in sequences)], dtype=np.int32),
        "slots": ints([sequence.slot for sequence in sequences]),
        "steps": ints([0] * len(sequences)),
        "num_frames": ints([sequence.window.end for sequence in sequences]),
        "seeds": np.array([p.seed for p in params], dtype=np.int64),
        "guidance": floats([p.guidance_scale for p in params]),
        "guidance_beta": floats([1.0 if p.melody_guidance is None else p.melody_guidance for p in params]),
        "temperature": floats([0.0 if p.greedy else p.temperature for p in params]),
        "top_k": ints([min(p.top_k, codebook_size) for p in params]),  # kernels take no more than 31 bits
        "top_p": floats([p.top_p for p in params]),
    }
