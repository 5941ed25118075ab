"""Certificate and key of one port, with hot reload.

Certificate and key are replaced together, and only if valid. Independent of servers: HTTP uses the SSL context, gRPC
the PEM contents.
"""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from musicgen.errors import InvalidRequestError
from musicgen_serving.settings import EdgeSettings
from musicgen_serving.watched_files import WatchedFiles

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pem:
    """Contents of the PEM files."""

    certificate: bytes
    """The certificate chain."""
    key: bytes = field(repr=False)
    client_ca: bytes | None = None

    def context(self) -> ssl.SSLContext:
        """A server context. `ssl` only loads files, so it gets in-memory ones: exactly what was validated here is used,
        even if the real files change.

        Raises:
            ssl.SSLError: invalid PEM, a key with a password, or a certificate and key that do not match.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with _in_memory(self.certificate) as certificate, _in_memory(self.key) as key:
            context.load_cert_chain(certificate, key, password="")  # None would prompt for one
        if self.client_ca is not None:
            with _in_memory(self.client_ca) as client_ca:
                context.load_verify_locations(client_ca)
        return context


class Certificates:
    """Certificate of one port. `look` reloads it for new connections.

    Args:
        part: the protocol, for messages.
        client_ca: CA of client certificates, if clients must present one.

    Raises:
        InvalidRequestError: the files cannot be read or are invalid.
    """

    pem: Pem
    context: ssl.SSLContext

    def __init__(self, part: str, certificate: Path, key: Path, client_ca: Path | None = None) -> None:
        self._part = part
        paths = (certificate, key) if client_ca is None else (certificate, key, client_ca)
        self._files = WatchedFiles(*paths)
        try:
            self._take()
        except OSError as error:
            got = f"{', '.join(map(str, paths))} ({error})"
            param = f"{part}.tls_certificate"
            raise InvalidRequestError("readable, matching PEM files", got, param=param) from error

    def look(self) -> None:
        """Reload the files if they have changed and are valid."""
        if not self._files.have_changed():
            return
        try:
            self._take()
        except OSError as error:
            log.error("%s: invalid TLS files, keeping the previous ones: %s", self._part, error)
        else:
            log.info("%s: TLS files reloaded for new connections", self._part)

    def _take(self) -> None:
        """Raises: OSError: unreadable or, as `ssl.SSLError`, invalid files; nothing has changed."""
        pem = Pem(*self._files.contents)
        self.context, self.pem = pem.context(), pem


def certificates_of(part: str, settings: EdgeSettings, client_ca: Path | None = None) -> Certificates | None:
    """Certificates of a port; None: plaintext. Raises: InvalidRequestError: unreadable or invalid files."""
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    return Certificates(part, settings.tls_certificate, settings.tls_key, client_ca)


@contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """Path of an in-memory file."""
    with os.fdopen(os.memfd_create("pem"), "wb", buffering=0) as file:
        file.write(content)
        yield f"/proc/self/fd/{file.fileno()}"
