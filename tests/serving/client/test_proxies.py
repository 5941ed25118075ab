"""What stands between: answers of a proxy in the service's place are tried again, the service's own are not."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from musicgen_serving.client import ConnectionLostError, Retries, connect

from musicgen.errors import MusicGenError

TWICE = Retries(max_attempts=2, first_backoff_s=0.01)
OWN = {"error": {"message": "internal error", "type": "server_error", "param": None, "code": "internal_error"}}


class Proxy:
    """Answers every request with one status and body, and counts them."""

    def __init__(self, status: int, body: bytes) -> None:
        proxy, self.num_requests = self, 0

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                proxy.num_requests += 1
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def proxy(request: pytest.FixtureRequest) -> Iterator[Proxy]:
    proxy = Proxy(*request.param)
    yield proxy
    proxy.close()


@pytest.mark.parametrize("proxy", [(s, b"Internal Server Error") for s in (500, 502, 503, 504)], indirect=True)
@pytest.mark.parametrize("way", ["generate", "stream"])
def test_a_proxys_own_error_is_a_lost_connection(proxy: Proxy, way: str) -> None:
    with connect(proxy.url, retries=TWICE) as client, pytest.raises(ConnectionLostError):
        client.generate("x") if way == "generate" else client.stream("x").read()
    assert proxy.num_requests == 2


@pytest.mark.parametrize("proxy", [(500, json.dumps(OWN).encode())], indirect=True)
def test_the_services_own_error_is_not_tried_again(proxy: Proxy) -> None:
    with connect(proxy.url, retries=TWICE) as client, pytest.raises(MusicGenError, match="internal error"):
        client.generate("x")
    assert proxy.num_requests == 1
