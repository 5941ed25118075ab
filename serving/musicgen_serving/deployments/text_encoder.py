"""The text encoder.

Concurrent prompts are batched but computed one by one, so that the states of a prompt do not depend on its neighbours;
results are cached.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from musicgen.weights import open_checkpoint
from musicgen_serving.batching import Batcher
from musicgen_serving.deployments.self_check import SelfCheck
from musicgen_serving.settings import ModelSettings

MAX_BATCH = 32
CACHE_BYTES = 64 * 2**20
"""Cache size, for states of earlier prompts."""


class TextEncoder:
    """Raises: InvalidRequestError, WeightsError: the configured model cannot be loaded."""

    def __init__(self, settings: ModelSettings) -> None:
        device = settings.device_of(settings.text_encoder)
        self._encoder = open_checkpoint(settings.checkpoint, device).text_encoder()
        self._encode = Batcher(self._encode_all, MAX_BATCH)
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._cached_bytes = 0
        self._self_check = SelfCheck("text encoder", lambda: asyncio.to_thread(self._encoder.encode, "music"))

    async def warm_up(self) -> None:
        await self.encode("music")

    async def encode(self, prompt: str) -> Tensor:
        """The states `[L, text_dim]` of a prompt.

        Raises:
            InvalidRequestError: the prompt is too long.
        """
        with self._self_check.watching():
            return await self._encode(prompt)

    async def check_prompt(self, prompt: str) -> None:
        """Check whether `encode` would accept the prompt, without encoding it.

        Raises:
            InvalidRequestError: the prompt is too long.
        """
        await asyncio.to_thread(self._encoder.tokenize, prompt)

    def _encode_all(self, prompts: Sequence[str]) -> list[Tensor | Exception]:
        return [self._encode_one(prompt) for prompt in prompts]

    @torch.inference_mode()
    def _encode_one(self, prompt: str) -> Tensor | Exception:
        """Never runs concurrently: batches do not overlap."""
        if prompt in self._cache:
            self._cache.move_to_end(prompt)
            return self._cache[prompt]
        try:
            states = self._encoder.encode(prompt)
        except Exception as error:
            return error
        assert states is not None  # only None encodes to None
        result = states.cpu().clone()
        self._cache[prompt] = result
        self._cached_bytes += result.nbytes
        while self._cached_bytes > CACHE_BYTES:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return result

    async def num_calls(self) -> int:
        """Calls queued and in flight: the load."""
        return self._encode.num_calls

    async def check_health(self) -> None:
        """Raises: RuntimeError: persistent failure; the replica must be replaced."""
        await self._self_check.check()
