"""Drives an engine step by step and records where each step's time goes.

Independent of model sizes and targets: the result is a list of steps with their times and the data they read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from musicgen_kernels import page_bytes
from musicgen_kernels.cpu_step import CpuStep
from musicgen_kernels.native import CpuModel
from musicgen_kernels.step import BlockWeights, DecoderWeights
from torch import Tensor

from benchmarks.meter import Meter
from musicgen.config import EngineConfig
from musicgen.engine.batch import ScheduledBatch
from musicgen.engine.core import EngineCore
from musicgen.engine.decode_buffers import DecodeBuffers
from musicgen.engine.runner import ModelRunner
from musicgen.models.language_model import LanguageModel
from musicgen.types import CodeChunk, EndOfRequest, EngineRequest, FinishReason

PROBE_EVERY_STEPS = 50


@dataclass(slots=True)
class Step:
    """One step of the engine."""

    seconds: float = 0.0
    """Total wall time, as seen by the caller."""
    native_s: float = 0.0
    """Time in the compiled step."""
    sampler_s: float = 0.0
    overhead_s: float = 0.0
    """CPU time of the engine's thread outside the two: scheduling, batch assembly, Python. Unlike wall time, it
    excludes time taken by other processes. Decode steps only: in a prefill it includes the sampler."""
    num_tokens: int = 0
    num_deciding: int = 0
    num_positions: int = 0
    """KV positions in use, summed over rows."""
    stream_bytes_s: float = 0.0
    """Read bandwidth at the last probe."""

    @property
    def is_decode(self) -> bool:
        """Whether it only decodes: each deciding request has one to three tokens."""
        return 0 < self.num_tokens <= 3 * self.num_deciding


class _Timed:
    """Wraps a callable and records the duration of the last call."""

    def __init__(self, call: Callable[..., object]) -> None:
        self._call = call
        self.seconds = self.cpu_s = 0.0

    def __call__(self, *args: object) -> None:
        began, cpu_began = time.perf_counter(), time.thread_time()
        self._call(*args)
        self.seconds, self.cpu_s = time.perf_counter() - began, time.thread_time() - cpu_began


class _TimedNative:
    """Wraps the compiled model."""

    def __init__(self, native: CpuModel) -> None:
        self.step, self.write_cross = _Timed(native.step), native.write_cross


class TimedRunner(ModelRunner):
    """A runner that records its last step and the times of the compiled part and the sampler.

    It records as little as possible during a step, because that time counts as the engine's.
    """

    def __init__(self, lm: LanguageModel, config: EngineConfig, weights: DecoderWeights) -> None:
        super().__init__(lm, config, weights=weights)
        assert isinstance(self._step, CpuStep), "only the CPU step can be measured"
        self._native = _TimedNative(self._step._native)
        self._step._native = self._native
        self._sampled = _Timed(lambda: None)
        self._batch = ScheduledBatch()

    def run(self, batch: ScheduledBatch) -> np.ndarray:
        self._batch = batch
        return super().run(batch)

    def _sampler(self, logits: Tensor, buffers: DecodeBuffers) -> Callable[[], object]:
        self._sampled = _Timed(super()._sampler(logits, buffers))
        return self._sampled

    def last(self, seconds: float, cpu_s: float) -> Step:
        """The step just computed, with the time that the engine took for it."""
        batch, native, sampled = self._batch, self._native.step, self._sampled
        return Step(
            seconds=seconds,
            native_s=native.seconds,
            sampler_s=sampled.seconds,
            overhead_s=cpu_s - native.cpu_s - sampled.cpu_s,
            num_tokens=batch.num_tokens,
            num_deciding=len(batch.deciding),
            num_positions=sum(chunk.end for chunk in batch.chunks),
        )


@dataclass(slots=True)
class Trace:
    """A run of the engine until it is idle."""

    steps: list[Step] = field(default_factory=list)
    num_frames: int = 0
    wall_s: float = 0.0
    """From the first arrival to the last frame, excluding probes."""
    first_chunk_s: dict[str, float] = field(default_factory=dict)
    """From a request's arrival to its first frames."""

    @property
    def decode_steps(self) -> list[Step]:
        return [step for step in self.steps if step.is_decode]

    @property
    def prefill_s(self) -> float:
        """Total time of steps that are not pure decode steps."""
        return sum(step.seconds for step in self.steps if not step.is_decode)


def drive(
    core: EngineCore, arrivals: Sequence[tuple[float, EngineRequest]], meter: Meter | None, max_steps: int | None = None
) -> Trace:
    """Add each request at its time (seconds from now, ascending) and step until all have ended.

    Args:
        meter: probed every `PROBE_EVERY_STEPS` steps, outside the timed spans.
        max_steps: cancel everything after this many steps.
    """
    trace, waiting = Trace(), list(arrivals)
    runner = core.runner
    assert isinstance(runner, TimedRunner)
    stream = meter.probe() if meter else 0.0
    began, left_out = time.perf_counter(), 0.0
    arrived: dict[str, float] = {}
    while waiting or core.has_work:
        now = time.perf_counter() - left_out
        while waiting and (now - began >= waiting[0][0] or not core.has_work):
            request = waiting.pop(0)[1]
            arrived[request.request_id] = now
            core.add(request)
        started, cpu_started = time.perf_counter(), time.thread_time()
        events = core.step()
        seconds, cpu_s = time.perf_counter() - started, time.thread_time() - cpu_started
        step = runner.last(seconds, cpu_s)
        step.stream_bytes_s = stream
        trace.steps.append(step)
        for event in events:
            if isinstance(event, CodeChunk):
                trace.num_frames += event.codes.shape[-1]
                delay = time.perf_counter() - left_out - arrived[event.request_id]
                trace.first_chunk_s.setdefault(event.request_id, delay)
            elif isinstance(event, EndOfRequest):
                assert event.reason is not FinishReason.FAILED, event.error
        trace.wall_s = time.perf_counter() - left_out - began
        if max_steps is not None and len(trace.steps) == max_steps:
            for request_id in arrived:
                core.abort(request_id)
            core.take_events()
        if meter and len(trace.steps) % PROBE_EVERY_STEPS == 0:
            paused = time.perf_counter()
            stream = meter.probe()
            left_out += time.perf_counter() - paused
    return trace


def weight_bytes(weights: DecoderWeights) -> int:
    """Bytes of packed matrices that every step reads: all but those for the text's KV, which is computed once."""
    return sum(_block_bytes(block) for block in weights.blocks) + weights.heads.data.nbytes


def _block_bytes(block: BlockWeights) -> int:
    matrices = [block.qkv, block.out, block.fc1, block.fc2]
    if block.cross is not None:
        matrices += [block.cross.q, block.cross.out]
    return sum(matrix.data.nbytes for matrix in matrices)


def position_bytes(core: EngineCore) -> float:
    """KV bytes per position and row, over all layers."""
    decoder = core.model_config.decoder
    dtype: torch.dtype = core.runner.pages.k.dtype
    return page_bytes(decoder.num_layers, decoder.num_heads, decoder.head_dim, dtype) / 16


def bound_s(core: EngineCore, step: Step) -> float:
    """Lower bound of a step's time: reading its weights and KV once at the bandwidth of the last probe."""
    num_bytes = weight_bytes(core.runner.weights) + step.num_positions * position_bytes(core)
    return num_bytes / step.stream_bytes_s
