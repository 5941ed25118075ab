"""A model's components and the gatekeeper as Ray Serve deployments, called through handles.

Owns the mapping of Ray's errors, the cancellation of abandoned calls, and lease renewal. Ray's messages are never
exposed, because they name nodes and paths.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any

import grpc
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from torch import OutOfMemoryError, Tensor

from musicgen.codec_stream import StreamPiece, StreamState
from musicgen.errors import EngineDeadError, MusicGenError
from musicgen.types import EngineRequest
from musicgen_serving import tracing
from musicgen_serving.admission import AdmissionRequest, Progress, Settlement, Stop, Tenant, Ticket
from musicgen_serving.components import BrokenError, LostError
from musicgen_serving.concurrency import together
from musicgen_serving.deployments.chroma import Recording
from musicgen_serving.deployments.language_model import LanguageModelEvent, ModelCard
from musicgen_serving.error_values import unwrap
from musicgen_serving.errors import ReplicaLostError
from musicgen_serving.failover import RepeatedFailure
from musicgen_serving.tenancy import hash_key
from musicgen_serving.types import GenerationStatus

Handle = DeploymentHandle[Any]

logger = logging.getLogger(__name__)

GATEKEEPER_WAIT_S = 20.0
"""Maximum wait for a restarting gatekeeper."""

_LOSSES = (
    *(RayError, RayServeException, grpc.RpcError, asyncio.CancelledError, OSError, TimeoutError),
    *(EngineDeadError, MemoryError, OutOfMemoryError),
)
"""Failures of a replica or the connection to it: transient, or limited to that replica."""
_OF_SERVE = "Unexpected error ("
"""Prefix of the RuntimeError that Serve (2.60) raises if the connection breaks during a call."""

KNOWN_S = 10.0
"""How long an authenticated key is cached, which saves a gatekeeper call per request."""
MAX_KNOWN = 1000


def translated(error: BaseException) -> BaseException:
    """Map an error raised by a handle: a `MusicGenError`, `LostError`, or `BrokenError` if it was raised by the
    replica's code, which Serve re-raises unchanged."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, MusicGenError) and not isinstance(cause, EngineDeadError):
        return cause
    text = f"{type(cause).__name__}: {cause}"
    is_loss = isinstance(cause, _LOSSES) or str(cause).startswith(_OF_SERVE)
    return LostError(text) if is_loss else BrokenError(text)


def direct(handle: Handle) -> Handle:
    """The handle with direct gRPC calls between replicas instead of the object store.

    A call costs about 0.7 ms of CPU time on either side, against 1.9 ms by default; a stream item 0.1 against 0.5 ms.
    """
    return handle.options(_by_reference=False)


def _traced() -> dict[str, str]:
    """The argument that propagates the current span."""
    trace = tracing.present()
    return {} if trace is None else {"trace": trace}


async def call(method: Any, *arguments: object, **named: object) -> Any:
    """Call a deployment's method; cancelling the caller cancels the call.

    Raises:
        LostError: the replica is lost or broken. MusicGenError: raised by the method.
    """
    response = method.remote(*arguments, **named)
    try:
        with _translating():
            return unwrap(await response)
    finally:
        response.cancel()


@contextmanager
def _translating() -> Iterator[None]:
    """Wraps waiting for a replica."""
    try:
        yield
    except Exception as error:
        raise translated(error) from None
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise translated(error) from None  # the call was cancelled remotely: the replica is stopping


