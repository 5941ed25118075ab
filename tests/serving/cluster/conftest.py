"""One service on a Ray cluster of its own, for all tests of the session that need one: two language models, both edges.

It starts within a minute or two on two cores and needs some 8 GB of memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from musicgen_serving import delay_points

from musicgen import MusicGen

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own code uses what pydantic deprecates
    from musicgen_serving.cluster import Endpoints

    from benchmarks import chaos_cluster
    from benchmarks.cancellation import RayService

DURATION_S = 3.0
PROMPT, SEED = "happy rock", 7


@dataclass(frozen=True)
class Running:
    """The service and where its files are."""

    endpoints: Endpoints
    inside: RayService
    usage_file: Path
    tenants_file: Path

    def url(self, protocol: str) -> str:
        return self.endpoints.http if protocol == "http" else str(self.endpoints.grpc)


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("service")
    delays, usage_file, tenants_file = folder / "delays", folder / "usage.jsonl", folder / "tenants.yaml"
    tenants_file.write_text("[]")
    access = {"open": True, "usage_file": usage_file, "tenants_file": tenants_file}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(delay_points.VARIABLE, f"@{delays}")
        environment.setenv("RAY_ADDRESS", "127.0.0.1:1")  # somebody else's cluster: not to be joined
        how = chaos_cluster.settings({"LanguageModel": 2}, access=access)
        with chaos_cluster.running(how) as endpoints:
            yield Running(endpoints, RayService(endpoints, delays), usage_file, tenants_file)


@pytest.fixture
def service(running: Running) -> Iterator[Running]:
    """The service, at rest before and after each test, nothing delayed."""
    running.inside.delay("")
    yield running
    running.inside.delay("")
    running.inside.wait_at_rest()


@pytest.fixture(scope="session")
def wanted() -> torch.Tensor:
    """`[C, N]`: what the API in this process makes."""
    model = MusicGen.get_pretrained("demo")
    model.set_generation_params(duration=DURATION_S)
    wav = model.generate([PROMPT], seed=[SEED])
    model.close()
    assert isinstance(wav, torch.Tensor)
    return wav[0]
