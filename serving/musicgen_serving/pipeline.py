"""Runs a request through the components of its model: text and melody → conditioning → codes → samples.

Keeps the codes received so far, so that any other language-model replica can resume after a failure; the codec's state
travels with each call, so any codec replica can decode the next chunk. Independent of transports, tenants and quotas.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor

from musicgen.codec_stream import GridBuffer, StreamState
from musicgen.config import ModelConfig
from musicgen.errors import InvalidRequestError
from musicgen.generation import plan_windows
from musicgen.types import ChunkPolicy, CodesRequest, Conditioning, EngineRequest, Window
from musicgen_serving import delay_points
from musicgen_serving.admission import Ticket
from musicgen_serving.code_stream import CodesEnd, CodesStarted, CodeStream
from musicgen_serving.components import Components
from musicgen_serving.concurrency import ahead, together
from musicgen_serving.delivered_audio import DeliveredAudio
from musicgen_serving.deployments.chroma import Recording
from musicgen_serving.failover import call_with_failover
from musicgen_serving.settings import FailoverSettings
from musicgen_serving.types import GenerationRequest, PieceAudio, PieceReport

WHOLE = ChunkPolicy(first_frames=150, max_frames=500, growth=1.5)
"""Chunking of non-streaming requests: few messages, and the codec still overlaps with the language model."""
MIN_DEADLINE_S = 1e-3
"""The engine does not accept an expired deadline; one this close is rejected as too short."""
RECORDING_ATTEMPTS = 2
"""Fewer attempts: a recording that crashes one replica is likely to crash the next one, too."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PieceStarted:
    """A language model has accepted the piece. Set by the pipeline."""

    piece: int
    quoted_start_s: float


