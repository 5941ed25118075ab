"""The cases of `bench_engine`: what each runs, and the figures derived from it.

Every case runs in its own process, so that it starts with clean memory and caches. The caller computes ratios to
transformers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from musicgen_kernels import page_bytes

from benchmarks.engine_drive import TimedRunner, Trace, bound_s, drive, position_bytes, weight_bytes
from benchmarks.engine_models import codec_decoder, codes_request, language_model, packed_weights
from benchmarks.engine_peer import prefix_len
from benchmarks.machine import Machine
from benchmarks.meter import Meter, Reading, peak_memory_bytes, reset_peak_memory
from musicgen.codec_stream import StreamingCodec
from musicgen.config import CacheConfig, EngineConfig, KVDtype, SchedulerConfig, WeightDtype
from musicgen.engine.core import EngineCore
from musicgen.engine.kv_cache import num_pages_for
from musicgen.engine.memory import max_row_len
from musicgen.engine.packing import KINDS
from musicgen.types import ChunkPolicy, CodesRequest, EngineRequest

FIRST_FRAMES = 5
"""Frames complete after 8 decode steps; with a lookahead of 4 they yield the first audio."""
STAGGERED_S = (5, 30, 12, 20, 8, 25, 15, 10)
"""Durations of the eight requests, in order of arrival."""
STAGGER_S = 0.5
"""Seconds between arrivals."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value with its bound. Ratios above 1 are better than the bound or transformers."""

    case: str
    name: str
    value: float
    unit: str
    bound: float | None = None
    """In the same unit: the machine's limit, or the target limit of the value."""
    bound_ratio: float | None = None
    peer: float | None = None
    """transformers' value in the same unit."""
    peer_ratio: float | None = None
    target: str = ""
    reading: Reading | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """How long the cases run."""

    piece_s: float = 30.0
    num_repeats: int = 1
    num_threads: int = torch.get_num_threads()


@dataclass(frozen=True, slots=True)
class Case:
    """One engine (model, weights, KV cache) and the measurement to run on it."""

    name: str
    size: str
    weights: WeightDtype
    kv: KVDtype
    measure: Callable[[Case, Options], list[Figure]]
    num_requests: int = 1


def new_core(case: Case, options: Options, num_requests: int) -> EngineCore:
    """An engine with room for `num_requests` of the longest requests and a cached prefix."""
    lm = language_model(case.size)
    row_len = max_row_len(lm.config)
    decoder = lm.config.decoder
    size = page_bytes(decoder.num_layers, decoder.num_heads, decoder.head_dim, getattr(torch, case.kv))
    num_pages = (2 * num_requests + 1) * num_pages_for(row_len)
    config = EngineConfig(
        cache=CacheConfig(dtype=case.kv, memory_bytes=num_pages * size),
        scheduler=SchedulerConfig(max_requests=max(32, num_requests)),
        weights=case.weights,
        num_threads=options.num_threads,
    )
    weights = packed_weights(lm.config, KINDS[case.weights], row_len)
    return EngineCore(lm, config, runner=TimedRunner(lm, config, weights))


