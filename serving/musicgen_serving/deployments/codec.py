"""The codec: codes → samples for any stream, and recordings → codes.

Stateless: a stream's state travels with each call. Calls are served round-robin, one cell of the codec's grid at a
time. On a CPU each cell is decoded separately, so that streams are bit-identical regardless of load and replica; a GPU
batches waiting cells. Urgent calls have a dedicated thread and never wait for others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor

import torch
from torch import Tensor

from musicgen.audio import load_audio
from musicgen.codec_stream import StreamingCodec, StreamPiece, StreamState, grid_cells
from musicgen.inputs import checked_prompt
from musicgen.weights import open_checkpoint
from musicgen_serving.batching import Batcher
from musicgen_serving.deployments.self_check import SelfCheck
from musicgen_serving.recordings import naming
from musicgen_serving.settings import LimitSettings, ModelSettings

MAX_BATCH = 16
"""Maximum cells per GPU batch; larger batches would only increase latency."""


class CodecDecoder:
    """Decodes chunks of streams.

    Args:
        urgent_thread: executor for urgent calls; None: the event loop's default, as for all others.
    Raises:
        InvalidRequestError, WeightsError: the configured model cannot be loaded.
    """

    def __init__(self, settings: ModelSettings, limits: LimitSettings, urgent_thread: Executor | None = None) -> None:
        checkpoint = open_checkpoint(settings.checkpoint, settings.device_of(settings.codec))
        self._config, self._limits = checkpoint.config, limits
        decoder, self._encoder = checkpoint.codec()
        self._codec = StreamingCodec(decoder, self._config.audio_channels)
        max_batch = 1 if decoder.codebooks.device.type == "cpu" else MAX_BATCH
        self._decode = Batcher(self._decode_all, max_batch)
        self._decode_urgently = Batcher(self._decode_all, max_batch, urgent_thread)
        self._encode = Batcher(self._encode_all, max_batch=1)
        self._self_check = SelfCheck("codec", self._prove)

    async def warm_up(self) -> None:
        """Decode a few frames."""
        codes = torch.zeros(self._config.decoder.num_codebooks, 8, dtype=torch.int32)
        for urgent in (True, False):
            await self.decode(StreamPiece(codes, self._codec.initial_state(), last=True), urgent=urgent)

    async def _prove(self) -> None:
        """Decode and encode a few frames."""
        await self.warm_up()
        silence = torch.zeros(self._config.audio_channels, 4 * self._config.codec.hop_length)
        await asyncio.to_thread(self._encoder.encode, silence)

    async def initial_state(self) -> StreamState:
        """The state of a stream before its first codes; like every result, on the host: callers may have no GPU."""
        return _state_on_host(self._codec.initial_state())

    async def decode(self, piece: StreamPiece, *, urgent: bool = False) -> tuple[Tensor, StreamState]:
        """The next samples `[C, N]` of a stream, and its state after them.

        Args:
            urgent: the stream has not received its first audio.
        Raises:
            InvalidRequestError: the codes or state do not match the codec.
        """
        decode = self._decode_urgently if urgent else self._decode
        samples, state = [], piece.state
        with self._self_check.watching():
            for codes, last in grid_cells(piece):
                out, state = await decode(StreamPiece(codes, state, last))
                samples.append(out)
        return torch.cat(samples, dim=-1), state

    @torch.inference_mode()
    def _decode_all(self, cells: Sequence[StreamPiece]) -> Sequence[tuple[Tensor, StreamState] | Exception]:
        try:
            return [_on_host(*result) for result in self._codec.decode_batch(cells)]
        except Exception as error:  # find the offending cell by decoding each alone
            if len(cells) == 1:
                return [error]
        return [result for cell in cells for result in self._decode_all([cell])]

    async def encode(self, content: bytes, duration_s: float) -> Tensor:
        """An audio prompt → codes `[K, P]`.

        Args:
            content: content of an audio file.
            duration_s: duration of the piece that continues it.
        Raises:
            InvalidRequestError: unreadable or too long audio, or a prompt that fills the whole piece.
        """
        with self._self_check.watching():
            return await self._encode((content, duration_s))

    def _encode_all(self, recordings: Sequence[tuple[bytes, float]]) -> Sequence[Tensor | Exception]:
        results: list[Tensor | Exception] = []
        for content, duration_s in recordings:
            try:
                results.append(self._encode_one(content, duration_s))
            except Exception as error:
                results.append(error)
        return results

    def _encode_one(self, content: bytes, duration_s: float) -> Tensor:
        with naming("prompt_audio"):
            wav, sample_rate = load_audio(content, max_duration_s=self._limits.max_recording_s)
            prompt = checked_prompt(wav, sample_rate, self._config, duration_s)
        return self._encoder.encode(prompt).cpu()

    async def num_calls(self) -> int:
        """Decode calls in flight: the load."""
        return self._decode.num_calls + self._decode_urgently.num_calls

    async def check_health(self) -> None:
        """Raises: RuntimeError: persistent failure; the replica must be replaced."""
        await self._self_check.check()


def _on_host(samples: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
    """CPU copies that own their memory, ready to be pickled."""
    return samples.cpu().clone(), _state_on_host(state)


def _state_on_host(state: StreamState) -> StreamState:
    return StreamState(state.values.cpu().clone(), state.num_frames, state.num_samples, state.finished)
