"""Decode-only steps: maps rows to buffer positions and updates what changes between steps.

Steps with prefill take the runner's other path, because their shapes vary with the prompts.
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
        codebook_size: codes per codebook, without the special token.
    """

    def __init__(self, steps: DecodeSteps, text_pages: TextPages | None, codebook_size: int) -> None:
        self._steps, self._text_pages, self._codebook_size = steps, text_pages, codebook_size
        self._buffers: DecodeBuffers | None = None
        self._rows: list[Row] = []
        """Rows in the buffers. A row belongs to one window of one sequence, and its pages only grow."""
        self._num_pages: list[int] = []
        """Pages of each row that are in the buffers."""

    def run(self, batch: ScheduledBatch) -> np.ndarray:
        """Compute a decode-only step; returns the codes `[D, K]` of the deciding sequences."""
        rows = [chunk.row for chunk in batch.chunks]
        buffers = self._steps.buffers(len(rows), len(batch.deciding))
        if rows != self._rows or buffers is not self._buffers:
            self._place(buffers, batch, rows)
        codes, kv_lens, steps = buffers.host["codes"], buffers.host["kv_lens"], buffers.host["steps"]
        for place, chunk in enumerate(batch.chunks):
            codes[place] = chunk.sequence.next_codes
            kv_lens[place] = chunk.start + 1
            num_pages = len(chunk.row.pages)
            if num_pages != self._num_pages[place]:  # whether a decode or a prefill step added them
                buffers.host["page_table"][place, :num_pages] = chunk.row.pages
                self._num_pages[place] = num_pages
        for place, sequence in enumerate(batch.deciding):
            steps[place] = sequence.next_step
        return self._steps.run(buffers)[: len(batch.deciding)]

    def _place(self, buffers: DecodeBuffers, batch: ScheduledBatch, rows: list[Row]) -> None:
        """Write the inputs that stay constant while the same rows decode; positions behind them are padding."""
        host = buffers.host
        buffers.clear()
        if self._text_pages is not None:
            for place, chunk in enumerate(batch.chunks):
                host["cross_page_table"][place] = self._text_pages.table[row_id(chunk)]
                host["cross_lens"][place] = self._text_pages.lens[row_id(chunk)]
        for name, values in sampling_parameters(batch.deciding, self._codebook_size).items():
            host[name][: len(values)] = values
        host["row_offsets"][len(batch.deciding) :] = len(rows)  # padding requests have no rows
        self._buffers, self._rows, self._num_pages = buffers, rows, [0] * len(rows)
