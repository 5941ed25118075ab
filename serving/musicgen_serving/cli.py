"""`musicgen serve` and `musicgen hash-key`, discovered by the `musicgen` command through package entry points.

Owns command-line options and console output. Imports Ray only when it is needed.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, get_args

from musicgen.config import WeightDtype

SERVE = """\
Serve models over HTTP and gRPC, on this machine or on a Ray cluster.

All settings live in one file (--config). The options below cover common cases and override it; an environment
variable such as MUSICGEN_LIMITS__MAX_DURATION_S=60 overrides both.

examples:
  the bundled demo model, for local clients only
    musicgen serve
  two models, on other ports
    musicgen serve --model melody --model small --http-port 8080 --grpc-port 9090
  write all settings with their defaults, then serve with them
    musicgen serve --print-config > service.yaml
    musicgen serve --config service.yaml
  convert the settings to a config file for `serve deploy`
    musicgen serve --config service.yaml --print-serve-config > serve.yaml
"""


class ServeCommand:
    """`musicgen serve`."""

    name = "serve"
    help = "serve models over HTTP and gRPC"
    description = SERVE

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--config", type=Path, metavar="FILE", help="YAML settings file")
        add("--model", action="append", metavar="NAME", help="model to serve; repeatable (default: demo)")
        add("--weights", choices=get_args(WeightDtype), help="weight data type of all models")
        add("--device", metavar="NAME", help="cpu or cuda, for all models (default: cuda on a machine with a GPU)")
        add("--host", metavar="ADDRESS", help="listen address of both protocols (default: 127.0.0.1)")
        add("--http-port", type=int, metavar="PORT", help="HTTP port (default: 8000)")
        add("--grpc-port", type=int, metavar="PORT", help="gRPC port (default: 9000); 0 disables gRPC")
        add("--ray-address", metavar="ADDRESS", help="existing Ray cluster (default: start a local one)")
        add("--check-config", action="store_true", help="check the settings and the files that they name, and exit")
        add("--print-config", action="store_true", help="print the settings as YAML and exit")
        add("--print-serve-config", action="store_true", help="print a `serve deploy` config and exit")

    @staticmethod
    def run(values: dict[str, Any]) -> int:
        """Serve until interrupted. Returns the exit code.

        Raises:
            InvalidRequestError: invalid settings. StartError: a component could not be started.
        """
        import yaml

        from musicgen_serving.settings import load_settings

        settings = load_settings(_merged(values))
        if values["print_config"]:
            print(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False), end="")
            return 0
        if values["check_config"]:
            from musicgen_serving.cluster import check

            check(settings)
            print("the settings are valid, the ports free, and tenants, certificates and usage file usable")
            return 0
        if values["print_serve_config"]:
            from musicgen_serving.serve_config import to_serve_config, to_yaml

            print(to_yaml(to_serve_config(settings)), end="")
            return 0
        return _serve(settings)


class HashKeyCommand:
    """`musicgen hash-key`."""

    name = "hash-key"
    help = "generate an API key, or hash an existing one, for the service's tenants file"
    description = (
        "Print the value for a tenant's `key_sha256`. Without --stdin, a new key is generated and printed first: give "
        "it to the tenant; it is not stored anywhere."
    )

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--stdin", action="store_true", help="hash a key read from standard input")

    @staticmethod
    def run(values: dict[str, Any]) -> int:
        from musicgen_serving.tenancy import hash_key, new_key

        key = sys.stdin.readline().strip() if values["stdin"] else new_key()
        if not values["stdin"]:
            print(f"key:        {key}")
        print(f"key_sha256: {hash_key(key)}")
        return 0


def _merged(values: dict[str, Any]) -> dict[str, Any]:
    """The file's settings, overridden by the command-line options."""
    from musicgen_serving.settings import read_settings

    path = values["config"]
    merged: dict[str, Any] = {"access": {"open": True}} if path is None else read_settings(path)
    if values["model"]:
        merged["models"] = [{"name": _served_name(name), "source": name} for name in values["model"]]
    typed = {name: values[name] for name in ("weights", "device") if values[name] is not None}
    if typed:
        merged["models"] = [{**model, **typed} for model in merged.get("models", [{}])]
    for section, names in {"http": ("host", "http_port"), "grpc": ("host", "grpc_port")}.items():
        for name in names:
            if values[name] is not None:
                merged.setdefault(section, {})[name.rpartition("_")[2]] = values[name]
    if values["ray_address"] is not None:
        merged["ray_address"] = values["ray_address"]
    return merged


def _served_name(source: str) -> str:
    """`facebook/musicgen-small` → `musicgen-small`; a folder → its name."""
    return source.rstrip("/").rpartition("/")[2]


def _serve(settings: Any) -> int:
    interrupted = threading.Event()

    def stop(*_: object) -> None:
        interrupted.set()

    _fetch(settings)
    _say("starting Ray; the first components should be ready in about ten seconds")
    from musicgen_serving import cluster

    for name in ("ray", "ray.serve"):  # after the import, which sets Serve's
        logging.getLogger(name).setLevel(logging.ERROR)

    began = time.monotonic()
    shown: set[str] = set()

    def on_state(states: dict[str, str]) -> None:
        for name in [name for name, state in states.items() if state == "ready" and name not in shown]:
            shown.add(name)
            _say(f"{time.monotonic() - began:5.1f} s  {name} ready ({len(shown)} of {len(states)})")

    endpoints = cluster.start(settings, on_state)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    grpc = f", gRPC on {endpoints.grpc}" if endpoints.grpc else ""
    print(f"ready: HTTP on {endpoints.http} (docs: {endpoints.http}/docs){grpc}; Ctrl-C to drain and stop", flush=True)
    interrupted.wait()
    interrupted.clear()
    _say("draining: no new requests are accepted; press Ctrl-C again to stop immediately")
    last = -1

    def on_running(num_running: int) -> None:
        nonlocal last
        if num_running != last:
            _say(f"{num_running} requests still running")
            last = num_running
        if interrupted.is_set():
            raise KeyboardInterrupt

    try:
        cluster.drain(on_running, settings.drain_s)
    finally:
        cluster.stop(joined=settings.ray_address is not None)
    _say("stopped")
    return 0


def _fetch(settings: Any) -> None:
    """Download the models before starting anything, so that several processes do not download them at once.

    Raises: InvalidRequestError, WeightsError: an unknown model name, or files that cannot be obtained.
    """
    if settings.ray_address is not None:  # the models load on other machines
        return
    from musicgen.weights import hub

    for model in settings.models:
        hub.resolve(model.checkpoint)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
