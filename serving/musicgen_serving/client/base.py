"""The transport-independent client: whole pieces, resumable streams, retries, checksums.

Decides what to retry and from which sample; `http.py` and `grpc.py` implement the requests.
"""

from __future__ import annotations

import hashlib
import logging
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from musicgen.errors import MusicGenError, RetryLaterError
from musicgen_serving.client.types import (
    BrokenAnswerError,
    Chunk,
    ConnectionLostError,
    Event,
    Generated,
    MusicRequest,
    Report,
    Retries,
    Start,
    to_bytes,
)
from musicgen_serving.errors import ConflictError
from musicgen_serving.types import GenerationStatus, ModelInfo

Self = TypeVar("Self", bound="Client")
_log = logging.getLogger(__name__)


class Client(ABC):
    """A connection to the service; thread-safe. Use it as a context manager, or call `close`."""

    def __init__(self, retries: Retries | None = None) -> None:
        self._retries = retries or Retries()

    def generate(self, prompt: str | None = None, **options: Any) -> Generated:
        """Generate one piece and wait until it is complete.

        Args:
            prompt, options: the fields of `MusicRequest`.
        Raises:
            MusicGenError: the service's error, such as InvalidRequestError or QuotaExceededError.
            ConnectionLostError: no response after all attempts.
            BrokenAnswerError: an invalid response.
        """
        request = MusicRequest(prompt, **options)
        attempts = _Attempts(self._retries)
        while True:
            try:
                generated = self._whole(attempts.named(request))
            except MusicGenError as error:
                attempts.failed(error)
            else:
                _check_sum(generated.report, hashlib.sha256(to_bytes(generated.samples)).hexdigest())
                return generated

    def stream(self, prompt: str | None = None, **options: Any) -> Stream:
        """Generate one piece and receive it while it is generated. Arguments and errors are those of `generate`."""
        return Stream(self, MusicRequest(prompt, **options))

    def events(self, request: MusicRequest) -> Generator[Event, None, None]:
        """`Start`, `Chunk`s with every sample once and in order, `Report`. Resumes after lost connections.

        Closing the iterator cancels the rest. Raises: as `generate`.
        """
        attempts = _Attempts(self._retries)
        progress = _Progress()
        while True:
            try:
                with closing(self._events(attempts.named(request), progress.begin())) as events:
                    for event in events:
                        new = progress.take(event)
                        if isinstance(new, Chunk):
                            attempts.progressed()
                        if new is not None:
                            yield new
                        if isinstance(event, Report):
                            return
                raise ConnectionLostError("the stream ended prematurely")
            except MusicGenError as error:
                attempts.failed(error)

    @abstractmethod
    def cancel(self, request_id: str) -> GenerationStatus:
        """Cancel a request of this tenant. Raises: NotFoundError."""

    @abstractmethod
    def status(self, request_id: str) -> GenerationStatus:
        """The status of a request of this tenant. Raises: NotFoundError."""

    @abstractmethod
    def models(self) -> list[ModelInfo]:
        """The models available to this tenant."""

    @abstractmethod
    def close(self) -> None:
        """Close the connection; calls in flight fail."""

    @abstractmethod
    def _whole(self, request: MusicRequest) -> Generated:
        """One attempt. Raises: MusicGenError; ConnectionLostError is retried."""

    @abstractmethod
    def _events(self, request: MusicRequest, first_sample: int) -> Generator[Event, None, None]:
        """One attempt, as a generator that cancels the request when closed. Raises: as `_whole`."""

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Stream:
    """A piece being streamed: iterate over its chunks; `start` and `report` are set on arrival. Closing cancels it."""

    def __init__(self, client: Client, request: MusicRequest) -> None:
        self.seed = request.seed
        self.start: Start | None = None
        """Properties of the piece; set before the first chunk."""
        self.report: Report | None = None
        """Set after the last chunk."""
        self._events = client.events(request)

    def __iter__(self) -> Iterator[Chunk]:
        for event in self._events:
            if isinstance(event, Start):
                self.start = event
            elif isinstance(event, Report):
                self.report = event
            else:
                yield event

    def read(self, progress: Callable[[float], None] = lambda done: None) -> Generated:
        """The whole piece; must be called before iterating.

        Args:
            progress: called with the received fraction after each chunk; an exception from it cancels the piece.
        """
        chunks = []
        for chunk in self:
            chunks.append(chunk.samples)
            if self.start is not None:
                progress((chunk.sample_offset + chunk.samples.shape[-1]) / self.start.num_samples)
        if self.start is None or self.report is None:
            raise BrokenAnswerError("the stream has already been read")
        samples = np.concatenate(chunks, axis=-1)
        start = self.start
        return Generated(samples, start.sample_rate, start.seed, start.model, start.request_id, self.report)

    def close(self) -> None:
        self._events.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Progress:
    """What has been received of one piece, across connections."""

    def __init__(self) -> None:
        self._start: Start | None = None
        self._position = 0
        self._expected = 0
        self._digest = hashlib.sha256()

    def begin(self) -> int:
        """Start a new connection; returns the first sample to request: the last one, if only the report is missing."""
        self._expected = self._position
        if self._start is not None:
            self._expected = min(self._position, self._start.num_samples - 1)
        self._digest = hashlib.sha256()
        return self._expected

    def take(self, event: Event) -> Event | None:
        """The new part of the event, if any. Raises: BrokenAnswerError."""
        if isinstance(event, Start):
            known, self._start = self._start, event
            if known is not None and replace(event, request_id=known.request_id) != known:
                raise BrokenAnswerError("the resumed piece differs from the original; has the service been updated?")
            return event if known is None else None
        if isinstance(event, Chunk):
            return self._new_samples(event)
        if self._start is None or self._position != self._start.num_samples:
            raise BrokenAnswerError(f"the report arrived after only {self._position} samples")
        _check_sum(event, self._digest.hexdigest())
        return event

    def _new_samples(self, chunk: Chunk) -> Chunk | None:
        if chunk.sample_offset != self._expected:
            raise BrokenAnswerError(f"sample_offset: expected {self._expected}, got {chunk.sample_offset}")
        self._digest.update(to_bytes(chunk.samples))
        self._expected += chunk.samples.shape[-1]
        new = chunk.samples[:, self._position - chunk.sample_offset :]
        if new.shape[-1] == 0:
            return None
        chunk = Chunk(new, self._position)
        self._position = self._expected
        return chunk


