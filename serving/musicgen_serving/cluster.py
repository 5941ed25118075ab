"""The service on this machine or on an existing Ray cluster: start Ray, deploy, wait until ready, drain, stop.

Owns the startup and shutdown sequence. A local Ray listens on loopback.
"""

from __future__ import annotations

import importlib
import io
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray._private import ray_constants
from ray.serve.config import ProxyLocation

from musicgen.errors import InvalidRequestError, MusicGenError
from musicgen_serving.certificates import certificates_of
from musicgen_serving.deployments.gatekeeper import LocalGatekeeper
from musicgen_serving.gpus import with_gpus
from musicgen_serving.inner_ports import ask_for_a_token
from musicgen_serving.process import APP_NAME
from musicgen_serving.settings import GrpcSettings, HttpSettings, ServeSettings

LOOK_S, DRAIN_LOOK_S = 1.0, 0.5
_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")

OnState = Callable[[dict[str, str]], None]
"""Called with the state of every deployment when one changes."""


class StartError(MusicGenError):
    """The service could not be started; the message names the component and Ray's reason."""


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where the service listens."""

    http: str
    grpc: str | None


def start(settings: ServeSettings, on_state: OnState | None = None, timeout_s: float = 600.0) -> Endpoints:
    """Start the service and wait until every component is ready.

    Raises:
        StartError: a port is in use, or a component failed to start or timed out. What was started is stopped.
        InvalidRequestError, MissingDependencyError: see `check`.
    """
    if settings.ray_address is None:
        check(settings)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(importlib.import_module, "torch")  # takes seconds; overlap it with Ray's startup
        _start_ray(settings)
    try:
        from musicgen_serving.app import build_app

        serve.start(proxy_location=ProxyLocation.Disabled)  # the ingresses open their own ports
        if settings.ray_address is None:
            settings = with_gpus(settings, int(ray.cluster_resources().get("GPU", 0)))  # type: ignore[no-untyped-call]
        app = build_app(settings.model_dump(mode="json"))
        with ThreadPoolExecutor(1) as pool:
            deployed = pool.submit(serve.run, app, name=APP_NAME, route_prefix=None)
            _watch(deployed, on_state or (lambda _: None), timeout_s)
    except BaseException:
        stop(joined=settings.ray_address is not None)
        raise
    return Endpoints(_url("http", settings.http), _url("grpc", settings.grpc) if settings.grpc.port else None)


def _url(scheme: str, edge: HttpSettings | GrpcSettings) -> str:
    return f"{scheme}{'' if edge.tls_certificate is None else 's'}://{edge.host}:{edge.port}"


def drain(on_running: Callable[[int], None], timeout_s: float) -> bool:
    """Stop admission and wait until all running requests have ended. Returns whether they have."""
    gatekeeper = serve.get_deployment_handle("Gatekeeper", APP_NAME)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        num_running = gatekeeper.drain.remote().result()
        on_running(num_running)
        if num_running == 0:
            return True
        time.sleep(DRAIN_LOOK_S)
    return False


def stop(*, joined: bool = False) -> None:
    """Stop everything that `start` started.

    Args:
        joined: Ray was already running: only remove the service from it.
    """
    if not ray.is_initialized():
        return
    with redirect_stdout(io.StringIO()):  # Ray reports the death of the controller it has just stopped
        if joined:
            serve.delete(APP_NAME)
        else:
            serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


def check(settings: ServeSettings) -> None:
    """Check what the components would only find out after most of the startup.

    Raises:
        StartError: a port is unavailable.
        InvalidRequestError: unusable tenants, quota storage, usage file or certificates.
        MissingDependencyError: the client of the quota storage is not installed.
    """
    check_ports(settings)
    certificates_of("http", settings.http)
    certificates_of("grpc", settings.grpc, settings.grpc.client_ca)
    LocalGatekeeper(settings).close()


def check_ports(settings: ServeSettings) -> None:
    """Check that both ports are free. The ingresses use SO_REUSEPORT: without this check, a second service of the same
    user would silently take every other connection of the first.

    Raises:
        StartError: a port is unavailable; names the port and the remedy.
    """
    for name, host, port in (
        ("http", settings.http.host, settings.http.port),
        ("grpc", settings.grpc.host, settings.grpc.port),
    ):
        if port:
            _check_port(name, host, port)


def _check_port(name: str, host: str, port: int) -> None:
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise InvalidRequestError("an address of this machine, such as 0.0.0.0", host, param=f"{name}.host") from error
    try:
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore connections in TIME_WAIT
            probe.bind(address)
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise StartError(
            f"{name}.port: cannot listen on port {port} of {host}: {reason}; stop the process that uses it (another "
            f"`musicgen serve`?) or choose another port with --{name}-port"
        ) from error


def _start_ray(settings: ServeSettings) -> None:
    if ray.is_initialized():
        return
    if settings.ray_address is not None:
        ray.init(settings.ray_address, log_to_driver=False, logging_level=logging.ERROR)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray workers run at lower priority by default, but here they are the main workload.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Prestarted workers have a different runtime environment than the replicas and would never be used.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    # By default Serve's controller runs its loop ten times a second, which costs 5 % of a core when idle.
    os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")
    # Ray listens on all interfaces unless clusters are disabled, as it does on other operating systems. Child processes
    # read the variable; this process has already read it.
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    ask_for_a_token()
    ray.init(
        # By default, Ray would join any cluster found in RAY_ADDRESS or on this machine.
        "local",
        # Components share the cores; Ray's CPU reservations must not limit their number.
        num_cpus=max(os.cpu_count() or 1, 4),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def _watch(deployed: Future[Any], on_state: OnState, timeout_s: float) -> None:
    """Report every state change until deployed. Raises: StartError."""
    deadline = time.monotonic() + timeout_s
    states: dict[str, str] = {}
    while not deployed.done():
        application = serve.status().applications.get(APP_NAME)
        now = {} if application is None else {n: _state(d.replica_states) for n, d in application.deployments.items()}
        if now != states:
            on_state(now)
            states = now
        if time.monotonic() > deadline:
            waiting = ", ".join(name for name, state in states.items() if state != "ready")
            raise StartError(f"the service was not ready within {timeout_s:g} s; still waiting for: {waiting}")
        wait([deployed], timeout=LOOK_S)
    if (error := deployed.exception()) is not None:
        raise StartError(f"the service could not be started: {_reasons() or error}") from error


def _reasons() -> str:
    """The last line of each failed deployment's message, which is a traceback; Serve's own error only names them."""
    application = serve.status().applications.get(APP_NAME)
    parts = {} if application is None else application.deployments
    last = {name: part.message.strip().rpartition("\n")[2] for name, part in parts.items() if part.status in _FAILED}
    return "; ".join(f"{name}: {words}" for name, words in last.items() if words)


def _state(replicas: Mapping[Any, int]) -> str:
    """State of a deployment in one word."""
    return "ready" if set(replicas) == {"RUNNING"} else "starting"
