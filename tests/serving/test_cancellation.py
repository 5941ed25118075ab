"""The cancellation matrix in one process: the real edges, engine and gatekeeper; nothing lost, pages back at once."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
from musicgen_serving import delay_points
from musicgen_serving.deployments.language_model import LanguageModel, Load
from musicgen_serving.errors import NotFoundError
from musicgen_serving.settings import ModelSettings, ServeSettings
from serving.in_process import InProcess

from benchmarks.cancel_cells import run_cell
from benchmarks.cancel_report import row
from benchmarks.cancel_types import MAX_REQUESTS, PHASES, PROTOCOLS, Phase
from benchmarks.cancel_victim import WAYS
from benchmarks.reset_proxy import ResetProxy
from musicgen.engine.sequence import Sequence
from musicgen.engine.thread import Listener


class Local:
    """The service of this process, as the matrix sees it."""

    def __init__(self, service: InProcess) -> None:
        self.service, self.http, self.grpc = service, service.http_url, service.grpc_url
        self.release_steps: list[int] = []
        """For each request that was let go of, the engine's steps from the wish until its pages were free."""
        self._watch(service.engine)

    def _watch(self, engine: LanguageModel) -> None:
        thread, runner = engine._engine._thread, engine._runner
        core = thread._core
        abort, end = thread.abort, core._end
        wished: dict[str, int] = {}

        def watched_abort(request_id: str, listener: Listener | None = None) -> None:
            wished[request_id] = runner.num_steps
            abort(request_id, listener)

        def watched_end(sequence: Sequence, *how: Any) -> None:
            end(sequence, *how)
            steps = wished.pop(sequence.request.request_id, None)
            if steps is not None:
                self.release_steps.append(runner.num_steps - steps)

        thread.abort, core._end = watched_abort, watched_end  # type: ignore[method-assign]

    def load(self) -> Load:
        return self.service.run(self.service.engine.load())

    def state(self, request_id: str) -> str:
        try:
            return self.service.run(self.service.gatekeeper.status("anonymous", request_id)).state
        except NotFoundError:
            return "unknown"

    def delay(self, text: str) -> None:
        os.environ[delay_points.VARIABLE] = text


@pytest.fixture(scope="module")
def local() -> Iterator[Local]:
    model = ModelSettings(kv_memory_bytes=256 * 2**20, num_threads=1, max_requests=MAX_REQUESTS)
    service = InProcess(ServeSettings(models=[model], admission={"max_wait_s": 3600.0}))
    yield Local(service)
    os.environ.pop(delay_points.VARIABLE, None)
    service.close()


@pytest.fixture(scope="module")
def proxy() -> Iterator[ResetProxy]:
    with ResetProxy() as proxy:
        yield proxy


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
@pytest.mark.parametrize("per_cell", [1, pytest.param(32, marks=pytest.mark.slow)])
def test_nothing_goes_on_after_its_end(
    local: Local, proxy: ResetProxy, way: str, phase: Phase, protocol: str, per_cell: int
) -> None:
    cell = run_cell(local, way, phase, protocol, per_cell, proxy, random.Random(f"{way} {phase.name} {protocol}"))
    print(row(cell), "steps until the pages were back, by count:", max(local.release_steps, default=0))
    assert cell.num_lost == 0, cell.reasons
    assert max(local.release_steps, default=0) <= 2
    assert cell.num_hits >= per_cell
    local.service.run(local.service.gatekeeper.check())
