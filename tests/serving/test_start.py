"""Starting a service: what is found out before Ray is started."""

from __future__ import annotations

import socket
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from musicgen_serving.free_ports import free_ports
from musicgen_serving.settings import ServeSettings

from musicgen.errors import InvalidRequestError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own code uses what pydantic deprecates
    from musicgen_serving import cluster
    from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, DeploymentStatus, ServeStatus
    from ray.serve.schema import DeploymentStatusOverview as Overview
    from ray.serve.schema import DeploymentStatusTrigger as Trigger


@pytest.fixture(params=["http", "grpc"])
def shared_port(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    """A protocol, and a port that somebody of the same user has and shares, as the ingresses do."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield request.param, other.getsockname()[1]


def test_a_port_that_is_taken_is_found_before_anything_starts(
    shared_port: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol, port = shared_port
    monkeypatch.setattr(cluster, "_start_ray", lambda _: pytest.fail("expected no Ray, got one"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    ports = {"http": {"port": free}, "grpc": {"port": 0}} | {protocol: {"port": port}}
    with pytest.raises(cluster.StartError, match=rf"{protocol}.port: .* {port} .* --{protocol}-port"):
        cluster.start(ServeSettings(**ports))


def test_a_port_is_free_again_while_old_connections_end() -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = listener.accept()
            accepted.close()  # this side waits for a while in TIME_WAIT
            client.recv(1)
    cluster.check_ports(ServeSettings(http={"port": port}, grpc={"port": 0}))


def test_an_address_that_is_not_this_machines_is_named() -> None:
    with pytest.raises(cluster.StartError, match=r"192\.0\.2\.1"):
        cluster.check_ports(ServeSettings(http={"host": "192.0.2.1"}, grpc={"port": 0}))


@pytest.mark.parametrize(
    ("last", "told"),
    [("OwnError: no such file\n", "GrpcIngress: OwnError: no such file"), ("", r"failed: \['GrpcIngress'\]")],
    ids=["it says", "it says nothing"],
)
def test_the_part_that_failed_and_why_is_what_is_told(last: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    message = f"The deployment failed to start 3 times in a row. Error:\nTraceback\n{last}" if last else ""
    parts = {
        "Gatekeeper": Overview(DeploymentStatus.HEALTHY, Trigger.UNSPECIFIED, {}, ""),
        "GrpcIngress": Overview(DeploymentStatus.DEPLOY_FAILED, Trigger.UNSPECIFIED, {}, message),
    }
    application = ApplicationStatusOverview(ApplicationStatus.DEPLOY_FAILED, "failed: ['GrpcIngress']", 0.0, parts)
    status = ServeStatus(proxies={}, applications={cluster.APP_NAME: application})
    monkeypatch.setattr(cluster.serve, "status", lambda: status)
    deployed: Future[None] = Future()
    deployed.set_exception(RuntimeError("failed: ['GrpcIngress']"))
    with pytest.raises(cluster.StartError, match=rf"could not be started: {told}$"):
        cluster._watch(deployed, lambda _: None, timeout_s=1.0)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"access": {"tenants_file": "/no/such/file.yaml"}}, "access.tenants_file"),
        ({"access": {"open": True, "limits_storage": "foo://x"}}, "access.limits_storage"),
        ({"access": {"open": True, "usage_file": "/no/such/folder/usage"}}, "access.usage_file"),
        ({"http": {"tls_certificate": "/no/cert.pem", "tls_key": "/no/key.pem"}}, "http.tls_certificate"),
        ({"http": {"host": "no such host"}}, "http.host"),
    ],
)
def test_what_a_component_could_not_use_is_found_before_anything_starts(
    settings: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_start_ray", lambda _: pytest.fail("expected no Ray, got one"))
    http_port, grpc_port = free_ports(2)
    ports = {"http": {"port": http_port} | settings.get("http", {}), "grpc": {"port": grpc_port}}
    with pytest.raises(InvalidRequestError, match=named):
        cluster.start(ServeSettings(**(settings | ports)))


def test_a_gpu_that_is_not_booked_is_asked_for_before_anything_is_deployed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from musicgen_serving.app import build_app
    with pytest.raises(InvalidRequestError, match="num_gpus > 0"):
        build_app({"models": [{"device": "cuda"}]})
