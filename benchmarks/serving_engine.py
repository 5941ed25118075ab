"""Baseline for the service: the same model in one process, without Ray, admission or connections.

Reads a plan as JSON lines (arrival times are ignored: all requests start at once) and the model's settings; prints one
line of JSON. `alone` is the engine by itself: texts are encoded beforehand and codes are not decoded. `with_codec` also
encodes the texts and decodes the codes in streaming chunks, concurrently with the engine: all the work of the service.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from musicgen_serving.deployments.codec import CodecDecoder
from musicgen_serving.deployments.language_model import LanguageModel
from musicgen_serving.deployments.text_encoder import TextEncoder
from musicgen_serving.settings import LimitSettings, ModelSettings
from torch import Tensor

from benchmarks.machine import load_average
from benchmarks.serving_plan import Ask, asks, to_lines
from musicgen.codec_stream import GridBuffer
from musicgen.types import (
    ChunkPolicy,
    CodeChunk,
    CodesRequest,
    Conditioning,
    EngineRequest,
    SamplingParams,
    Window,
)


@dataclass(frozen=True, slots=True)
class Bare:
    """Seconds of audio per second."""

    alone: float
    with_codec: float
    load_average: float


def measure(plan: Sequence[Ask], settings: dict[str, Any]) -> Bare:
    """Measure in a separate process.

    Args:
        settings: fields of `ModelSettings`.
    """
    command = [sys.executable, "-m", "benchmarks.serving_engine", json.dumps(settings)]
    done = subprocess.run(command, input=to_lines(plan), check=True, stdout=subprocess.PIPE, text=True)
    return Bare(**json.loads(done.stdout.splitlines()[-1]))


class _Parts:
    """A model's components in this process."""

    def __init__(self, settings: ModelSettings) -> None:
        torch.set_num_threads(1)  # as in the replicas; engine steps have their own threads
        self.engine = LanguageModel(settings)
        self.codec = CodecDecoder(settings, LimitSettings())
        self.text_encoder = TextEncoder(settings)
        self.config = self.engine.card.config

    async def codes(self, ask: Ask, text: Tensor) -> AsyncIterator[Tensor]:
        window = Window(0, self.config.num_frames(ask.duration_s))
        codes = CodesRequest(((window, Conditioning(text, None)),), SamplingParams(seed=ask.seed))
        request = EngineRequest(ask.request_id, codes, chunks=ChunkPolicy())
        async for event in self.engine.generate(request):
            if isinstance(event, CodeChunk):
                yield event.codes

    async def audio(self, ask: Ask) -> int:
        """Generate one piece; returns its number of samples."""
        text = await self.text_encoder.encode(ask.prompt)
        num_frames, num_samples = self.config.num_frames(ask.duration_s), 0
        state = await self.codec.initial_state()
        buffer = GridBuffer(self.config.decoder.num_codebooks, num_frames)
        async for new in self.codes(ask, text):
            buffer.add(new)
            if (piece := buffer.take(state)) is not None:
                samples, state = await self.codec.decode(piece, urgent=num_samples == 0)
                num_samples += samples.shape[-1]
        return num_samples

    async def num_frames(self, ask: Ask, text: Tensor) -> int:
        return sum([codes.shape[-1] async for codes in self.codes(ask, text)])


async def _measure(plan: list[Ask], settings: ModelSettings) -> Bare:
    parts = _Parts(settings)
    await parts.engine.warm_up()
    await parts.codec.warm_up()
    texts = {prompt: await parts.text_encoder.encode(prompt) for prompt in {ask.prompt for ask in plan}}
    began = time.perf_counter()
    frames = await asyncio.gather(*(parts.num_frames(ask, texts[ask.prompt]) for ask in plan))
    alone = sum(frames) / parts.config.frame_rate_hz / (time.perf_counter() - began)
    began = time.perf_counter()
    samples = await asyncio.gather(*(parts.audio(ask) for ask in plan))
    with_codec = sum(samples) / parts.config.sample_rate / (time.perf_counter() - began)
    await parts.engine.close()
    return Bare(alone, with_codec, load_average())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", help="model settings as JSON, like an entry of `models` in the service's settings")
    args = parser.parse_args()
    settings = ModelSettings(**json.loads(args.settings))
    print(json.dumps(asdict(asyncio.run(_measure(list(asks(sys.stdin)), settings)))))


if __name__ == "__main__":
    main()
