"""Certificates for tests of TLS, made by openssl, and a look at the one that a port shows."""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
RSA = ("-newkey", "rsa:2048", "-nodes")


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60)


def make_ca(folder: Path, name: str) -> None:
    openssl(
        folder, "req", "-x509", *EC, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}",
        "-days", "2",
    )  # fmt: skip


def make_certificate(folder: Path, name: str, kind: tuple[str, ...] = EC, ca: str = "ca") -> None:
    """NAME.pem and NAME.key, for localhost."""
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    openssl(folder, "req", *kind, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
    openssl(
        folder, "x509", "-req", "-in", f"{name}.csr", "-CA", f"{ca}.pem", "-CAkey", f"{ca}.key", "-CAcreateserial",
        "-out", f"{name}.pem", "-days", "2", "-extfile", "names",
    )  # fmt: skip


def make_certificates(folder: Path) -> Path:
    """ca, server and client, each NAME.pem and NAME.key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    make_ca(folder, "ca")
    for name in ("server", "client"):
        make_certificate(folder, name)
    return folder


def put(source: Path, target: Path) -> None:
    """Replace a file as a careful operator does: at once."""
    copy = shutil.copy(source, target.with_name("copy"))
    os.replace(copy, target)


def der(certificate: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(certificate.read_text())


async def shown(port: int, trusts: ssl.SSLContext, host: str = "localhost") -> bytes:
    """The certificate, in DER, that a new connection to this machine is shown. By an address no server is named."""
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusts, server_hostname=host)
    certificate: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()
    return certificate


async def until_shown(certificate: Path, port: int, trusts: ssl.SSLContext, host: str = "localhost") -> None:
    """Wait until new connections are shown this one."""
    async with asyncio.timeout(10):
        while await shown(port, trusts, host) != der(certificate):
            await asyncio.sleep(0.02)
