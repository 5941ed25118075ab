"""Runs one scheduled step on tensors: assemble the batch, one call of the kernels' step, one of the sampler.

Owns the pages' memory, the texts' pages and the buffer of codes. Decides nothing: what is computed comes from the
scheduler, what follows from it is the core's.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np
import torch
from musicgen_kernels import SampleBatch, delayed_sample_step
from musicgen_kernels.step import DecoderWeights, StepBatch
from musicgen_kernels.whole_step import whole_step
from torch import Tensor

from musicgen.config import EngineConfig
from musicgen.delay import UNKNOWN_CODE
from musicgen.engine.batch import MAX_GUIDANCE_ROWS, RowChunk, ScheduledBatch
from musicgen.engine.decode import DecodePath
from musicgen.engine.decode_buffers import DecodeBuffers, DecodeShape
from musicgen.engine.graphs import DecodeGraphs, why_not
from musicgen.engine.kv_cache import num_pages_for
from musicgen.engine.memory import max_row_len, new_pages, num_pages
from musicgen.engine.packing import OnLayer, kind_of, pack_decoder
from musicgen.engine.sequence import Sequence
from musicgen.engine.step_inputs import decided_steps, fed_codes, is_decode, row_id, sampling_parameters
from musicgen.engine.text_pages import TextPages
from musicgen.models.language_model import LanguageModel

logger = logging.getLogger(__name__)

_LayoutKey = tuple[tuple[tuple[int, int], ...], tuple[int, ...]]
"""The rows (by `id`) with their numbers of positions, and the deciding sequences."""


@dataclass(slots=True, eq=False)
class _Layout:
    """The parts of a step's tensors that stay as long as the same rows compute the same numbers of positions.

    They are kept because every look-up between two steps finds the caches full of weights.
    """

    key: _LayoutKey
    row_ids: Tensor
    """`[B]` rows of the page tables."""
    query_offsets: Tensor
    logit_tokens: Tensor
    page_table: Tensor
    """Gathered anew whenever a row gets a page."""
    cross_page_table: Tensor | None
    cross_lens: Tensor | None
    sampling: SampleBatch | None


class ModelRunner:
    """One model's decoder with its pages.

    Args:
        lm: the language model; its matrices are packed.
        weights: packed already.
        release: free the model's own layers meanwhile, for models that fit in memory only once.
        on_layer: progress of the packing.
    Raises:
        InvalidRequestError: a memory budget without room for a page, or weights without a kernel.
    """

    def __init__(
        self,
        lm: LanguageModel,
        config: EngineConfig,
        *,
        weights: DecoderWeights | None = None,
        release: bool = False,
        on_layer: OnLayer | None = None,
    ) -> None:
        self.model_config, self.device = lm.config, lm.device
        if weights is not None:
            config = replace(config, weights=kind_of(weights))
        self.config = config = config.resolved(self.device.type)
        # torch's own number belongs to the calling thread; steps run on another one.
        self._num_threads = config.num_threads or torch.get_num_threads()
        self.max_row_len = max_row_len(lm.config)
        assert config.weights is not None
        self._step = whole_step(
            weights or pack_decoder(lm.decoder, config.weights, self.max_row_len, release=release, on_layer=on_layer)
        )
        self.weights = self._step.weights
        self.num_pages = num_pages(lm.config, config, self.device)
        self.pages = new_pages(lm.config, config, self.num_pages, self.device)
        self.text_pages = TextPages(self._step, self.pages.k.dtype) if self.weights.has_cross else None
        num_slots = config.scheduler.max_requests
        window_len = lm.config.delay_pattern.num_steps(lm.config.num_frames(lm.config.max_duration_s))
        codes = (num_slots + 1, lm.config.decoder.num_codebooks, window_len)  # the last slot is nobody's
        self._codes = torch.full(codes, UNKNOWN_CODE, dtype=torch.int32, device=self.device)
        tables = (num_slots * MAX_GUIDANCE_ROWS, num_pages_for(self.max_row_len))
        self._page_tables = torch.zeros(tables, dtype=torch.int32)
        self._num_tabled = np.zeros(tables[0], dtype=np.int64)
        self._delays = torch.tensor(lm.config.delay_pattern.delays, dtype=torch.int32, device=self.device)
        self._layout: _Layout | None = None
        self._decode = self._decode_path() if config.cuda_graphs else None

    # --- sequences ---

    def open(self, sequence: Sequence) -> None:
        """Prepare an admitted sequence, or its next window: its buffer of codes, its texts."""
        delayed = sequence.delayed_codes()
        if delayed.shape[-1] > self._codes.shape[-1]:
            longer = max(delayed.shape[-1], 2 * self._codes.shape[-1])  # seldom: it costs the graphs
            grown = self._codes.new_full((*self._codes.shape[:2], longer), UNKNOWN_CODE)
            grown[..., : self._codes.shape[-1]] = self._codes
            self._codes = grown
        self._codes[sequence.slot, :, : delayed.shape[-1]] = delayed.to(self.device)
        first = sequence.slot * MAX_GUIDANCE_ROWS
        self._num_tabled[first : first + MAX_GUIDANCE_ROWS] = 0
        if self.text_pages is not None:
            assert sequence.inputs.text is not None
            self.text_pages.open(sequence.slot, sequence.inputs.text)
        self._forget()

    def close(self, slot: int) -> None:
        """The sequence of `slot` has ended."""
        if self.text_pages is not None:
            self.text_pages.close(slot)
        self._forget()

    def _forget(self) -> None:
        self._layout = None
        if self._decode is not None:
            self._decode.forget()

    def frames(self, slot: int, start: int, end: int) -> Tensor:
        """Codes `[K, end - start]` (int32, on the host, a copy) of complete frames."""
        pattern = self.model_config.delay_pattern
        return pattern.undo(self._codes[slot, :, start : pattern.num_steps(end)]).cpu()

    # --- one step ---

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch) -> np.ndarray:
        """Compute a step; returns the codes `[D, K]` (int32) that the deciding sequences have decided."""
        for source, target in batch.copies:
            self._copy_page(source, target)
        has_new_pages = sum(self._update_table(chunk) for chunk in batch.chunks) > 0  # of all of them
        if self._decode is not None and is_decode(batch):
            if has_new_pages:
                self._layout = None  # it would not hear of them
            return self._decode.run(batch, has_new_pages=has_new_pages)
        if has_new_pages and self._decode is not None:
            self._decode.forget()
        layout = self._layout_of(batch)
        if has_new_pages:
            layout.page_table = self._page_tables[layout.row_ids].to(self.device)
        step = self._step_batch(batch, layout)
        cross_pages = None if self.text_pages is None else self.text_pages.store
        logits = self._step.run(step, self.pages, cross_pages, num_threads=self._num_threads)
        if layout.sampling is None:
            return np.empty((0, self.model_config.decoder.num_codebooks), dtype=np.int32)
        layout.sampling.steps.copy_(self._ints(decided_steps(batch)))
        codes = self._sample(logits, layout.sampling)
        return codes.cpu().numpy()

    def _sample(self, logits: Tensor, batch: SampleBatch) -> Tensor:
        return delayed_sample_step(logits, batch, self._delays, self._codes)

    def _layout_of(self, batch: ScheduledBatch) -> _Layout:
        key = tuple((id(chunk.row), chunk.num_new) for chunk in batch.chunks), tuple(map(id, batch.deciding))
        if self._layout is None or self._layout.key != key:
            self._layout = self._new_layout(key, batch)
        return self._layout

    def _new_layout(self, key: _LayoutKey, batch: ScheduledBatch) -> _Layout:
        ends = np.cumsum([chunk.num_new for chunk in batch.chunks], dtype=np.int32)
        deciding = set(map(id, batch.deciding))
        is_last = [id(chunk.sequence) in deciding for chunk in batch.chunks]
        slots = torch.tensor([row_id(chunk) for chunk in batch.chunks])
        cross_lens = cross_page_table = None
        if self.text_pages is not None:
            cross_page_table = self.text_pages.table[slots].to(self.device)
            cross_lens = self._ints([self.text_pages.lens[row_id(chunk)] for chunk in batch.chunks])
        return _Layout(
            key=key,
            row_ids=slots,
            query_offsets=self._ints([0, *ends]),
            logit_tokens=self._ints([end - 1 for end, last in zip(ends, is_last, strict=True) if last]),
            page_table=self._page_tables[slots].to(self.device),
            cross_page_table=cross_page_table,
            cross_lens=cross_lens,
            sampling=self._sample_batch(batch.deciding) if batch.deciding else None,
        )

    def _step_batch(self, batch: ScheduledBatch, layout: _Layout) -> StepBatch:
        codes = np.zeros((batch.num_tokens, self.model_config.decoder.num_codebooks), dtype=np.int32)
        prefix_index: np.ndarray | None = None
        prefixes: list[Tensor] = []
        num_prefix = token = 0
        for chunk in batch.chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.num_new
            prefix_len = sequence.inputs.prefix_len
            if chunk.start >= sequence.prefill_len:
                codes[token] = fed_codes(sequence)
            else:
                if chunk.start < prefix_len:
                    assert sequence.inputs.prefix is not None
                    stop = min(end, prefix_len)
                    if prefix_index is None:
                        prefix_index = np.full(batch.num_tokens, -1, dtype=np.int32)
                    prefix_index[token : token + stop - chunk.start] = np.arange(
                        num_prefix, num_prefix + stop - chunk.start
                    )
                    num_prefix += stop - chunk.start
                    prefixes.append(sequence.inputs.prefix[chunk.row.index, chunk.start : stop])
                if end > prefix_len:
                    first = max(chunk.start, prefix_len)
                    known = sequence.prefill_codes()[:, first - prefix_len : end - prefix_len]
                    codes[token + first - chunk.start : token + chunk.num_new] = known.numpy().T
            token += chunk.num_new
        return StepBatch(
            codes=torch.from_numpy(codes).to(self.device),
            query_offsets=layout.query_offsets,
            kv_lens=self._ints([chunk.start + chunk.num_new for chunk in batch.chunks]),
            page_table=layout.page_table,
            logit_tokens=layout.logit_tokens,
            prefix=torch.cat(prefixes).float().contiguous() if prefixes else None,
            prefix_index=None if prefix_index is None else torch.from_numpy(prefix_index).to(self.device),
            cross_page_table=layout.cross_page_table,
            cross_lens=layout.cross_lens,
        )

    def _sample_batch(self, sequences: list[Sequence]) -> SampleBatch:
        """The parameters of the deciding sequences; `steps` is overwritten at each step."""
        parameters = sampling_parameters(sequences, self.model_config.decoder.codebook_size)
        return SampleBatch(**{name: torch.from_numpy(array).to(self.device) for name, array in parameters.items()})

    def _ints(self, values: object) -> Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.int32)).to(self.device)  # as_tensor takes ten times as long

    # --- memory ---

    def _update_table(self, chunk: RowChunk) -> bool:
        """Whether the row has got pages since it was last asked."""
        row, pages = row_id(chunk), chunk.row.pages
        done = self._num_tabled[row]
        if done == len(pages):
            return False
        self._page_tables[row, done : len(pages)] = torch.tensor(pages[done:], dtype=torch.int32)
        self._num_tabled[row] = len(pages)
        return True

    def _copy_page(self, source: int, target: int) -> None:
        for tensor in (self.pages.k, self.pages.v, self.pages.k_scales, self.pages.v_scales):
            if tensor is not None:
                tensor[:, target] = tensor[:, source]

    def _decode_path(self) -> DecodePath | None:
        """Decode steps through graphs; None where they cannot be captured."""
        if reason := why_not(self.device):
            logger.warning("decode steps run without CUDA graphs: %s", reason)
            return None
        decoder, scheduler = self.model_config.decoder, self.config.scheduler
        shape = DecodeShape(
            num_codebooks=decoder.num_codebooks,
            max_pages=self._page_tables.shape[1],
            max_text_pages=None if self.text_pages is None else self.text_pages.table.shape[1],
            special_token=decoder.special_token,
            spare_page=self.num_pages,
            spare_slot=self._codes.shape[0] - 1,
        )
        max_rows = min(scheduler.max_step_rows, scheduler.max_rows)
        graphs = DecodeGraphs(max_rows, shape, self.device, self._compute_decode, self._decode_memory)
        if self.device.type == "cuda":
            graphs.prepare()
        return DecodePath(graphs, self._page_tables.numpy(), self.text_pages, decoder.codebook_size)

    def _decode_memory(self) -> tuple[object, ...]:
        """What a captured step has the addresses of, and is sometimes allocated anew."""
        return self._codes, None if self.text_pages is None else self.text_pages.store

    def _compute_decode(self, buffers: DecodeBuffers) -> None:
        cross_pages = None if self.text_pages is None else self.text_pages.store
        logits = self._step.run(buffers.step, self.pages, cross_pages, num_threads=self._num_threads)
        # The CPU's compiled sampler refuses requests without rows; this runs there in tests only.
        backend = "reference" if self.device.type == "cpu" else None
        arguments = (logits, buffers.sampling, self._delays, self._codes)
        delayed_sample_step(*arguments, out=buffers.out, backend=backend)
