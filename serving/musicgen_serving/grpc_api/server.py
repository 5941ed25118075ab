"""The gRPC server of one ingress replica: port, TLS, limits, health, reflection, drain.

Runs its own `grpc.aio` server, because Serve's gRPC proxy has no TLS and no interceptors, and lost cancellations in our
tests. Replicas on a machine share the port. Accesses the service only through its getter.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import grpc
import grpc.aio
from grpc_reflection.v1alpha import reflection

from musicgen.errors import InvalidRequestError
from musicgen_serving.budget import Budget
from musicgen_serving.certificates import Certificates, Pem, certificates_of
from musicgen_serving.grpc_api.broken import BrokenMessages
from musicgen_serving.grpc_api.call import ServiceGetter
from musicgen_serving.grpc_api.callers import KnownCallers
from musicgen_serving.grpc_api.health import NAME as HEALTH
from musicgen_serving.grpc_api.health import Health
from musicgen_serving.grpc_api.servicer import MusicServicer
from musicgen_serving.proto.musicgen.v1 import music_service_pb2 as pb
from musicgen_serving.proto.musicgen.v1 import music_service_pb2_grpc as pb_grpc
from musicgen_serving.settings import GrpcSettings, LimitSettings
from musicgen_serving.watched_files import poll

SERVICE = str(pb.DESCRIPTOR.services_by_name["MusicService"].full_name)
MESSAGE_ROOM_BYTES = 64 * 1024
"""Room for everything in a request other than files and prompts."""
_log = logging.getLogger(__name__)


class GrpcServer:
    """A running server. Set by `start_server`."""

    def __init__(self, server: grpc.aio.Server, port: int, health: Health, looking: asyncio.Task[None] | None) -> None:
        self.server, self.port = server, port
        self._health, self._looking = health, looking

    async def stop(self, grace_s: float) -> None:
        """Accept no more calls, let running ones finish for `grace_s` seconds, then cancel them."""
        await self._health.close()
        await self.server.stop(grace_s)
        if self._looking is not None:
            self._looking.cancel()

    async def wait(self) -> None:
        """Wait until the server has stopped."""
        await self.server.wait_for_termination()


async def start_server(get_service: ServiceGetter, settings: GrpcSettings, limits: LimitSettings) -> GrpcServer:
    """Listen. Port 0 picks a free one; see the result's `port`.

    Args:
        get_service: called for each RPC.
    Raises:
        InvalidRequestError: the port is unavailable, or the TLS files cannot be read or used.
    """
    certificates = certificates_of("grpc", settings, settings.client_ca)
    server = grpc.aio.server(
        interceptors=[KnownCallers(f"/{SERVICE}/", get_service), BrokenMessages(f"/{SERVICE}/")],
        options=_options(settings, limits),
        maximum_concurrent_rpcs=settings.max_concurrent_calls,
    )
    health = Health(server, (SERVICE,))
    servicer = MusicServicer(get_service, Budget(lambda: limits.edge_bytes))
    pb_grpc.add_MusicServiceServicer_to_server(servicer, server)
    reflection.enable_server_reflection([SERVICE, HEALTH, reflection.SERVICE_NAME], server)
    address = f"[{settings.host}]:{settings.port}" if ":" in settings.host else f"{settings.host}:{settings.port}"
    try:
        if certificates is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, _credentials(certificates))
        await server.start()
    except RuntimeError as error:
        got = f"{address}, which is unavailable"
        raise InvalidRequestError("a free port and usable PEM files", got, param="grpc") from error
    await health.watch(get_service)
    _log.info("gRPC listening on %s:%d, %s", settings.host, port, "TLS" if certificates else "plaintext")
    looking = asyncio.create_task(poll(certificates.look)) if certificates is not None else None
    return GrpcServer(server, port, health, looking)


def max_request_bytes(limits: LimitSettings) -> int:
    """Size of the largest valid request: two files, and prompts of up to four bytes per character."""
    return 2 * limits.max_file_bytes + limits.max_pieces * (4 * limits.max_prompt_chars + 8) + MESSAGE_ROOM_BYTES


def _options(settings: GrpcSettings, limits: LimitSettings) -> Sequence[tuple[str, int]]:
    """The names are from grpc's `channel_arg_names.h`."""
    keepalive_ms = round(settings.keepalive_s * 1000)
    return (
        ("grpc.so_reuseport", 1),
        ("grpc.max_receive_message_length", max_request_bytes(limits)),
        ("grpc.max_send_message_length", -1),  # responses are bounded by the request limits
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", min(20_000, keepalive_ms)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    )


def _credentials(certificates: Certificates) -> grpc.ServerCredentials:
    """Credentials that track `certificates`: grpc calls `newer` for each new connection, on its own thread."""
    shown = certificates.pem

    def newer() -> grpc.ServerCertificateConfiguration | None:
        nonlocal shown
        newest = certificates.pem
        if newest is shown:
            return None
        shown = newest
        return _configuration(newest)

    asks_clients = shown.client_ca is not None
    return grpc.dynamic_ssl_server_credentials(
        _configuration(shown),
        newer,  # type: ignore[arg-type]  # the stubs do not allow None (unchanged)
        require_client_authentication=asks_clients,
    )


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.certificate)], pem.client_ca)
