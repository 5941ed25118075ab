"""Decode steps through graphs: which rows are in which place of the buffers, and what changes from step to step.

The runner's other path, for steps in which every row feeds the codes of one step. Prefills, and steps that mix both,
have as many shapes as there are prompts; they stay with the runner.
"""

from __future__ import annotations

import numpy as np

from musicgen.engine.batch import ScheduledBatch
from musicgen.engine.decode_buffers import DecodeBuffers
from musicgen.engine.graphs import DecodeGraphs
from musicgen.engine.step_inputs import decided_steps, fed_codes, row_id, sampling_parameters
from musicgen.engine.text_pages import TextPages


class DecodePath:
    """Runs decode steps.

    Args:
        page_tables: `[row ids, max_pages]` of all rows, kept up to date by the runner.
        text_pages: for models with cross-attention.
        codebook_size: real codes of a codebook.
    """

    def __init__(
        self, graphs: DecodeGraphs, page_tables: np.ndarray, text_pages: TextPages | None, codebook_size: int
    ) -> None:
        self._graphs, self._page_tables, self._text_pages = graphs, page_tables, text_pages
        self._codebook_size = codebook_size
        self._rows: tuple[tuple[int, ...], DecodeBuffers] | None = None
        """The rows (by `id`), and the buffers that hold them."""
        self._row_ids = np.empty(0, dtype=np.int64)

    def forget(self) -> None:
        """A sequence has come, gone or gone on to its next window: whatever is in the buffers may be another's."""
        self._rows = None

    def run(self, batch: ScheduledBatch, *, has_new_pages: bool) -> np.ndarray:
        """Compute a step of nothing but decode rows; returns the codes `[D, K]` of the deciding sequences."""
        num_rows, num_deciding = len(batch.chunks), len(batch.deciding)
        buffers = self._graphs.buffers(num_rows)
        rows = tuple(id(chunk.row) for chunk in batch.chunks)
        if self._rows is None or self._rows[0] != rows or self._rows[1] is not buffers:
            self._place(buffers, batch)
            self._rows = rows, buffers
        elif has_new_pages:
            buffers.host["page_table"][:num_rows] = self._page_tables[self._row_ids]
        host = buffers.host
        host["codes"][:num_rows] = [fed_codes(chunk.sequence) for chunk in batch.chunks]
        host["kv_lens"][:num_rows] = [chunk.start + 1 for chunk in batch.chunks]
        host["steps"][:num_deciding] = decided_steps(batch)
        return self._graphs.run(buffers)[:num_deciding]

    def _place(self, buffers: DecodeBuffers, batch: ScheduledBatch) -> None:
        """Write what stays as long as the same rows decode; the places behind them are nobody's."""
        num_rows, num_deciding, host = len(batch.chunks), len(batch.deciding), buffers.host
        buffers.clear()
        self._row_ids = np.array([row_id(chunk) for chunk in batch.chunks])
        host["page_table"][:num_rows] = self._page_tables[self._row_ids]
        if self._text_pages is not None:
            host["cross_page_table"][:num_rows] = self._text_pages.table[self._row_ids].numpy()
            host["cross_lens"][:num_rows] = [self._text_pages.lens[i] for i in self._row_ids.tolist()]
        parameters = sampling_parameters(batch.deciding, self._codebook_size)
        for name, values in parameters.items():
            host[name][: len(values)] = values
        host["row_offsets"][num_deciding:] = num_rows  # the others have none
