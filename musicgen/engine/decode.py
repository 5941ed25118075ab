"""Decode steps: which rows are in which place of the buffers, and what changes from step to step.

The runner's other path is for steps with a prefill in them, which have as many shapes as there are prompts.
"""

from __future__ import annotations

import numpy as np

from musicgen.engine.batch import ScheduledBatch
from musicgen.engine.decode_buffers import DecodeBuffers
from musicgen.engine.decode_steps import DecodeSteps
from musicgen.engine.sequence import Row
from musicgen.engine.step_inputs import row_id, sampling_parameters
from musicgen.engine.text_pages import TextPages


class DecodePath:
    """Runs decode steps.

    Args:
        text_pages: for models with cross-attention.
        codebook_size: real codes of a codebook.
    """

    def __init__(self, steps: DecodeSteps, text_pages: TextPages | None, codebook_size: int) -> None:
        self._steps, self._text_pages, self._codebook_size = steps, text_pages, codebook_size
        self._buffers: DecodeBuffers | None = None
        self._rows: list[Row] = []
        """Those in the buffers. A row belongs to one window of one sequence, and only gets pages."""
        self._num_pages: list[int] = []
        """Of each row, those that are in the buffers."""

    def run(self, batch: ScheduledBatch) -> np.ndarray:
        """Compute a step of nothing but decode rows; returns the codes `[D, K]` of the deciding sequences."""
        rows = [chunk.row for chunk in batch.chunks]
        buffers = self._steps.buffers(len(rows), len(batch.deciding))
        if rows != self._rows or buffers is not self._buffers:
            self._place(buffers, batch, rows)
        codes, kv_lens, steps = buffers.host["codes"], buffers.host["kv_lens"], buffers.host["steps"]
        for place, chunk in enumerate(batch.chunks):
            codes[place] = chunk.sequence.next_codes
            kv_lens[place] = chunk.start + 1
            num_pages = len(chunk.row.pages)
            if num_pages != self._num_pages[place]:  # whichever kind of step they came with
                buffers.host["page_table"][place, :num_pages] = chunk.row.pages
                self._num_pages[place] = num_pages
        for place, sequence in enumerate(batch.deciding):
            steps[place] = sequence.next_step
        return self._steps.run(buffers)[: len(batch.deciding)]

    def _place(self, buffers: DecodeBuffers, batch: ScheduledBatch, rows: list[Row]) -> None:
        """Write what stays as long as the same rows decode; the places behind them are nobody's."""
        host = buffers.host
        buffers.clear()
        if self._text_pages is not None:
            for place, chunk in enumerate(batch.chunks):
                host["cross_page_table"][place] = self._text_pages.table[row_id(chunk)]
                host["cross_lens"][place] = self._text_pages.lens[row_id(chunk)]
        for name, values in sampling_parameters(batch.deciding, self._codebook_size).items():
            host[name][: len(values)] = values
        host["row_offsets"][len(batch.deciding) :] = len(rows)  # the others have none
        self._buffers, self._rows, self._num_pages = buffers, rows, [0] * len(rows)
