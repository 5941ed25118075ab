"""`python -m musicgen_serving.proto.generate`: generate the Python modules next to the .proto files.

Runs protoc, then patches its output. protoc derives import paths from the .proto package (`musicgen.v1`), which is a
different Python package here, so `musicgen_serving.proto.` is prepended; the name in descriptors and reflection stays
`musicgen/v1/…`. Also writes type stubs for the gRPC stubs, which protoc does not generate. Requires grpcio-tools;
nothing else imports this module.
"""

from __future__ import annotations

import argparse
import importlib.resources
import tempfile
from pathlib import Path

from google.protobuf import descriptor_pb2

ROOT = Path(__file__).resolve().parent
SOURCE = "musicgen/v1/music_service.proto"
_STEM = "musicgen/v1/music_service_pb2"
_STUB_TYPES = """\
from collections.abc import Awaitable
from typing import Any

import grpc
import grpc.aio

from musicgen_serving.proto.musicgen.v1 import music_service_pb2 as pb

class {service}Stub:
    def __init__(self, channel: grpc.Channel | grpc.aio.Channel) -> None: ...
{calls}
class {service}Servicer:
{methods}
def add_{service}Servicer_to_server(servicer: {service}Servicer, server: grpc.Server | grpc.aio.Server) -> None: ...
"""


def generate(out: Path = ROOT) -> list[Path]:
    """Write the modules of `SOURCE` under `out`, and return their paths.

    Raises:
        RuntimeError: protoc failed; see its output on stderr.
    """
    with tempfile.TemporaryDirectory() as scratch:
        descriptors = Path(scratch) / "descriptors"
        flags = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
        run_protoc(*flags, f"--descriptor_set_out={descriptors}")
        files = descriptor_pb2.FileDescriptorSet.FromString(descriptors.read_bytes())
    stubs = out / f"{_STEM}_grpc.py"
    before, after = "from musicgen.v1 import", "from musicgen_serving.proto.musicgen.v1 import"
    text = stubs.read_text()
    if text.count(before) != 1:
        raise RuntimeError(f"expected one line {before!r} in {stubs.name}, got {text.count(before)}")
    stubs.write_text(text.replace(before, after))
    messages = out / f"{_STEM}.pyi"
    messages.write_text(messages.read_text().replace("_Mapping]", "_Mapping[str, object]]"))  # for strict type checkers
    types = stubs.with_suffix(".pyi")
    types.write_text(_stub_types(files.file[0].service[0]))
    return [out / f"{_STEM}.py", messages, stubs, types]


def run_protoc(*flags: str) -> None:
    """Run protoc on `SOURCE`.

    Raises:
        RuntimeError: it failed; see its output on stderr.
    """
    from grpc_tools import protoc  # type: ignore[import-untyped]

    included = importlib.resources.files("grpc_tools") / "_proto"
    code = protoc.main(["protoc", f"--proto_path={ROOT}", f"--proto_path={included}", *flags, SOURCE])
    if code != 0:
        raise RuntimeError(f"protoc exited with status {code}")


def _stub_types(service: descriptor_pb2.ServiceDescriptorProto) -> str:
    """The .pyi of the stubs: client calls typed as in grpc-stubs, servicer methods as in `grpc.aio`."""
    calls, methods = [], []
    for method in service.method:
        request, response = (f"pb.{name.rpartition('.')[2]}" for name in (method.input_type, method.output_type))
        kind = "UnaryStream" if method.server_streaming else "UnaryUnary"
        answer = "None" if method.server_streaming else response
        calls.append(f"    {method.name}: grpc.{kind}MultiCallable[{request}, {response}]\n")
        methods.append(
            f"    def {method.name}(\n"
            f"        self, request: {request}, context: grpc.aio.ServicerContext[Any, Any]\n"
            f"    ) -> Awaitable[{answer}]: ...\n"
        )
    return _STUB_TYPES.format(service=service.name, calls="".join(calls), methods="".join(methods))


def main() -> None:
    """Write the modules and print their paths."""
    parser = argparse.ArgumentParser(description="Generate the Python modules of the .proto files.")
    parser.add_argument("--out", type=Path, default=ROOT, help="output folder (default: next to the .proto files)")
    for path in generate(parser.parse_args().out):
        print(path)


if __name__ == "__main__":
    main()