class RayComponents:
    """One model's components in replicas.

    Args:
        parts: handles of the language model, the codec, the text encoder and the chroma extractor.
        lease_s: lease duration of requests to the language model; renewed four times as often.
    """

    def __init__(self, parts: tuple[Handle, Handle, Handle, Handle], lease_s: float) -> None:
        self._language_model, self._codec, self._text_encoder, self._chroma = map(direct, parts)
        self._streaming = self._language_model.options(stream=True)
        self._lease_s = lease_s
        self._leased: set[str] = set()
        self._renewer: asyncio.Task[None] | None = None

    async def check(self) -> None:
        others = (self._codec, self._text_encoder, self._chroma)
        await together(call(self._language_model.describe), *(call(other.num_calls) for other in others))

    async def describe(self) -> ModelCard:
        card = await call(self._language_model.describe)
        assert isinstance(card, ModelCard)
        return card

    async def encode_text(self, prompt: str) -> Tensor:
        states: Tensor = await call(self._text_encoder.encode, prompt, **_traced())
        return states

    async def check_prompt(self, prompt: str) -> None:
        await call(self._text_encoder.check_prompt, prompt)

    async def check_stems(self) -> None:
        await call(self._chroma.check_stems)

    async def extract_chroma(self, recording: Recording) -> list[Tensor]:
        chroma: list[Tensor] = await call(self._chroma.extract, recording, **_traced())
        return chroma

    async def encode_prompt(self, content: bytes, duration_s: float) -> Tensor:
        codes: Tensor = await call(self._codec.encode, content, duration_s, **_traced())
        return codes

    async def initial_state(self) -> StreamState:
        state = await call(self._codec.initial_state)
        assert isinstance(state, StreamState)
        return state

    async def decode(self, piece: StreamPiece, *, urgent: bool) -> tuple[Tensor, StreamState]:
        result: tuple[Tensor, StreamState] = await call(self._codec.decode, piece, urgent=urgent, **_traced())
        return result

    @asynccontextmanager
    async def generate(self, request: EngineRequest) -> AsyncIterator[AsyncIterator[LanguageModelEvent]]:
        self._leased.add(request.request_id)
        if self._renewer is None:
            self._renewer = asyncio.create_task(self._renew_forever())
        try:
            async with aclosing(self._generate(request)) as events:
                yield events
        finally:
            self._leased.discard(request.request_id)

    async def _generate(self, request: EngineRequest) -> AsyncGenerator[LanguageModelEvent, None]:
        stream: Any = self._streaming.generate.remote(request, **_traced())
        try:
            while True:
                with _translating():
                    event = unwrap(await anext(stream, None))
                if event is None:
                    return
                yield event
        finally:
            stream.cancel()

    async def _renew_forever(self) -> None:
        """Leases expire if this process dies, which replicas would not notice otherwise."""
        while True:
            if self._leased:
                try:
                    response = self._language_model.broadcast("renew", list(self._leased))
                    results = await response.results_async(timeout_s=self._lease_s / 4, return_exceptions=True)
                    names = [type(result).__name__ for result in results if isinstance(result, Exception)]
                except Exception as error:  # the next renewal comes well before the lease runs out
                    names = [type(error).__name__]
                if names:
                    logger.warning("renewing the leases of %d pieces failed: %s", len(self._leased), ", ".join(names))
            await asyncio.sleep(self._lease_s / 4)


class RayGatekeeper:
    """The gatekeeper in its replica; implements `admission.Gatekeeper`. Waits while it restarts."""

    def __init__(self, handle: Handle) -> None:
        self._handle = direct(handle)
        self._known: dict[str | None, tuple[float, Tenant]] = {}
        """Hashed key → expiry and tenant."""

    async def authenticate(self, api_key: str | None) -> Tenant:
        key = hash_key(api_key) if api_key else None  # the plain key must not leave this process
        now = asyncio.get_running_loop().time()
        until, tenant = self._known.get(key, (0.0, None))
        if tenant is None or now >= until:
            tenant = await self._call("find_tenant", key)
            assert isinstance(tenant, Tenant)
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[key] = now + KNOWN_S, tenant
        return tenant

    async def takes_requests(self) -> bool:
        """Raises: LostError: it does not respond."""
        return bool(await call(self._handle.takes_requests))

    async def admit(self, request: AdmissionRequest) -> Ticket:
        ticket = await self._call("admit", request)
        assert isinstance(ticket, Ticket)
        return ticket

    async def settle(self, settlement: Settlement) -> None:
        await self._call("settle", settlement)

    async def report(self, edge: str, running: list[Progress]) -> list[Stop]:
        return list(await self._call("report", edge, running))

    async def wait_cancelled(self, edge: str) -> list[Stop]:
        return list(await self._call("wait_cancelled", edge))

    async def cancel(self, tenant: str, request_id: str) -> GenerationStatus:
        status = await self._call("cancel", tenant, request_id)
        assert isinstance(status, GenerationStatus)
        return status

    async def status(self, tenant: str, request_id: str) -> GenerationStatus:
        status = await self._call("status", tenant, request_id)
        assert isinstance(status, GenerationStatus)
        return status

    async def set_capacity(self, model: str, num_replicas: int) -> None:
        """Report the number of a model's engines."""
        await self._call("set_capacity", model, num_replicas)

    async def _call(self, method: str, *arguments: object) -> Any:
        """Raises: ReplicaLostError: unavailable for too long. InternalError: repeated failure with the same error."""
        repetition = RepeatedFailure()
        deadline = asyncio.get_running_loop().time() + GATEKEEPER_WAIT_S
        while True:
            left_s = deadline - asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout(left_s):
                    return await call(getattr(self._handle, method), *arguments)
            except (LostError, TimeoutError) as error:
                logger.warning("gatekeeper.%s: %s", method, str(error).splitlines()[:1])
                repetition.check(error)
                if left_s < 0.5:
                    raise ReplicaLostError("the service is restarting; retry in a few seconds") from None
                await asyncio.sleep(0.2)
