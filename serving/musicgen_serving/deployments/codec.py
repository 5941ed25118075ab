"""The codec of one replica: codes to samples for any stream of any replica, and recordings to codes.

Holds no stream: its state travels with each call. On a CPU calls are decoded one after the other, each by itself on the
codec's grid, so that a stream sounds the same to the bit whatever else is decoded, and where. A GPU takes what waits
together. Streams that begin go first: their listeners hear nothing yet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import torch
from torch import Tensor

from musicgen.audio import load_audio
from musicgen.codec_stream import StreamingCodec, StreamPiece, StreamState, decode_all_on_grid
from musicgen.inputs import checked_prompt
from musicgen.weights import open_checkpoint
from musicgen_serving.batching import Batcher
from musicgen_serving.deployments.self_check import SelfCheck
from musicgen_serving.settings import LimitSettings, ModelSettings

MAX_BATCH = 16
"""Calls that a GPU takes together at most; more would only make each wait longer."""


class CodecDecoder:
    """Decodes chunks of streams.

    Raises:
        InvalidRequestError, WeightsError: the settings' model cannot be loaded.
    """

    def __init__(self, settings: ModelSettings, limits: LimitSettings) -> None:
        checkpoint = open_checkpoint(settings.checkpoint, settings.device)
        self._config, self._limits = checkpoint.config, limits
        decoder, self._encoder = checkpoint.codec()
        self._codec = StreamingCodec(decoder, self._config.audio_channels)
        on_cpu = decoder.codebooks.device.type == "cpu"
        self._decode = Batcher(self._decode_all, max_batch=1 if on_cpu else MAX_BATCH)
        self._encode = Batcher(self._encode_all, max_batch=1)
        self._self_check = SelfCheck("codec", self._prove)

    async def warm_up(self) -> None:
        """Decode a little silence."""
        codes = torch.zeros(self._config.decoder.num_codebooks, 8, dtype=torch.int32)
        await self.decode(StreamPiece(codes, self._codec.initial_state(), last=True))

    async def _prove(self) -> None:
        """Decode and encode a little silence."""
        await self.warm_up()
        silence = torch.zeros(self._config.audio_channels, 4 * self._config.codec.hop_length)
        await asyncio.to_thread(self._encoder.encode, silence)

    async def initial_state(self) -> StreamState:
        """The state of a stream before its first codes."""
        return self._codec.initial_state()

    async def decode(self, piece: StreamPiece) -> tuple[Tensor, StreamState]:
        """The next samples `[C, N]` of a stream, and its state after them.

        Raises:
            InvalidRequestError: codes or a state that do not fit the codec.
        """
        with self._self_check.watching():
            return await self._decode(piece, urgent=piece.state.num_frames == 0)

    @torch.inference_mode()
    def _decode_all(self, pieces: Sequence[StreamPiece]) -> Sequence[tuple[Tensor, StreamState] | Exception]:
        try:
            return [_on_host(*result) for result in decode_all_on_grid(self._codec, pieces)]
        except Exception as error:  # somebody's; whose, only each alone can tell
            if len(pieces) == 1:
                return [error]
        return [result for piece in pieces for result in self._decode_all([piece])]

    async def encode(self, content: bytes, duration_s: float) -> Tensor:
        """A recording to go on from → codes `[K, P]`.

        Args:
            content: of an audio file.
            duration_s: of the piece that begins with it.
        Raises:
            InvalidRequestError: not readable audio, too long, or nothing left to make.
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
        wav, sample_rate = load_audio(content, max_duration_s=self._limits.max_recording_s)
        return self._encoder.encode(checked_prompt(wav, sample_rate, self._config, duration_s)).cpu()

    async def num_calls(self) -> int:
        """Decode calls under way: the load."""
        return self._decode.num_calls

    async def check_health(self) -> None:
        """Raises: RuntimeError: it fails again and again; the replica must be replaced."""
        await self._self_check.check()


def _on_host(samples: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
    """Ordinary tensors of their own, as another process can take them."""
    values = state.values.cpu().clone()
    return samples.cpu().clone(), StreamState(values, state.num_frames, state.num_samples, state.finished)