PieceEvent = PieceStarted | PieceAudio | PieceReport


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A request with everything shared by its pieces. Set by `Pipeline.prepare`."""

    config: ModelConfig
    codes: tuple[CodesRequest, ...]
    """One per piece."""
    num_failovers: int

    @property
    def num_samples(self) -> int:
        """Samples per channel of each piece."""
        return self.codes[0].num_frames * self.config.codec.hop_length


class Pipeline:
    """Runs requests through one model."""

    def __init__(self, components: Components, settings: FailoverSettings) -> None:
        self.components, self._settings = components, settings
        self._initial_state: StreamState | None = None

    async def prepare(self, request: GenerationRequest, config: ModelConfig) -> Prepared:
        """Compute the conditioning of every piece; texts, melody and audio prompt concurrently.

        Requires that `check_fits` has passed.

        Raises:
            InvalidRequestError: an unreadable or unusable recording, or a prompt that is too long.
            NotOfferedError: stem separation is not installed.
            ReplicaLostError: a component of the model is unavailable.
        """
        lost = _Counter()
        texts = list({piece.prompt for piece in request.pieces})
        *states, known = await together(*(self._text(text, lost) for text in texts), self._known_codes(request, lost))
        by_text = dict(zip(texts, states, strict=True))
        windows = plan_windows(
            config.num_frames(request.duration_s),
            0 if known is None else known.shape[-1],
            config.num_frames(config.max_duration_s),
            config.num_frames(request.extend_stride_s),
        )
        chroma = await self._chroma(request, tuple(windows), lost)
        codes = tuple(
            CodesRequest(
                tuple((w, Conditioning(by_text[p.prompt], c)) for w, c in zip(windows, chroma, strict=True)),
                replace(request.sampling, seed=p.seed),
                known,
            )
            for p in request.pieces
        )
        return Prepared(config, codes, lost.count)

    async def run(
        self,
        prepared: Prepared,
        piece: int,
        request: GenerationRequest,
        ticket: Ticket,
        made: Callable[[int], None] = lambda _: None,
        ends_at: float | None = None,
    ) -> AsyncGenerator[PieceEvent, None]:
        """`PieceStarted`, the audio of one piece, then its `PieceReport`. Closing early cancels it.

        Args:
            made: called with the number of frames, including known ones, when codes arrive, before their audio.
            ends_at: the request's deadline in event-loop time; the language model gets the remaining time.
        Raises:
            OverloadedError: rejected by the engine; before the first event.
            ReplicaLostError: a component of the model is unavailable for too long.
        """
        codes = prepared.codes[piece]
        engine_request = EngineRequest(
            f"{request.request_id}/{piece}-{secrets.token_hex(4)}",  # a retry may start before the first one is gone
            codes,
            tenant=ticket.tenant,
            weight=ticket.weight,
            priority=ticket.priority,
            chunks=request.chunks or WHOLE,
            deadline_s=None if ends_at is None else max(ends_at - asyncio.get_running_loop().time(), MIN_DEADLINE_S),
            lease_s=self._settings.lease_s,
        )
        stream = CodeStream(self.components, engine_request, self._settings, made)
        buffer = GridBuffer(prepared.config.decoder.num_codebooks, codes.num_frames)
        if codes.known_codes is not None:
            buffer.add(codes.known_codes)
        delivered = DeliveredAudio(prepared.num_samples, request.first_sample)
        state, num_failovers = await self._first_state(request), 0
        urgent = request.chunks is not None  # until the first audio is delivered
        async with aclosing(ahead(stream.events())) as events:
            async for batch in events:
                if isinstance(batch[0], CodesStarted):
                    yield PieceStarted(piece, batch[0].quoted_start_s)
                for event in batch:
                    if isinstance(event, Tensor):
                        buffer.add(event)
                if (part := buffer.take(state)) is not None:
                    await delay_points.pause(delay_points.CODEC_LAST if part.last else delay_points.CODEC_CALL)
                    (samples, state), lost = await self._call_for(
                        request,
                        "codec",
                        lambda part=part, urgent=urgent: self.components.decode(part, urgent=urgent),  # type: ignore[misc]
                    )
                    num_failovers += lost
                    audio = delivered.take(piece, samples)
                    if audio is not None:
                        urgent = False
                        yield audio
                if isinstance(batch[-1], CodesEnd):
                    yield delivered.report(piece, batch[-1], num_failovers + prepared.num_failovers)

    async def _first_state(self, request: GenerationRequest) -> StreamState:
        """The codec's initial state; always the same, so it is fetched once."""
        if self._initial_state is None:
            found = await self._call_for(request, "codec", self.components.initial_state)
            self._initial_state = found[0]
        return self._initial_state

    async def _text(self, text: str | None, lost: _Counter) -> Tensor | None:
        if not text:  # empty means no text
            return None
        return await self._call_counted(lost, "text encoder", lambda: self.components.encode_text(text))

    async def _known_codes(self, request: GenerationRequest, lost: _Counter) -> Tensor | None:
        content = request.prompt_audio
        if content is None:
            return None
        return await self._call_counted(
            lost, "codec", lambda: self.components.encode_prompt(content, request.duration_s), RECORDING_ATTEMPTS
        )

    async def _chroma(
        self, request: GenerationRequest, windows: tuple[Window, ...], lost: _Counter
    ) -> Sequence[Tensor | None]:
        if request.melody is None:
            return [None] * len(windows)
        recording = Recording(request.melody, windows, request.stems)
        return await self._call_counted(
            lost, "chroma extractor", lambda: self.components.extract_chroma(recording), RECORDING_ATTEMPTS
        )

    async def _call_counted(
        self, lost: _Counter, what: str, call: Callable[[], Awaitable[T]], max_attempts: int | None = None
    ) -> T:
        result, num_lost = await call_with_failover(self._settings, what, call, max_attempts)
        lost.count += num_lost
        return result

    async def _call_for(self, request: GenerationRequest, what: str, call: Callable[[], Awaitable[T]]) -> tuple[T, int]:
        return await call_with_failover(self._settings, f"request {request.request_id}: {what}", call)


class _Counter:
    def __init__(self) -> None:
        self.count = 0


def check_fits(request: GenerationRequest, config: ModelConfig) -> None:
    """Reject requests that the model does not support, before any work.

    Raises:
        InvalidRequestError: names the argument.
    """
    if config.chroma is None:
        for name, value in (("melody", request.melody), ("melody_guidance", request.sampling.melody_guidance)):
            if value is not None:
                expected = f"no {name} for model {request.model!r}, which does not support melodies"
                raise InvalidRequestError(expected, "one", "use a melody model", param=name)
    if request.melody is None and request.stems:
        raise InvalidRequestError("a melody when stems is set", "none", param="stems")
    num_frames = config.num_frames(request.duration_s)
    if num_frames < 1:
        got = f"{request.duration_s!r} s"
        raise InvalidRequestError(f"at least one frame ({1 / config.frame_rate_hz:g} s)", got, param="duration_s")
    if config.num_frames(request.extend_stride_s) < 1 or request.extend_stride_s >= config.max_duration_s:
        expected = f"seconds in (0, {config.max_duration_s:g})"
        raise InvalidRequestError(expected, repr(request.extend_stride_s), param="extend_stride_s")
    num_samples = num_frames * config.codec.hop_length
    if not 0 <= request.first_sample < num_samples:
        raise InvalidRequestError(f"a sample in [0, {num_samples})", str(request.first_sample), param="first_sample")
