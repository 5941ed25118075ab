"""Who reaches Ray's ports: the token that a cluster of our own asks for, and where replicas listen."""

from __future__ import annotations

import logging
import os
import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own code uses what pydantic deprecates
    import ray
    from musicgen_serving import inner_ports
    from ray._private.authentication.authentication_utils import is_token_auth_enabled, validate_request_token
    from ray._raylet import AuthenticationTokenLoader, Config
    from ray.serve._private import replica


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (inner_ports.MODE, inner_ports.TOKEN, inner_ports.TOKEN_PATH):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


@pytest.mark.parametrize("mode", [None, "disabled"])
def test_a_token_is_asked_for_whatever_was_said_before(mode: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if mode is not None:
        monkeypatch.setenv(inner_ports.MODE, mode)
    try:
        inner_ports.ask_for_a_token()
        assert is_token_auth_enabled(), "also in this process, which has read the variable before"
        token = os.environ[inner_ports.TOKEN]
        assert len(token) == 64
        assert validate_request_token(f"Bearer {token}")
        assert not validate_request_token("Bearer " + "0" * 64)
    finally:
        monkeypatch.undo()
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


@pytest.mark.parametrize("name", [inner_ports.TOKEN, inner_ports.TOKEN_PATH])
def test_an_operators_own_token_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "/given")
    try:
        inner_ports.ask_for_a_token()
        assert os.environ.get(inner_ports.TOKEN) == ("/given" if name == inner_ports.TOKEN else None)
    finally:
        monkeypatch.undo()
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


@pytest.mark.parametrize(
    ("node", "listens"), [("127.0.0.1", "127.0.0.1:0"), ("10.0.0.5", "[::]:0")], ids=["one machine", "cluster"]
)
def test_replicas_listen_where_their_node_is_known(node: str, listens: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: node)
    monkeypatch.setattr(replica, "add_port_to_grpc_server", lambda server, address: address)
    inner_ports.keep_to_this_machine()
    assert replica.add_port_to_grpc_server(None, "[::]:0") == listens


def test_a_ray_that_does_it_otherwise_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.delattr(replica, "add_port_to_grpc_server")
    monkeypatch.setattr(logging.getLogger("musicgen_serving"), "propagate", True)
    inner_ports.keep_to_this_machine()
    assert "all interfaces" in caplog.text
