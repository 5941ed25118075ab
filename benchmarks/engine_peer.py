"""transformers' times for the same shapes: prefill, one decode step at several lengths, and `generate`.

No whole piece is run: step times are measured at three KV lengths and interpolated, and the overhead of `generate` over
the forward pass (sampling, bookkeeping) is measured on a short piece.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.engine_models import SIZES, TEXT_LEN, model_config, transformers_decoder
from benchmarks.meter import Meter, Reading

GENERATED_STEPS = 12


@dataclass(frozen=True, slots=True)
class PeerTimes:
    """Seconds of transformers in fp32, with guidance."""

    num_requests: int
    prefill_s: float
    """The better of two."""
    lengths: tuple[int, ...]
    """Positions per row at which a step was measured."""
    forward_s: tuple[float, ...]
    """Median of a decode step's forward pass at each length."""
    sampling_s: float
    """Time of a `generate` step beyond its forward pass."""
    reading: Reading

    def step_s(self, length: float) -> float:
        """A decode step of `generate` at `length` positions per row, by linear inter- and extrapolation."""
        slope, start = np.polyfit(self.lengths, self.forward_s, 1)
        return float(start + slope * length) + self.sampling_s

    def piece_s(self, num_frames: int, prefix_len: int) -> float:
        """Prefill and all decode steps of pieces of `num_frames` frames. The prefill includes the first step."""
        num_steps = num_frames + 3  # 4 codebooks, one step of delay each
        decode_s = sum(self.step_s(prefix_len + step) for step in range(1, num_steps))
        return self.prefill_s + decode_s


def prefix_len(size: str) -> int:
    chroma = model_config(size).chroma
    return 0 if chroma is None else chroma.num_frames + TEXT_LEN


@torch.inference_mode()
def measure(size: str, num_requests: int, *, num_repeats: int = 5, num_frames: int = 1500) -> PeerTimes:
    """Time transformers' decoder for `num_requests` requests of equal length, plus their guidance rows."""
    model = transformers_decoder(size)
    with Meter() as meter:
        first_s, cache = _prefill(model, size, num_requests)
        prefill_s = min(first_s, _prefill(model, size, num_requests)[0])
        meter.probe()
        first = prefix_len(size) + GENERATED_STEPS // 2
        lengths = (first, prefix_len(size) + num_frames // 2, prefix_len(size) + num_frames)
        times = []
        for length in lengths:
            times.append(_forward(model, size, num_requests, cache, length, num_repeats))
            meter.probe()
        sampling_s = max(0.0, _generate(model, size, num_requests) - times[0])
    return PeerTimes(num_requests, prefill_s, lengths, tuple(times), sampling_s, meter.reading())


def _inputs(size: str, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of the first step `[rows · 4, 1]`, and the text or prefix `[rows, L, dim]`."""
    states = torch.randn(num_rows, prefix_len(size) or TEXT_LEN, SIZES[size][1])
    return torch.full((num_rows * 4, 1), 2048), states


def _prefill(model: Any, size: str, num_requests: int) -> tuple[float, Any]:
    """Seconds of the first forward pass, and its KV cache."""
    ids, states = _inputs(size, 2 * num_requests)
    began = time.perf_counter()
    cache = model(input_ids=ids, encoder_hidden_states=states, use_cache=True).past_key_values
    return time.perf_counter() - began, cache


def _forward(model: Any, size: str, num_requests: int, cache: Any, length: int, num_repeats: int) -> float:
    """Median seconds of a decode step's forward pass with `length` positions in `cache` (mutated: filled up)."""
    own = getattr(cache, "self_attention_cache", cache)
    for layer in own.layers:
        missing = length - layer.keys.shape[2]
        more = torch.randn(*layer.keys.shape[:2], missing, layer.keys.shape[3])
        layer.keys, layer.values = torch.cat([layer.keys, more], 2), torch.cat([layer.values, more], 2)
    ids, states = _inputs(size, 2 * num_requests)
    text = {} if size == "melody" else {"encoder_hidden_states": states}
    times = []
    for _ in range(num_repeats + 1):
        began = time.perf_counter()
        model(input_ids=ids, past_key_values=cache, use_cache=True, **text)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _generate(model: Any, size: str, num_requests: int) -> float:
    """Median seconds between two steps of `generate`, which samples top-k 250 with guidance 3."""
    marks: list[float] = []
    forward = model.forward

    def marked(*args: Any, **kwargs: Any) -> Any:
        marks.append(time.perf_counter())
        return forward(*args, **kwargs)

    rows = num_requests if size == "melody" else 2 * num_requests  # the melody model doubles them itself
    ids, _ = _inputs(size, num_requests)
    _, states = _inputs(size, rows)
    model.forward = marked
    for token in ("pad_token_id", "bos_token_id", "decoder_start_token_id"):
        setattr(model.generation_config, token, 2048)
    try:
        model.generate(
            ids,
            encoder_hidden_states=states,
            attention_mask=torch.ones(num_requests, 1),
            do_sample=True,
            top_k=250,
            guidance_scale=3.0,
            max_length=1 + GENERATED_STEPS,
            num_return_sequences=1,
        )
    finally:
        model.forward = forward
    return statistics.median(_gaps(marks)[1:])


def _gaps(marks: Sequence[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(marks)]
