"""Access control for the internal ports of Ray and Serve. Anyone who can call them can execute code.

Two safeguards for a single-machine cluster: its processes authenticate with a token, and the servers for calls between
replicas, which Serve opens on all interfaces, listen on loopback like everything else.
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
    """Call before starting Ray: enables token authentication for its processes, which inherit the environment.

    An operator's token is kept. Otherwise a new one is generated and never written to disk: Ray itself would keep one
    in the home directory for all clusters, and only if authentication had not been disabled.
    """
    os.environ[MODE] = "token"
    if not (os.environ.get(TOKEN) or os.environ.get(TOKEN_PATH)):
        os.environ[TOKEN] = secrets.token_hex(32)
    Config.initialize("")  # this process has already read the variables
    AuthenticationTokenLoader.instance().reset_cache()


def keep_to_this_machine() -> None:
    """Call in a replica before Serve opens its port: makes it listen on loopback if the node's address is loopback."""
    address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    if not ipaddress.ip_address(address).is_loopback:
        return
    listen = getattr(replica, "add_port_to_grpc_server", None)
    if listen is None:
        logger.warning(
            "unsupported Ray version: ports between replicas may listen on all interfaces (protected by a token)"
        )
        return

    def listen_here(server: Any, asked: str) -> int:
        port: int = listen(server, asked.replace("[::]", address))
        return port

    replica.add_port_to_grpc_server = listen_here  # type: ignore[attr-defined]
