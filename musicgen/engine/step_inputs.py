"""Builds the input arrays of a step from its rows and deciding sequences. Independent of devices and kernels."""

from __future__ import annotations

import itertools

import numpy as np

from musicgen.engine.batch import MAX_GUIDANCE_ROWS, RowChunk, ScheduledBatch
from musicgen.engine.sequence import Sequence


def row_id(chunk: RowChunk) -> int:
    """A row's index among all rows that can be open."""
    return chunk.sequence.slot * MAX_GUIDANCE_ROWS + chunk.row.index


def is_decode(batch: ScheduledBatch) -> bool:
    """Whether every row feeds one step's codes and decides the next, without prefix or prefill."""
    return bool(batch.chunks) and all(
        chunk.num_new == 1 and chunk.start >= chunk.sequence.prefill_len for chunk in batch.chunks
    )


def step_inputs(batch: ScheduledBatch, num_codebooks: int, max_pages: int) -> dict[str, np.ndarray]:
    """The fields of a `StepBatch` except texts and prefix; `prefix_index` only if there is a prefix."""
    chunks = batch.chunks
    ends = list(itertools.accumulate(chunk.num_new for chunk in chunks))
    deciding = set(map(id, batch.deciding))
    page_table = np.zeros((len(chunks), max_pages), dtype=np.int32)
    for place, chunk in enumerate(chunks):
        page_table[place, : len(chunk.row.pages)] = chunk.row.pages
    fields = {
        "codes": np.concatenate([_codes(chunk, num_codebooks) for chunk in chunks]),
        "query_offsets": np.array([0, *ends], dtype=np.int32),
        "kv_lens": np.array([chunk.end for chunk in chunks], dtype=np.int32),
        "page_table": page_table,
        "logit_tokens": np.array(
            [end - 1 for end, chunk in zip(ends, chunks, strict=True) if id(chunk.sequence) in deciding], dtype=np.int32
        ),
    }
    is_prefix = np.concatenate([np.arange(c.start, c.end) < c.sequence.prefix_len for c in chunks])
    if is_prefix.any():
        fields["prefix_index"] = np.where(is_prefix, np.cumsum(is_prefix) - 1, -1).astype(np.int32)
    return fields


def _codes(chunk: RowChunk, num_codebooks: int) -> np.ndarray:
    """`[num_new, K]` codes of the chunk's positions; zeros at prefix positions."""
    sequence = chunk.sequence
    if chunk.start >= sequence.prefill_len:
        return sequence.next_codes[None]
    codes = np.zeros((chunk.num_new, num_codebooks), dtype=np.int32)
    first = max(chunk.start, sequence.prefix_len)
    if first < chunk.end:
        known = sequence.prefill_codes()[:, first - sequence.prefix_len : chunk.end - sequence.prefix_len]
        codes[first - chunk.start :] = known.numpy().T
    return codes


def decided_steps(batch: ScheduledBatch) -> np.ndarray:
    """The delayed step that each deciding sequence decides, counted from the start of the piece."""
    ends = {id(chunk.sequence): chunk.end for chunk in batch.chunks}
    return np.array([s.window.start + ends[id(s)] - s.prefix_len for s in batch.deciding], dtype=np.int32)


def sampling_parameters(sequences: list[Sequence], codebook_size: int) -> dict[str, np.ndarray]:
    """The fields of a `SampleBatch` of these sequences, except the steps."""
    params = [sequence.request.codes.sampling for sequence in sequences]

    def ints(values: list[int]) -> np.ndarray:
        return np.array(values, dtype=np.int32)

    def floats(values: list[float]) -> np.ndarray:
        return np.array(values, dtype=np.float32)

    return {
        "row_offsets": np.cumsum([0, *(sequence.num_rows for sequence in sequences)], dtype=np.int32),
        "slots": ints([sequence.slot for sequence in sequences]),
        "num_frames": ints([sequence.window.end for sequence in sequences]),
        "seeds": np.array([p.seed for p in params], dtype=np.int64),
        "guidance": floats([p.guidance_scale for p in params]),
        "guidance_beta": floats([1.0 if p.melody_guidance is None else p.melody_guidance for p in params]),
        "temperature": floats([0.0 if p.greedy else p.temperature for p in params]),
        "top_k": ints([min(p.top_k, codebook_size) for p in params]),  # kernels use int32
        "top_p": floats([p.top_p for p in params]),
    }
