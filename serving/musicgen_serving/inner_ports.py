"""Who reaches the ports that Ray and Serve open for themselves. Whoever may call them can run code.

Two bolts for a cluster that is one machine: its processes know each other by a token, and the servers by which replicas
call each other, which Serve opens on every interface, listen on loopback as everything else of such a cluster does.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
from typing import Any

import ray
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.serve._private import replica

logger = logging.getLogger(__name__)

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


def ask_for_a_token() -> None:
    """Before Ray is started: its processes, which inherit the environment, answer only those that know the token.

    An operator's own is kept. Otherwise a new one, which is written nowhere: Ray would keep one in the home folder for
    all clusters, and only if nobody had turned that off.
    """
    os.environ[MODE] = "token"
    if not (os.environ.get(TOKEN) or os.environ.get(TOKEN_PATH)):
        os.environ[TOKEN] = secrets.token_hex(32)
    Config.initialize("")  # this process has read the variables already
    AuthenticationTokenLoader.instance().reset_cache()


def keep_to_this_machine() -> None:
    """In a replica, before Serve opens its port: on loopback, if that is where this node is known."""
    address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    if not ipaddress.ip_address(address).is_loopback:
        return
    listen = getattr(replica, "add_port_to_grpc_server", None)
    if listen is None:
        logger.warning(
            "this Ray opens the ports between replicas elsewhere: they may be on every interface, with a token"
        )
        return

    def listen_here(server: Any, asked: str) -> int:
        port: int = listen(server, asked.replace("[::]", address))
        return port

    replica.add_port_to_grpc_server = listen_here  # type: ignore[attr-defined]
