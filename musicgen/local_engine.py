"""An in-process engine, started on first use and shared by all threads of the caller.

Serves the API: a batch of requests to codes, with progress, or one request as a stream of frames.
"""

from __future__ import annotations

import itertools
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from musicgen.config import EngineConfig, WeightDtype
from musicgen.engine.core import EngineCore
from musicgen.engine.packing import OnLayer, kind_of
from musicgen.engine.runner import ModelRunner
from musicgen.engine.thread import EngineStream, EngineThread
from musicgen.errors import EngineDeadError, InternalError, RequestCancelledError
from musicgen.model import Model
from musicgen.types import ChunkPolicy, CodeChunk, CodesRequest, EndOfRequest, EngineEvent, EngineRequest, FinishReason

EVERY_FRAME = ChunkPolicy(first_frames=1, max_frames=1)

OnFrame = Callable[[int], None]
"""Called with the number of frames generated since the last call, over all pieces."""


class LocalEngine:
    """Runs requests of one model.

    Args:
        release: free the model's own layers when the engine starts.
    """

    def __init__(self, model: Model, config: EngineConfig, *, release: bool = False) -> None:
        self._model, self._config, self._release = model, config, release
        self._lock = threading.Lock()
        self._thread: EngineThread | None = None
        self._ids = itertools.count()

    @property
    def weights(self) -> WeightDtype:
        """The weight type that the engine runs with."""
        packed, config = self._model.packed, self._config.resolved(self._model.lm.device.type)
        assert config.weights is not None
        return config.weights if packed is None else kind_of(packed)

    def generate(self, requests: Sequence[CodesRequest], on_frame: OnFrame | None = None) -> list[Tensor]:
        """The codes `[K, T]` of each request, including known ones.

        Raises:
            InvalidRequestError, OverloadedError, EngineDeadError: see `EngineCore.add`; the whole batch is cancelled.
            InternalError: a request of the batch cannot be computed; the others are cancelled.
        """
        events: queue.SimpleQueue[EngineEvent] = queue.SimpleQueue()
        chunks = EVERY_FRAME if on_frame else None
        with ExitStack() as stack:
            streams = [stack.enter_context(self._submit(request, chunks, events)) for request in requests]
            made: dict[str, list[Tensor]] = {
                stream.request_id: _known(request) for stream, request in zip(streams, requests, strict=True)
            }
            num_running = len(streams)
            while num_running:
                event = events.get()
                if isinstance(event, EndOfRequest):
                    self._check_end(event)
                    num_running -= 1
                    continue
                made[event.request_id].append(event.codes)
                if on_frame is not None:
                    on_frame(event.codes.shape[-1])
        return [torch.cat(pieces, dim=-1) for pieces in made.values()]

    def stream(self, request: CodesRequest, chunks: ChunkPolicy) -> Iterator[Tensor]:
        """Yield the codes `[K, n]` of one request as they are generated, known ones first."""
        yield from _known(request)
        with self._submit(request, chunks) as stream:
            for event in stream:
                if isinstance(event, CodeChunk):
                    yield event.codes
                else:
                    self._check_end(event)

    def close(self) -> None:
        """Stop the engine and cancel requests in progress."""
        with self._lock:
            if self._thread is not None:
                self._thread.close()

    def _submit(
        self,
        request: CodesRequest,
        chunks: ChunkPolicy | None,
        sink: queue.SimpleQueue[EngineEvent] | None = None,
    ) -> EngineStream:
        request_id = f"local-{next(self._ids)}"
        return EngineStream(self._started(), EngineRequest(request_id, request, chunks=chunks), sink)

    def start(self, on_layer: OnLayer | None = None) -> None:
        """Start now rather than with the first request; `on_layer` receives the progress of packing the weights."""
        self._started(on_layer)

    def _started(self, on_layer: OnLayer | None = None) -> EngineThread:
        with self._lock:
            if self._thread is None:
                lm, packed = self._model.lm, self._model.packed
                runner = ModelRunner(lm, self._config, weights=packed, release=self._release, on_layer=on_layer)
                self._thread = EngineThread(EngineCore(lm, self._config, runner=runner))
                weakref.finalize(self, self._thread.close)
            return self._thread

    def _check_end(self, end: EndOfRequest) -> None:
        if end.reason is FinishReason.FAILED:
            is_dead = self._started().failure is not None
            raise (EngineDeadError if is_dead else InternalError)(f"request {end.request_id}: {end.error}")
        if end.reason is FinishReason.CANCELLED:
            raise RequestCancelledError(
                f"request {end.request_id} was cancelled: {end.error or 'the engine was closed'}"
            )


def _known(request: CodesRequest) -> list[Tensor]:
    return [] if request.known_codes is None else [request.known_codes.to("cpu", torch.int32)]
