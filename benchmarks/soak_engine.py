"""Soak test of one engine with random requests and cancellations: memory stays flat, counters balance, pages are freed.

    python -m benchmarks.soak_engine --minutes 10

Uses a small model with random weights and the real architecture, so that many thousands of requests complete. Prints
one line of JSON; the exit status is 0 if memory stayed flat and the counters balance.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from statistics import mean

import psutil
import torch

from musicgen.config import CacheConfig, CodecConfig, DecoderConfig, EngineConfig, ModelConfig, SchedulerConfig
from musicgen.engine.core import EngineCore
from musicgen.errors import OverloadedError
from musicgen.generation import plan_windows
from musicgen.models.language_model import LanguageModel
from musicgen.types import (
    ChunkPolicy,
    CodeChunk,
    CodesRequest,
    Conditioning,
    EndOfRequest,
    EngineRequest,
    SamplingParams,
)

MAX_GROWTH = 0.03
"""Maximum relative growth of mean resident memory from the first to the last third."""
WARM_UP_S = 15.0
NUM_PROMPTS = 20
WINDOW_FRAMES = (200, 120)
"""Maximum window and stride in frames; short, so that many pieces have several windows."""


def random_model(seed: int = 0) -> LanguageModel:
    """A text model with random weights, 128 wide."""
    torch.manual_seed(seed)
    decoder = DecoderConfig(
        num_layers=4, dim=128, num_heads=2, ffn_dim=512, num_codebooks=4, codebook_size=256, cross_attention=True
    )
    codec = CodecConfig(
        sample_rate=32000, num_codebooks=4, codebook_size=256, codebook_dim=32, hidden_size=32, num_filters=4,
        upsampling_ratios=(8, 5, 4, 4), num_residual_layers=1, num_lstm_layers=2, kernel_size=7, last_kernel_size=7,
        residual_kernel_size=3, dilation_growth_rate=2, compress=2, conv_shortcut=False, pad_mode="reflect",
    )  # fmt: skip
    config = ModelConfig("random", decoder, codec, text_dim=32, chroma=None, audio_channels=1, license="none")
    return LanguageModel(config).eval().requires_grad_(False)


class Soak:
    """Simulated callers that submit, receive, cancel, and forget to renew leases."""

    def __init__(self, core: EngineCore, seed: int) -> None:
        self.core, self.rng = core, random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        self.texts = [
            torch.randn(self.rng.randint(2, 30), core.model_config.text_dim, generator=generator)
            for _ in range(NUM_PROMPTS)
        ]
        self.next_frame: dict[str, int] = {}
        """Next expected frame of each live request."""
        self.num_added = self.num_refused = self.num_frames = self.num_ended = 0

    def step(self) -> None:
        """One engine step, with random actions of the callers."""
        if self.rng.random() < 0.2 and len(self.core.scheduler.waiting) < 40:
            self._add()
        if self.next_frame and self.rng.random() < 0.04:
            self.core.abort(self.rng.choice(list(self.next_frame)))
        for request_id in list(self.next_frame):
            if self.rng.random() < 0.02:
                self.core.renew(request_id)
        self._hear()

    def finish(self) -> None:
        while self.core.has_work:
            self._hear()

    def _hear(self) -> None:
        for event in self.core.step():
            if isinstance(event, CodeChunk):
                assert event.frame_offset == self.next_frame[event.request_id], "a gap"
                self.next_frame[event.request_id] += event.codes.shape[-1]
                self.num_frames += event.codes.shape[-1]
            else:
                assert isinstance(event, EndOfRequest)
                del self.next_frame[event.request_id]
                self.num_ended += 1

    def _add(self) -> None:
        rng = self.rng
        num_frames = rng.choice([25, 50, 100, 150, 320, 500])
        sampling = SamplingParams(seed=rng.randrange(1000), guidance_scale=rng.choice([1.0, 3.0]))
        text = Conditioning(rng.choice([None, *self.texts]), None)
        known = None
        if rng.random() < 0.2:
            known = torch.randint(self.core.model_config.decoder.codebook_size, (4, num_frames // 2))
        windows = plan_windows(num_frames, 0 if known is None else known.shape[-1], *WINDOW_FRAMES)
        request_id = str(self.num_added)
        request = EngineRequest(
            request_id,
            CodesRequest(tuple((window, text) for window in windows), sampling, known),
            tenant=rng.choice("abc"),
            priority=rng.choice([0, 0, 0, 1]),
            chunks=rng.choice([None, ChunkPolicy()]),
            lease_s=rng.choice([None, None, 1.0]),
        )
        self.num_added += 1
        try:
            self.core.add(request)
        except OverloadedError:
            self.num_refused += 1
        else:
            self.next_frame[request_id] = 0 if known is None else known.shape[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pages", type=int, default=400)
    args = parser.parse_args()
    page_bytes = 4 * 2 * 16 * 128 * 4  # layers, keys and values, positions, width, fp32
    cache, scheduler = CacheConfig(memory_bytes=args.pages * page_bytes), SchedulerConfig(max_rows=24)
    config = EngineConfig(cache, scheduler, "int8", num_threads=1)
    core = EngineCore(random_model(), config)
    soak, process = Soak(core, args.seed), psutil.Process()
    rss: list[int] = []
    began = time.monotonic()
    end, next_look = began + 60 * args.minutes, began + min(WARM_UP_S, 10 * args.minutes)
    num_steps = 0
    while (now := time.monotonic()) < end:
        soak.step()
        num_steps += 1
        if now >= next_look:
            core.check()
            gc.collect()
            rss.append(process.memory_info().rss)
            next_look += 1.0
    soak.finish()
    core.check()
    return report(core, soak, rss, num_steps, args.minutes)


def report(core: EngineCore, soak: Soak, rss: list[int], num_steps: int, minutes: float) -> int:
    stats = core.stats()
    third = max(1, len(rss) // 3)
    first, last = mean(rss[:third]), mean(rss[-third:])
    ended = stats.num_finished + stats.num_cancelled + stats.num_failed
    is_balanced = (
        stats.num_accepted == ended == soak.num_ended == soak.num_added - soak.num_refused
        and not soak.next_frame
        and stats.pages_held == stats.num_waiting == stats.num_running == stats.num_failed == 0
    )
    is_flat = last <= first * (1 + MAX_GROWTH)
    figures = {
        "minutes": minutes,
        "steps": num_steps,
        "frames": soak.num_frames,
        "accepted": stats.num_accepted,
        "finished": stats.num_finished,
        "cancelled": stats.num_cancelled,
        "failed": stats.num_failed,
        "refused": soak.num_refused,
        "pages_held_at_rest": stats.pages_held,
        "rss_mb_first_third": round(first / 1e6, 1),
        "rss_mb_last_third": round(last / 1e6, 1),
        "balanced": is_balanced,
        "flat": is_flat,
    }
    print(json.dumps(figures))
    return 0 if is_balanced and is_flat else 1


if __name__ == "__main__":
    sys.exit(main())
