"""Runs a scheduled step on the device: assembles the batch, calls the kernels' step and the sampler.

Owns the KV cache memory, the text pages and the code buffer. The scheduler decides what is computed; the core
processes the results.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from musicgen_kernels import KVStore, SampleBatch, delayed_sample_step, prepare_sample_step
from musicgen_kernels.backend import fallbacks
from musicgen_kernels.cpu_step import CpuStep
from musicgen_kernels.step import DecoderWeights, StepBatch
from musicgen_kernels.whole_step import whole_step
from torch import Tensor

from musicgen.config import EngineConfig
from musicgen.delay import UNKNOWN_CODE
from musicgen.engine.batch import ScheduledBatch
from musicgen.engine.decode import DecodePath
from musicgen.engine.decode_buffers import DecodeBuffers, DecodeShape
from musicgen.engine.decode_steps import Call, DecodeSteps, graph_sizes, why_not
from musicgen.engine.host_memory import return_freed_memory
from musicgen.engine.kv_cache import num_pages_for
from musicgen.engine.memory import max_row_len, new_pages, num_pages
from musicgen.engine.packing import OnLayer, kind_of, pack_decoder
from musicgen.engine.sequence import Sequence
from musicgen.engine.step_inputs import decided_steps, is_decode, row_id, sampling_parameters, step_inputs
from musicgen.engine.text_pages import TextPages
from musicgen.engine.transfer import send
from musicgen.models.language_model import LanguageModel

logger = logging.getLogger(__name__)


class ModelRunner:
    """The decoder of one model with its KV cache.

    Args:
        lm: the language model; its matrices are packed here unless `weights` is given.
        weights: the packed weights, if they exist already.
        release: free the model's own layers during packing, for models that fit in memory only once.
        on_layer: receives the progress of packing.
    Raises:
        InvalidRequestError: the memory budget is below one page, or no kernel supports the weights.
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
        # torch's number of threads is per calling thread; steps run on another thread.
        self._num_threads = config.num_threads or torch.get_num_threads()
        self.max_row_len = max_row_len(lm.config)
        assert config.weights is not None
        self._step = whole_step(
            weights or pack_decoder(lm.decoder, config.weights, self.max_row_len, release=release, on_layer=on_layer)
        )
        self.weights = self._step.weights
        return_freed_memory()  # counts as free from here on
        self._warn_if_slow()
        self.num_pages = num_pages(lm.config, config, self.device)
        self.pages = new_pages(lm.config, config, self.num_pages, self.device)
        num_slots = config.scheduler.num_slots
        self.text_pages = TextPages(self._step, self.pages.k.dtype, num_slots) if self.weights.has_cross else None
        window_len = lm.config.delay_pattern.num_steps(lm.config.num_frames(lm.config.max_duration_s))
        codes = (num_slots + 1, lm.config.decoder.num_codebooks, window_len)  # the last slot is the spare one
        self._codes = torch.full(codes, UNKNOWN_CODE, dtype=torch.int32, device=self.device)
        self._delays = torch.tensor(lm.config.delay_pattern.delays, dtype=torch.int32, device=self.device)
        self._graph_sizes = self._sizes_of_graphs()
        self._decode_steps = self._new_decode_steps()
        if self.device.type == "cuda":
            self._decode_steps.capture_all()
        self._decode = DecodePath(self._decode_steps, self.text_pages, lm.config.decoder.codebook_size)

    def _warn_if_slow(self) -> None:
        """Without kernels everything still works, only many times slower, which looks like a slow machine."""
        if slow := fallbacks(str(self.device), self.model_config.decoder.head_dim):
            names = ", ".join(choice.operation for choice in slow)
            message = "no kernel for %s on %s, so the slow PyTorch reference is used: %s"
            logger.warning(message, names, self.device, slow[0].reason)

    # --- sequences ---

    def open(self, sequence: Sequence) -> None:
        """Prepare the codes and texts of an admitted sequence, or of its next window."""
        delayed = sequence.delayed_codes()
        if delayed.shape[-1] > self._codes.shape[-1]:
            longer = max(delayed.shape[-1], 2 * self._codes.shape[-1])  # rare: it invalidates the graphs
            grown = self._codes.new_full((*self._codes.shape[:2], longer), UNKNOWN_CODE)
            grown[..., : self._codes.shape[-1]] = self._codes
            self._codes = grown
        self._codes[sequence.slot, :, : delayed.shape[-1]] = delayed.to(self.device)
        if self.text_pages is not None:
            assert sequence.inputs.text is not None
            self.text_pages.open(sequence.slot, sequence.inputs.text)

    def close(self, slot: int) -> None:
        """Release the resources of the sequence in `slot`."""
        if self.text_pages is not None:
            self.text_pages.close(slot)

    def frames(self, slot: int, start: int, end: int) -> Tensor:
        """A copy of the codes `[K, end - start]` (int32, on the host) of complete frames."""
        pattern = self.model_config.delay_pattern
        return pattern.undo(self._codes[slot, :, start : pattern.num_steps(end)]).cpu()

    # --- one step ---

    def run(self, batch: ScheduledBatch) -> np.ndarray:
        """Compute a step; returns the codes `[D, K]` (int32) of the deciding sequences."""
        if batch.copies:
            self._copy_pages(batch.copies)
        if is_decode(batch):
            return self._decode.run(batch)
        return self._run_mixed(batch)

    @torch.inference_mode()
    def _run_mixed(self, batch: ScheduledBatch) -> np.ndarray:
        """Run a step that includes prefill; all inputs are assembled from scratch."""
        decoder, deciding = self.model_config.decoder, batch.deciding
        fields = step_inputs(batch, decoder.num_codebooks, num_pages_for(self.max_row_len))
        if self.text_pages is not None:
            rows = [row_id(chunk) for chunk in batch.chunks]
            fields |= {"cross_page_table": self.text_pages.table[rows], "cross_lens": self.text_pages.lens[rows]}
        sampling = {**sampling_parameters(deciding, decoder.codebook_size), "steps": decided_steps(batch)}
        tensors = send(fields | sampling, self.device)
        sample_batch = SampleBatch(**{name: tensors.pop(name) for name in sampling})
        step = StepBatch(**tensors, prefix=_prefix(batch))
        logits = self._step.run(step, self.pages, self._text_store(), num_threads=self._num_threads)
        if not deciding:
            return np.empty((0, decoder.num_codebooks), dtype=np.int32)
        return delayed_sample_step(logits, sample_batch, self._delays, self._codes).cpu().numpy()

    # --- decode steps ---

    def _sizes_of_graphs(self) -> list[int] | None:
        """Batch sizes of decode steps to capture as graphs; None: no graphs."""
        if not self.config.cuda_graphs:
            return None
        if reason := why_not(self.device, self.model_config.decoder.head_dim):
            logger.warning("running decode steps without CUDA graphs: %s", reason)
            return None
        return graph_sizes(min(self.config.scheduler.max_step_rows, self.config.scheduler.num_rows))

    def _new_decode_steps(self) -> DecodeSteps:
        decoder = self.model_config.decoder
        shape = DecodeShape(
            num_codebooks=decoder.num_codebooks,
            max_pages=num_pages_for(self.max_row_len),
            max_text_pages=None if self.text_pages is None else self.text_pages.table.shape[1],
            special_token=decoder.special_token,
            spare_page=self.num_pages,
            spare_slot=self._codes.shape[0] - 1,
        )
        return DecodeSteps(self._graph_sizes, shape, self.device, self._prepare_decode, self._decode_memory)

    def _decode_memory(self) -> tuple[object, ...]:
        """The objects whose addresses a prepared step holds, and which may be reallocated."""
        return self._codes, self._text_store()

    def _prepare_decode(self, buffers: DecodeBuffers) -> Call:
        """A decode step on these buffers; the CPU's single call is validated only now."""
        if not isinstance(self._step, CpuStep):
            return functools.partial(self._compute_decode, buffers)
        decoder = self.model_config.decoder
        logits = torch.empty(buffers.num_rows, decoder.num_codebooks, decoder.codebook_size)
        stores = (self.pages, self._text_store())
        step = self._step.prepare(buffers.step, *stores, out=logits, num_threads=self._num_threads)
        sample = self._sampler(logits, buffers)

        def call() -> None:
            step()
            sample()

        return call

    @torch.inference_mode()
    def _compute_decode(self, buffers: DecodeBuffers) -> None:
        logits = self._step.run(buffers.step, self.pages, self._text_store(), num_threads=self._num_threads)
        self._sampler(logits, buffers)()

    def _sampler(self, logits: Tensor, buffers: DecodeBuffers) -> Callable[[], object]:
        # The CPU's compiled sampler rejects requests without rows, which occur only in tests.
        backend = "reference" if self._graph_sizes is not None and self.device.type == "cpu" else None
        arguments = (logits, buffers.sampling, self._delays, self._codes)
        return prepare_sample_step(*arguments, out=buffers.out, backend=backend)

    # --- memory ---

    def _text_store(self) -> KVStore | None:
        return None if self.text_pages is None else self.text_pages.store

    @torch.inference_mode()
    def _copy_pages(self, copies: list[tuple[int, int]]) -> None:
        for tensor in (self.pages.k, self.pages.v, self.pages.k_scales, self.pages.v_scales):
            if tensor is not None:
                for source, target in copies:
                    tensor[:, target] = tensor[:, source]


def _prefix(batch: ScheduledBatch) -> Tensor | None:
    """`[P, dim]` embeddings of the prefix positions, in step order."""
    parts = []
    for chunk in batch.chunks:
        end = min(chunk.end, chunk.sequence.prefix_len)
        if chunk.start < end:
            assert chunk.sequence.inputs.prefix is not None
            parts.append(chunk.sequence.inputs.prefix[chunk.row.index, chunk.start : end])
    return torch.cat(parts).float().contiguous() if parts else None