class _Attempts:
    """Counts attempts and schedules retries."""

    def __init__(self, retries: Retries) -> None:
        self._retries = retries
        self._num_failed = self._num_failed_in_all = 0

    def named(self, request: MusicRequest) -> MusicRequest:
        """The request with a fresh id: that of a lost attempt may still be in use."""
        if request.request_id is None or self._num_failed_in_all == 0:
            return request
        return replace(request, request_id=f"{request.request_id}.{self._num_failed_in_all + 1}")

    def progressed(self) -> None:
        self._num_failed = 0

    def failed(self, error: MusicGenError) -> None:
        """Wait before the next attempt. Raises: `error`, if it is not retryable."""
        retries = self._retries
        # An earlier attempt whose connection was lost may briefly hold the idempotency key.
        held = isinstance(error, ConflictError) and self._num_failed_in_all > 0
        self._num_failed += 1
        self._num_failed_in_all += 1
        asked_s = getattr(error, "retry_after_s", None)
        if not (held or isinstance(error, ConnectionLostError | RetryLaterError)):
            raise error
        if self._num_failed >= retries.max_attempts or (asked_s or 0.0) > retries.max_wait_s:
            raise error
        backoff_s = min(retries.max_backoff_s, retries.first_backoff_s * 2 ** (self._num_failed - 1))
        wait_s = max(asked_s or 0.0, backoff_s * random.uniform(0.5, 1.0))
        _log.info("attempt %d failed (%s); retrying in %.1f s", self._num_failed_in_all, type(error).__name__, wait_s)
        time.sleep(wait_s)


def _check_sum(report: Report, checksum: str) -> None:
    if report.checksum != checksum:
        raise BrokenAnswerError("checksum mismatch: the received audio is corrupt")