def piece(case: Case, options: Options) -> list[Figure]:
    """One stream from prefill to last frame; the median of several pieces, by fraction of the bound."""
    reset_peak_memory()
    core = new_core(case, options, 1)
    num_frames = int(50 * options.piece_s)
    _warm_up(core, case)
    figures: list[list[Figure]] = []
    for repeat in range(options.num_repeats):
        request = _stream(f"piece-{repeat}", codes_request(case.size, num_frames, repeat))
        with Meter(options.num_threads) as meter:
            trace = drive(core, [(0.0, request)], meter)
        figures.append(_piece_figures(case, core, trace, meter.reading()))
    middle = sorted(figures, key=lambda own: own[0].bound_ratio or 0.0)[len(figures) // 2]
    memory = Figure(case.name, "peak memory", peak_memory_bytes() / 1e9, "GB", (_held_bytes(core)) / 1e9)
    return [*middle, memory]


def _piece_figures(case: Case, core: EngineCore, trace: Trace, reading: Reading) -> list[Figure]:
    steps = trace.decode_steps
    seconds, least_s = sum(s.seconds for s in steps), sum(bound_s(core, s) for s in steps)
    rate, most = len(steps) / seconds, len(steps) / least_s
    middle_ms = 1e3 * statistics.median(s.seconds for s in steps)
    return [
        Figure(case.name, "decode, whole piece", rate, "steps/s", most, rate / most, target="≥ 0.60", reading=reading),
        Figure(case.name, "decode step, median", middle_ms, "ms", 1e3 * least_s / len(steps), reading=reading),
        Figure(case.name, "piece with prefill", trace.wall_s, "s", reading=reading),
    ]


def staggered(case: Case, options: Options) -> list[Figure]:
    """Eight staggered requests; useful frames over the time from first arrival to last frame."""
    core = new_core(case, options, len(STAGGERED_S))
    _warm_up(core, case)
    scale = options.piece_s / 30
    arrivals = [
        (
            i * STAGGER_S * scale,
            EngineRequest(f"{i}", codes_request(case.size, int(50 * s * scale), i), chunks=ChunkPolicy()),
        )
        for i, s in enumerate(STAGGERED_S)
    ]
    with Meter(options.num_threads) as meter:
        trace = drive(core, arrivals, meter)
    least_s = sum(bound_s(core, s) for s in trace.steps)
    rate, most = trace.num_frames / trace.wall_s, trace.num_frames / least_s
    reading = meter.reading()
    slowest = max(trace.first_chunk_s.values())
    return [
        Figure(case.name, "useful frames", rate, "frames/s", most, rate / most, target="", reading=reading),
        Figure(case.name, "first frames, slowest", slowest, "s", reading=reading),
    ]


def prefill(case: Case, options: Options) -> list[Figure]:
    """Prefill of a single request: with nothing cached, then with the null row's pages cached."""
    core, machine = new_core(case, options, 2), Machine(None, options.num_threads)
    peaks = []
    times: dict[str, list[float]] = {"cold": [], "null prefix resident": []}
    with Meter(options.num_threads) as meter:
        for repeat in range(2 * options.num_repeats):
            # A new text length has no cached null prefix; all lengths are nearly equal.
            for name, seed in (("cold", 2 * repeat), ("null prefix resident", 2 * repeat + 1)):
                codes = codes_request(case.size, 50, seed, text_len=16 + repeat)
                trace = drive(core, [(0.0, EngineRequest(f"{seed}", codes))], None, max_steps=4)
                times[name].append(trace.prefill_s)
                meter.probe()
                peaks.append(machine.peaks())
    num_rows = {"cold": 2, "null prefix resident": 1}
    in_floats = case.weights in ("float32", "bfloat16")
    peak = max(probe.fp32 if in_floats else probe.int8 for probe in peaks)
    figures = []
    for name, values in times.items():
        seconds = statistics.median(values)
        least_s = 2 * num_rows[name] * prefix_len(case.size) * _num_weights(core) / peak
        figures.append(
            Figure(case.name, f"prefill, {name}", seconds, "s", least_s, least_s / seconds, reading=meter.reading())
        )
    return figures


def first_audio(case: Case, options: Options) -> list[Figure]:
    """From a request to its first samples through the streaming codec, on an otherwise idle engine. Excludes the text
    encoder and chroma."""
    core, codec = new_core(case, options, 1), StreamingCodec(codec_decoder(), 1)
    _warm_up(core, case)
    prefills = {figure.name: figure for figure in prefill(case, options)} if prefix_len(case.size) else {}
    prefill_bound = prefills["prefill, cold"].bound or 0.0 if prefills else 0.0
    waits, bounds, codecs = [], [], []
    with Meter(options.num_threads) as meter:
        for repeat in range(3 * options.num_repeats):
            codes = codes_request(case.size, 100, repeat, text_len=24 + repeat)
            request = EngineRequest(f"{repeat}", codes, chunks=ChunkPolicy(first_frames=FIRST_FRAMES))
            trace = drive(core, [(0.0, request)], meter, max_steps=12)
            began = time.perf_counter()
            samples, _ = codec.decode(
                torch.zeros(4, FIRST_FRAMES, dtype=torch.int32), codec.initial_state(), last=False
            )
            codecs.append(time.perf_counter() - began)
            assert samples.shape[-1] > 0
            waits.append(trace.first_chunk_s[request.request_id] + codecs[-1])
            bounds.append(prefill_bound + 8 * statistics.median(bound_s(core, s) for s in trace.decode_steps))
    seconds, least_s = statistics.median(waits), statistics.median(bounds)
    reading = meter.reading()
    return [
        Figure(case.name, "first audio", seconds, "s", least_s, least_s / seconds, reading=reading),
        Figure(case.name, "of it the codec", statistics.median(codecs), "s", reading=reading),
    ]


def overhead(case: Case, options: Options) -> list[Figure]:
    """CPU time of scheduling and Python in a step with `num_requests` decoding."""
    core = new_core(case, options, case.num_requests)
    num_steps = 30 + case.num_requests
    arrivals = [(0.0, _stream(f"{i}", codes_request(case.size, 500, i))) for i in range(case.num_requests)]
    with Meter(options.num_threads) as meter:
        trace = drive(core, arrivals, meter, max_steps=num_steps)
    steps = [s for s in trace.decode_steps if s.num_deciding == case.num_requests]
    middle_s = statistics.median(s.seconds for s in steps)
    own_s = statistics.median(s.overhead_s for s in steps)
    sampler_s = statistics.median(s.sampler_s for s in steps)
    reading = meter.reading()
    return [
        Figure(
            *(case.name, "scheduler and Python", 1e3 * own_s, "ms", 50 * middle_s, 0.05 * middle_s / own_s),
            target="≤ 5 % of a step",
            reading=reading,
        ),
        Figure(case.name, "share of a step", 100 * own_s / middle_s, "%", 5.0, reading=reading),
        Figure(case.name, "sampler", 1e3 * sampler_s, "ms", reading=reading),
        Figure(case.name, "decode step, median", 1e3 * middle_s, "ms", reading=reading),
    ]


def _stream(request_id: str, codes: CodesRequest) -> EngineRequest:
    """A streaming request."""
    return EngineRequest(request_id, codes, chunks=ChunkPolicy())


def _warm_up(core: EngineCore, case: Case) -> None:
    """Touch weights and buffers; uses a unique text length, so that no cached prefix is left behind."""
    codes = codes_request(case.size, 50, 12345, text_len=5)
    drive(core, [(0.0, EngineRequest("warm-up", codes))], None, max_steps=4)


def _num_weights(core: EngineCore) -> int:
    """Multiply-adds per position: the layers' matrices."""
    total = 0
    for block in core.runner.weights.blocks:
        matrices = [block.qkv, block.out, block.fc1, block.fc2]
        total += sum(m.out_features * m.in_features for m in matrices)
    return total


def _held_bytes(core: EngineCore) -> float:
    """Minimum memory: weights and pages."""
    weights = weight_bytes(core.runner.weights) + core.runner.weights.embeddings.nbytes
    return weights + core.runner.num_pages * 16 * position_bytes(core)


CASES = {
    case.name: case
    for case in [
        *(
            Case(f"small-{KINDS[weights]}-{kv}", "small", weights, kv, piece)
            for weights in ("float32", "bfloat16", "int8", "int4")
            for kv in ("float16", "int8")
        ),
        Case("small-staggered", "small", "int4", "int8", staggered, 8),
        Case("small-first-audio", "small", "int4", "int8", first_audio),
        *(Case(f"small-overhead-{n}", "small", "int4", "int8", overhead, n) for n in (1, 8, 32)),
        Case("melody-int4-int8", "melody", "int4", "int8", piece),
        Case("melody-int8-int8", "melody", "int8", "int8", piece),
        Case("melody-prefill-fp32", "melody", "float32", "int8", prefill),
        Case("melody-prefill-int4", "melody", "int4", "int8", prefill),
        Case("melody-first-audio", "melody", "int4", "int8", first_audio),
    ]
}
