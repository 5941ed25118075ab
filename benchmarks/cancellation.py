"""The cancellation matrix: {cancel, deadline, reset} × {queued, prefill, decode, sending, last chunk} × {HTTP, gRPC}.

python -m benchmarks.cancellation --per-cell 32

Starts a service with one language model on its own Ray cluster and ends streams at random moments of each phase, until
every cell has enough hits. A request is lost if it continues after its cancellation at the client, the gatekeeper or
the language model. Over HTTP, a deadline is a client timeout. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import tempfile
import time
from dataclasses import asdict, fields
from pathlib import Path

from musicgen_serving import delay_points
from musicgen_serving.cluster import Endpoints
from musicgen_serving.deployments.language_model import Load

from benchmarks import chaos_cluster
from benchmarks.cancel_cells import run_cell
from benchmarks.cancel_report import merged, row, table
from benchmarks.cancel_types import MAX_REQUESTS, PHASES, PROTOCOLS, Cell
from benchmarks.cancel_victim import WAYS
from benchmarks.reset_proxy import ResetProxy


class RayService:
    """A service on a cluster, inspected through handles.

    Args:
        delays: the failpoint file that its replicas read.
    """

    def __init__(self, endpoints: Endpoints, delays: Path) -> None:
        assert endpoints.grpc is not None
        self.http, self.grpc, self._delays = endpoints.http, endpoints.grpc, delays
        self._engine, self._gatekeeper = chaos_cluster.handle("LanguageModel"), chaos_cluster.handle("Gatekeeper")

    def load(self) -> Load:
        """Sum over all language models."""
        loads = self._engine.broadcast("load").results(timeout_s=30)
        return Load(*(sum(getattr(load, field.name) for load in loads) for field in fields(Load)))

    def state(self, request_id: str) -> str:
        try:
            return str(self._gatekeeper.status.remote("anonymous", request_id).result(timeout_s=30).state)
        except Exception:  # unknown, or not admitted
            return "unknown"

    def wait_at_rest(self, timeout_s: float = 20.0) -> None:
        """Wait until no request is running and no page is held.

        Raises:
            TimeoutError: the service does not become idle.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            load, counts = self.load(), self._gatekeeper.counts.remote().result(timeout_s=30)
            if load.num_running == load.num_waiting == load.pages_held == counts.running == 0:
                self._gatekeeper.check.remote().result(timeout_s=30)
                return
            time.sleep(0.1)
        raise TimeoutError(f"the service is not idle after {timeout_s:g} s: {load}, {counts.running} running")

    def delay(self, text: str) -> None:
        new = self._delays.with_suffix(".new")
        new.write_text(text)
        new.replace(self._delays)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-cell", type=int, default=32)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--phases", nargs="+", choices=[p.name for p in PHASES], default=[p.name for p in PHASES])
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=PROTOCOLS)
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--json", type=Path, help="also append the JSON line to this file")
    parser.add_argument("--table", type=Path, help="run nothing; print the table of such a file")
    options = parser.parse_args()
    if options.table is not None:
        print(table(merged(options.table)))
        return 0
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    cells = _run(options)
    print(table(cells))
    line = json.dumps({"benchmark": "cancellation", "per_cell": options.per_cell, "cells": [asdict(c) for c in cells]})
    print(line)
    if options.json is not None:
        with options.json.open("a") as file:
            file.write(line + "\n")
    return int(any(cell.num_lost or cell.num_hits < options.per_cell for cell in cells))


def _run(options: argparse.Namespace) -> list[Cell]:
    rng = random.Random(options.seed)
    cells = []
    with tempfile.TemporaryDirectory() as folder, ResetProxy() as proxy:
        delays = Path(folder) / "delays"
        os.environ[delay_points.VARIABLE] = f"@{delays}"  # the replicas inherit it
        how = chaos_cluster.settings({}, model={"max_requests": MAX_REQUESTS})
        with chaos_cluster.running(how) as endpoints:
            service = RayService(endpoints, delays)
            for phase in (p for p in PHASES if p.name in options.phases):
                for way in options.ways:
                    for protocol in options.protocols:
                        began = time.monotonic()
                        cells.append(run_cell(service, way, phase, protocol, options.per_cell, proxy, rng))
                        took = f"{time.monotonic() - began:.1f} s"
                        print(row(cells[-1]), took, *cells[-1].reasons[:3], file=sys.stderr, flush=True)
    return cells


if __name__ == "__main__":
    sys.exit(main())
