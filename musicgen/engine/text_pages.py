"""Pages of text keys and values, for models with cross-attention."""

from __future__ import annotations

import numpy as np
import torch
from musicgen_kernels import new_kv_store
from musicgen_kernels.cpu_step import CpuStep
from musicgen_kernels.whole_step import StepByOperations
from torch import Tensor

from musicgen.engine.batch import MAX_GUIDANCE_ROWS
from musicgen.engine.kv_cache import PageAllocator, num_pages_for
from musicgen.models.t5 import MAX_TEXT_TOKENS

PAGES_A_TEXT = 2
"""Initial pages per request, for texts of 32 tokens. Growing beyond that is rare, and invalidates all decode steps
prepared with the old addresses."""


class TextPages:
    """Cross-attention keys and values of the texts: written once, read at every step.

    Args:
        step: the decoder that computes them.
        dtype: of keys and values, as in the other pages.
        num_slots: maximum open requests. One row of each has a text.
    """

    def __init__(self, step: CpuStep | StepByOperations, dtype: torch.dtype, num_slots: int) -> None:
        self._step, weights = step, step.weights
        heads, head_dim = weights.num_heads, weights.dim // weights.num_heads
        device = weights.embeddings.device
        num_pages = PAGES_A_TEXT * num_slots
        self.store = new_kv_store(len(weights.blocks), num_pages, heads, head_dim, dtype, device=device)
        self._allocator = PageAllocator(num_pages)
        self._pages: dict[int, list[int]] = {}
        self.lens = np.zeros(num_slots * MAX_GUIDANCE_ROWS, dtype=np.int32)
        """Text lengths by row id; 0 for rows without text, whose cross-attention is zero."""
        self.table = np.zeros((len(self.lens), num_pages_for(MAX_TEXT_TOKENS)), dtype=np.int32)
        """`[row ids, max_pages]`"""

    def open(self, slot: int, text: Tensor) -> None:
        """Compute and store keys and values for the texts `[R, L, dim]` of a sequence's rows."""
        self.close(slot)
        first = slot * MAX_GUIDANCE_ROWS
        self._pages[slot] = []
        for row, states in enumerate(text):
            length = states.shape[0] if bool(states.any()) else 0
            self.lens[first + row] = length
            if length:
                self._write(slot, first + row, states)

    def close(self, slot: int) -> None:
        self._allocator.release(self._pages.pop(slot, []))

    def _write(self, slot: int, row_id: int, states: Tensor) -> None:
        num_pages = num_pages_for(states.shape[0])
        if self._allocator.num_available < num_pages:
            self._grow(max(2 * self._allocator.num_pages, self._allocator.num_pages + num_pages))
        pages = self._allocator.allocate(num_pages)
        self._pages[slot] += pages
        device = self.store.k.device
        self.table[row_id, :num_pages] = pages
        offsets = torch.tensor([0, states.shape[0]], dtype=torch.int32, device=device)
        states, table = states.float().contiguous(), torch.from_numpy(self.table[row_id : row_id + 1]).to(device)
        self._step.write_cross(states, table, offsets, offsets[1:], self.store)

    def _grow(self, num_pages: int) -> None:
        """Grow to `num_pages` pages in total, keeping page numbers."""
        old, num_old = self.store, self._allocator.num_pages
        layers, _, heads, _, head_dim = old.k.shape
        self.store = new_kv_store(layers, num_pages, heads, head_dim, old.k.dtype, device=old.k.device)
        for name in ("k", "v", "k_scales", "v_scales"):
            source = getattr(old, name)
            if source is not None:
                getattr(self.store, name)[:, :num_old] = source
        self._allocator.grow(num_pages)
