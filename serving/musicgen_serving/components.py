"""The four components of a model as the pipeline calls them, wherever they run: the protocol, and a local version.

A failed call raises a `MusicGenError` if the caller is at fault, and `LostError` if the replica is: it died, stopped
responding, or failed internally. The call may then be retried on another replica. `ray_components.py` has the
implementation for replicas.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from musicgen.codec_stream import StreamPiece, StreamState
from musicgen.errors import EngineDeadError
from musicgen.types import EngineRequest
from musicgen_serving.deployments.chroma import ChromaExtractor, Recording
from musicgen_serving.deployments.codec import CodecDecoder
from musicgen_serving.deployments.language_model import LanguageModel, LanguageModelEvent, ModelCard
from musicgen_serving.deployments.text_encoder import TextEncoder


class LostError(Exception):
    """A replica died, stopped responding or failed; never visible to clients."""


class BrokenError(LostError):
    """A live replica failed internally, with this message; another may fail in the same way."""


class Components(Protocol):
    """The components of one model."""

    async def check(self) -> None:
        """Check that all components respond. Raises: LostError: one does not."""

    async def describe(self) -> ModelCard:
        """Raises: LostError."""

    async def encode_text(self, prompt: str) -> Tensor:
        """Raises: InvalidRequestError, LostError."""

    async def check_prompt(self, prompt: str) -> None:
        """Check whether `encode_text` would accept the prompt. Raises: InvalidRequestError, LostError."""

    async def check_stems(self) -> None:
        """Check whether stem separation is installed. Raises: NotOfferedError, LostError."""

    async def extract_chroma(self, recording: Recording) -> list[Tensor]:
        """Raises: InvalidRequestError, NotOfferedError, LostError."""

    async def encode_prompt(self, content: bytes, duration_s: float) -> Tensor:
        """Raises: InvalidRequestError, LostError."""

    async def initial_state(self) -> StreamState:
        """Raises: LostError."""

    async def decode(self, piece: StreamPiece, *, urgent: bool) -> tuple[Tensor, StreamState]:
        """As `CodecDecoder.decode`. Raises: InvalidRequestError, LostError."""

    def generate(self, request: EngineRequest) -> AbstractAsyncContextManager[AsyncIterator[LanguageModelEvent]]:
        """The events of one request to a language model. Exiting the context cancels it.

        Raises:
            InvalidRequestError, OverloadedError, LostError: from `anext`.
        """


@dataclass(frozen=True, slots=True, eq=False)
class LocalComponents:
    """A model's components in this process: for tests, and as a baseline for the cost of replicas."""

    language_model: LanguageModel
    codec: CodecDecoder
    text_encoder: TextEncoder
    chroma: ChromaExtractor

    async def check(self) -> None:
        try:
            self.language_model.check_health()
        except EngineDeadError as error:
            raise LostError(str(error)) from error

    async def describe(self) -> ModelCard:
        return await self.language_model.describe()

    async def encode_text(self, prompt: str) -> Tensor:
        return await self.text_encoder.encode(prompt)

    async def check_prompt(self, prompt: str) -> None:
        await self.text_encoder.check_prompt(prompt)

    async def check_stems(self) -> None:
        await self.chroma.check_stems()

    async def extract_chroma(self, recording: Recording) -> list[Tensor]:
        return await self.chroma.extract(recording)

    async def encode_prompt(self, content: bytes, duration_s: float) -> Tensor:
        return await self.codec.encode(content, duration_s)

    async def initial_state(self) -> StreamState:
        return await self.codec.initial_state()

    async def decode(self, piece: StreamPiece, *, urgent: bool) -> tuple[Tensor, StreamState]:
        return await self.codec.decode(piece, urgent=urgent)

    @asynccontextmanager
    async def generate(self, request: EngineRequest) -> AsyncIterator[AsyncIterator[LanguageModelEvent]]:
        async with aclosing(self._generate(request)) as events:
            yield events

    async def _generate(self, request: EngineRequest) -> AsyncGenerator[LanguageModelEvent, None]:
        try:
            async with aclosing(self.language_model.generate(request)) as events:
                async for event in events:
                    yield event
        except EngineDeadError as error:
            raise LostError(str(error)) from error
