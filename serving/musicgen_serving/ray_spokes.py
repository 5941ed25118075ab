"""The parts of a model, and the gatekeeper, as Ray Serve deployments: calls through handles, every loss told as one.

Owns what Ray's errors mean, that whatever is left early is cancelled there, and the renewal of leases. Ray's text never
gets out: it names nodes and paths.
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
from musicgen_serving.admission import AdmissionRequest, Progress, Settlement, Tenant, Ticket
from musicgen_serving.concurrency import together
from musicgen_serving.deployments.chroma import Recording
from musicgen_serving.deployments.language_model import LanguageModelEvent, ModelCard
from musicgen_serving.errors import ReplicaLostError
from musicgen_serving.patience import Repetition
from musicgen_serving.refusals import answer
from musicgen_serving.spokes import BrokenError, LostError
from musicgen_serving.tenancy import hash_key
from musicgen_serving.types import GenerationStatus

Handle = DeploymentHandle[Any]

logger = logging.getLogger(__name__)

GATEKEEPER_WAIT_S = 20.0
"""Longest wait for a gatekeeper that is being replaced."""

_LOSSES = (
    *(RayError, RayServeException, grpc.RpcError, asyncio.CancelledError, OSError, TimeoutError),
    *(EngineDeadError, MemoryError, OutOfMemoryError),
)
"""Of the replica or the way to it, as they may be over in a moment or elsewhere."""
_OF_SERVE = "Unexpected error ("
"""How Serve (2.60) begins what it says, as a RuntimeError, of a connection that broke during a call."""

KNOWN_S = 10.0
"""For how long a key counts that the gatekeeper has known: its callers save a call for each request."""
MAX_KNOWN = 1000


def translated(error: BaseException) -> BaseException:
    """What an error of a handle means: the project's own error, `LostError`, or `BrokenError` if it was raised by code
    of the replica: Serve passes on such errors as they are."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, MusicGenError) and not isinstance(cause, EngineDeadError):
        return cause
    text = f"{type(cause).__name__}: {cause}"
    is_loss = isinstance(cause, _LOSSES) or str(cause).startswith(_OF_SERVE)
    return LostError(text) if is_loss else BrokenError(text)


def direct(handle: Handle) -> Handle:
    """The handle with calls over gRPC between the two replicas, not through the object store.

    A call takes some 0.7 ms of a core on either side so, and 1.9 by default; an item of a stream 0.1 and 0.5.
    """
    return handle.options(_by_reference=False)


def _traced() -> dict[str, str]:
    """The argument by which a call takes the present span along."""
    trace = tracing.present()
    return {} if trace is None else {"trace": trace}


async def call(method: Any, *arguments: object, **named: object) -> Any:
    """Call a deployment's method; a caller that is cancelled cancels the call.

    Raises:
        LostError: the replica is gone or broken. MusicGenError: what the method raised.
    """
    response = method.remote(*arguments, **named)
    try:
        with _translating():
            return answer(await response)
    finally:
        response.cancel()


@contextmanager
def _translating() -> Iterator[None]:
    """Around whatever waits for a replica."""
    try:
        yield
    except Exception as error:
        raise translated(error) from None
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise translated(error) from None  # it was the call that was cancelled, over there: the replica stops


class RaySpokes:
    """One model's parts in replicas.

    Args:
        parts: handles of the language model, the codec, the text encoder and the chroma extractor.
        lease_s: of requests to the language model; they are renewed several times as often.
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
                    event = answer(await anext(stream, None))
                if event is None:
                    return
                yield event
        finally:
            stream.cancel()

    async def _renew_forever(self) -> None:
        """A replica does not learn that this process died; its leases run out then."""
        while True:
            if self._leased:
                try:
                    response = self._language_model.broadcast("renew", list(self._leased))
                    results = await response.results_async(timeout_s=self._lease_s / 4, return_exceptions=True)
                    names = [type(result).__name__ for result in results if isinstance(result, Exception)]
                except Exception as error:  # the next renewal comes well before the lease runs out
                    names = [type(error).__name__]
                if names:
                    logger.warning("leases of %d pieces were not renewed: %s", len(self._leased), ", ".join(names))
            await asyncio.sleep(self._lease_s / 4)


class RayGatekeeper:
    """The gatekeeper in its replica; `admission.Gatekeeper`. Waits a while for one that is being replaced."""

    def __init__(self, handle: Handle) -> None:
        self._handle = direct(handle)
        self._known: dict[str | None, tuple[float, Tenant]] = {}
        """Of hashed keys the tenant, and until when it counts."""

    async def authenticate(self, api_key: str | None) -> Tenant:
        key = hash_key(api_key) if api_key else None  # the key itself goes no further
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
        """Raises: LostError: it does not answer now."""
        return bool(await call(self._handle.takes_requests))

    async def admit(self, request: AdmissionRequest) -> Ticket:
        ticket = await self._call("admit", request)
        assert isinstance(ticket, Ticket)
        return ticket

    async def settle(self, settlement: Settlement) -> None:
        await self._call("settle", settlement)

    async def report(self, edge: str, running: list[Progress]) -> list[str]:
        return list(await self._call("report", edge, running))

    async def wait_cancelled(self, edge: str) -> list[str]:
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
        """Tell how many engines a model has."""
        await self._call("set_capacity", model, num_replicas)

    async def _call(self, method: str, *arguments: object) -> Any:
        """Raises: ReplicaLostError: there is none for too long. InternalError: it fails in the same way again."""
        repetition = Repetition()
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
                    raise ReplicaLostError("the service is being restored; retry in some seconds") from None
                await asyncio.sleep(0.2)
