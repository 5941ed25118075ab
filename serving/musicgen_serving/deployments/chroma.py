"""Melody features: the bytes of a recording → the chroma for each window of a piece.

Concurrent requests are batched; results are cached by the recording's hash.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from musicgen.audio import load_audio
from musicgen.conditioning import Melody, window_chroma
from musicgen.errors import InvalidRequestError, MissingDependencyError
from musicgen.stems import MelodyStems, check_installed
from musicgen.types import Window
from musicgen.weights import open_checkpoint
from musicgen_serving.batching import Batcher
from musicgen_serving.deployments.self_check import SelfCheck
from musicgen_serving.errors import NotOfferedError
from musicgen_serving.recordings import naming
from musicgen_serving.settings import LimitSettings, ModelSettings

MAX_BATCH = 8
CACHE_ENTRIES = 256
"""Number of cached chroma results, about 100 kB each."""


@dataclass(frozen=True, slots=True)
class Recording:
    """A melody as supplied by the caller. Set by the pipeline."""

    content: bytes
    """Content of an audio file."""
    windows: tuple[Window, ...]
    stems: bool
    """Remove drums and bass first."""

    @property
    def key(self) -> str:
        return f"{hashlib.sha256(self.content).hexdigest()} {self.windows} {self.stems}"


class ChromaExtractor:
    """Raises: InvalidRequestError, WeightsError: the configured model cannot be loaded."""

    def __init__(self, settings: ModelSettings, limits: LimitSettings) -> None:
        checkpoint = open_checkpoint(settings.checkpoint, "cpu")  # computes on CPUs only
        self._config, self._extractor, self._limits = checkpoint.config, checkpoint.chroma(), limits
        self._stems = MelodyStems(self._config.sample_rate)
        self._extract = Batcher(self._extract_all, MAX_BATCH)
        self._cache: OrderedDict[str, list[Tensor]] = OrderedDict()
        self._self_check = SelfCheck("chroma extractor", self.warm_up)

    async def warm_up(self) -> None:
        """Run once: the first Fourier transform is slow."""
        if self._extractor is not None:
            await asyncio.to_thread(
                self._extractor, [(torch.zeros(self._config.sample_rate), self._config.sample_rate)]
            )

    async def extract(self, recording: Recording) -> list[Tensor]:
        """The chroma `[num_frames, num_chroma]` of each window.

        Raises:
            InvalidRequestError: unreadable or too long audio, or the model does not support melodies.
            NotOfferedError: stems were requested, but stem separation is not installed.
        """
        with self._self_check.watching():
            return await self._extract(recording)

    async def check_stems(self) -> None:
        """Raises: NotOfferedError: stem separation is not installed."""
        _check_stems()

    def _extract_all(self, recordings: Sequence[Recording]) -> list[list[Tensor] | Exception]:
        """Never runs concurrently: batches do not overlap."""
        results: list[list[Tensor] | Exception] = []
        for recording in recordings:
            try:
                results.append(self._extract_one(recording))
            except Exception as error:
                results.append(error)
        return results

    def _extract_one(self, recording: Recording) -> list[Tensor]:
        if self._extractor is None:
            hint = "use a melody model"
            raise InvalidRequestError(f"no melody for model {self._config.name!r}", "a melody", hint, param="melody")
        key = recording.key
        if key not in self._cache:
            with naming("melody"):
                wav, sample_rate = load_audio(recording.content, max_duration_s=self._limits.max_recording_s)
            if recording.stems:
                _check_stems()
                wav, sample_rate = self._stems(wav, sample_rate), self._stems.sample_rate
            melody = Melody(wav, sample_rate)
            self._cache[key] = window_chroma(self._extractor, melody, recording.windows, self._config)
            while len(self._cache) > CACHE_ENTRIES:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]

    async def num_calls(self) -> int:
        """Calls queued and in flight: the load."""
        return self._extract.num_calls

    async def check_health(self) -> None:
        """Raises: RuntimeError: persistent failure; the replica must be replaced."""
        await self._self_check.check()


def _check_stems() -> None:
    """The library's error tells how to install it, which is not for remote callers."""
    try:
        check_installed()
    except MissingDependencyError as error:
        message = "stems: this service does not offer stem separation; omit stems"
        raise NotOfferedError(message, param="stems") from error
