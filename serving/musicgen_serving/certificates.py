"""Certificate and key of one port: those in force, and the new ones that take their place.

Owns that they are taken together and only if they can be used. Knows no server: HTTP takes a context, gRPC the texts.
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
from musicgen_serving.changing_files import ChangingFiles
from musicgen_serving.settings import EdgeSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pem:
    """The texts."""

    certificate: bytes
    """With those that lead from it to a root, if there are any."""
    key: bytes = field(repr=False)
    client_ca: bytes | None = None

    def context(self) -> ssl.SSLContext:
        """What a server shows with them. `ssl` takes files only, so it gets some in memory: what is checked here is
        then what is used, whatever happens to the real ones.

        Raises:
            ssl.SSLError: one of them is no PEM or needs a password, or certificate and key do not belong together.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with _in_memory(self.certificate) as certificate, _in_memory(self.key) as key:
            context.load_cert_chain(certificate, key, password="")  # None would ask for one at the terminal
        if self.client_ca is not None:
            with _in_memory(self.client_ca) as client_ca:
                context.load_verify_locations(client_ca)
        return context


class Certificates:
    """What one port shows. `look` brings in what is new, for connections that begin then.

    Args:
        part: the protocol, for messages.
        client_ca: of clients, if they must show a certificate.

    Raises:
        InvalidRequestError: the files cannot be read or used.
    """

    pem: Pem
    context: ssl.SSLContext

    def __init__(self, part: str, certificate: Path, key: Path, client_ca: Path | None = None) -> None:
        self._part = part
        paths = (certificate, key) if client_ca is None else (certificate, key, client_ca)
        self._files = ChangingFiles(*paths)
        try:
            self._take()
        except OSError as error:
            got = f"{', '.join(map(str, paths))} ({error})"
            param = f"{part}.tls_certificate"
            raise InvalidRequestError("readable PEM files that belong together", got, param=param) from error

    def look(self) -> None:
        """Take what the files say, if it is new and can be used."""
        if not self._files.have_changed():
            return
        try:
            self._take()
        except OSError as error:
            log.error("%s: the new files of TLS cannot be used, the old ones stay in force: %s", self._part, error)
        else:
            log.info("%s: new files of TLS are in force for new connections", self._part)

    def _take(self) -> None:
        """Raises: OSError: they cannot be read or, as `ssl.SSLError`, used; nothing has changed."""
        pem = Pem(*self._files.contents)
        self.context, self.pem = pem.context(), pem


def certificates_of(part: str, settings: EdgeSettings, client_ca: Path | None = None) -> Certificates | None:
    """Those of a port; None: it speaks plaintext. Raises: InvalidRequestError: they cannot be read or used."""
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    return Certificates(part, settings.tls_certificate, settings.tls_key, client_ca)


@contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """Path of a file that lies on no disk."""
    with os.fdopen(os.memfd_create("pem"), "wb", buffering=0) as file:
        file.write(content)
        yield f"/proc/self/fd/{file.fileno()}"
