"""Who reaches the cluster: nothing listens beyond this machine, and who calls without the token is refused."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator

import grpc
import psutil
import pytest
from musicgen_serving import cluster
from ray.serve.generated import serve_pb2, serve_pb2_grpc
from serving.cluster.conftest import Running

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's: what it warns of is not ours


def listeners() -> Iterator[tuple[str, str, int]]:
    """Title, address and port of whatever listens in this process or one that it has started."""
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            title = (process.cmdline() or [process.name()])[0]
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    yield title, connection.laddr.ip, connection.laddr.port
        except psutil.NoSuchProcess:
            continue


def is_loopback(address: str) -> bool:
    given = ipaddress.ip_address(address)
    mapped = given.ipv4_mapped if isinstance(given, ipaddress.IPv6Address) else None
    return (mapped or given).is_loopback


def test_nothing_listens_beyond_this_machine(service: Running) -> None:
    found = list(listeners())
    assert sum(title.startswith("ray::ServeReplica") for title, _, _ in found) >= 8
    assert [line for line in found if not is_loopback(line[1])] == []


def test_replicas_refuse_whoever_has_no_token(service: Running) -> None:
    assert "RAY_AUTH_TOKEN" in os.environ
    answers = []
    http_port = int(service.endpoints.http.rpartition(":")[2])
    for title, address, port in set(listeners()):
        if not title.startswith("ray::ServeReplica") or port == http_port:
            continue
        with grpc.insecure_channel(f"127.0.0.1:{port}" if "." in address else f"[{address}]:{port}") as channel:
            stub = serve_pb2_grpc.ASGIServiceStub(channel)
            with pytest.raises(grpc.RpcError) as refused:
                stub.HandleRequest(serve_pb2.ASGIRequest(pickled_request_metadata=b"cos\ngetpid\n(tR."), timeout=10)
            answers.append(refused.value.code())
    # Each replica has a port of Ray's core, which knows no such call, and Serve's; the edge of gRPC has its own too.
    assert answers.count(grpc.StatusCode.UNAUTHENTICATED) >= 8
    assert set(answers) <= {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED}


def test_a_second_service_on_the_same_ports_does_not_start(service: Running) -> None:
    port = int(service.endpoints.http.rpartition(":")[2])
    with pytest.raises(cluster.StartError, match=f"http.port: cannot listen on port {port} of 127.0.0.1"):
        cluster._check_port("http", "127.0.0.1", port)
