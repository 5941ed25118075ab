"""`musicgen serve` and `musicgen hash-key`: found by the command `musicgen` through the entry points of its package.

Owns what can be typed and what is said meanwhile. Imports Ray only when it is needed.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

SERVE = """\
Serve models over HTTP and gRPC, on this machine or on a Ray cluster.

Everything that can be set is in one file (--config); the options here are for the first steps, and go before it. An
environment variable such as MUSICGEN_LIMITS__MAX_DURATION_S=60 goes before both.

examples:
  the model that comes along, for everybody on this machine
    musicgen serve
  two models, on other ports
    musicgen serve --model melody --model small --http-port 8080 --grpc-port 9090
  what can be set, with its defaults; then serve with it
    musicgen serve --print-config > service.yaml
    musicgen serve --config service.yaml
  the same as a file for `serve deploy`
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
        add("--config", type=Path, metavar="FILE", help="YAML file with the settings")
        add("--model", action="append", metavar="NAME", help="model to serve; may be repeated (default: demo)")
        add("--weights", choices=("float32", "bfloat16", "int8", "int4"), help="of the models named with --model")
        add("--device", metavar="NAME", help="of the models named with --model, such as cpu or cuda")
        add("--host", metavar="ADDRESS", help="where both protocols listen (default: 127.0.0.1, this machine only)")
        add("--http-port", type=int, metavar="PORT", help="default: 8000")
        add("--grpc-port", type=int, metavar="PORT", help="default: 9000; 0 turns gRPC off")
        add("--ray-address", metavar="ADDRESS", help="cluster to join (default: one of its own)")
        add("--print-config", action="store_true", help="print the settings as YAML and stop")
        add("--print-serve-config", action="store_true", help="print the file for `serve deploy` and stop")

    @staticmethod
    def run(values: dict[str, Any]) -> int:
        """Serve until interrupted. Returns the exit code.

        Raises:
            InvalidRequestError: invalid settings. StartError: a part could not be started.
        """
        import yaml

        from musicgen_serving.settings import load_settings

        settings = load_settings(_merged(values))
        if values["print_config"]:
            print(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False), end="")
            return 0
        if values["print_serve_config"]:
            from musicgen_serving.serve_config import to_serve_config, to_yaml

            print(to_yaml(to_serve_config(settings)), end="")
            return 0
        return _serve(settings)


class HashKeyCommand:
    """`musicgen hash-key`."""

    name = "hash-key"
    help = "make an API key, or hash one, for the service's list of tenants"
    description = (
        "Print what belongs into `key_sha256` of a tenant. Without --stdin a new key is made and printed first: give "
        "it to the tenant, it is kept nowhere."
    )

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--stdin", action="store_true", help="hash the key that is read from standard input")

    @staticmethod
    def run(values: dict[str, Any]) -> int:
        from musicgen_serving.tenancy import hash_key, new_key

        key = sys.stdin.readline().strip() if values["stdin"] else new_key()
        if not values["stdin"]:
            print(f"key:        {key}")
        print(f"key_sha256: {hash_key(key)}")
        return 0


def _merged(values: dict[str, Any]) -> dict[str, Any]:
    """The file's settings, with what was typed in their place."""
    from musicgen_serving.settings import read_settings

    path = values["config"]
    merged: dict[str, Any] = {"access": {"open": True}} if path is None else read_settings(path)
    if values["model"]:
        typed = {"weights": values["weights"], "device": values["device"]}
        extra = {name: value for name, value in typed.items() if value is not None}
        merged["models"] = [{"name": _served_name(name), "source": name, **extra} for name in values["model"]]
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
    _say("starting Ray; the first parts are ready after some ten seconds")
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
    print(f"ready: HTTP on {endpoints.http} (try {endpoints.http}/docs){grpc}; Ctrl-C drains and stops", flush=True)
    interrupted.wait()
    interrupted.clear()
    _say("draining: nothing more is taken in; Ctrl-C again stops at once")
    last = -1

    def on_running(num_running: int) -> None:
        nonlocal last
        if num_running != last:
            _say(f"{num_running} requests still run")
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
    """See that the models are here before anything is started, and not in several processes at once.

    Raises: InvalidRequestError, WeightsError: a name that nothing goes by, or files that cannot be had.
    """
    if settings.ray_address is not None:  # elsewhere
        return
    from musicgen.weights import hub

    for model in settings.models:
        hub.resolve(model.checkpoint)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
