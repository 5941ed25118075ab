"""Replicas that are killed, and callers that leave, on a cluster: nobody hears it, and nothing is left behind."""

from __future__ import annotations

import random

import numpy as np
import pytest
from musicgen_serving.client import Retries, connect
from serving.cluster.conftest import PROMPT, SEED, Running

from benchmarks import chaos_cluster
from benchmarks.cancel_cells import run_cell
from benchmarks.cancel_types import PHASES, PROTOCOLS
from benchmarks.cancel_victim import WAYS
from benchmarks.reset_proxy import ResetProxy

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's: what it warns of is not ours
PATIENT = Retries(max_attempts=100, first_backoff_s=0.1, max_backoff_s=0.5)
ONCE = Retries(max_attempts=1)
DECODE = next(phase for phase in PHASES if phase.name == "decode")


def _stream_through(service: Running, protocol: str, kind: str, retries: Retries, request_id: str) -> None:
    """Stream a piece while every replica of a kind is killed once; it must be the undisturbed one."""
    options = {"seed": SEED, "duration_s": 8.0}
    with connect(service.url(protocol)) as client:
        wanted = client.generate(PROMPT, **options).samples
    service.inside.delay("lm.step=0.02")
    victims = chaos_cluster.replica_pids(kind)
    parts = []
    with connect(service.url(protocol), retries=retries, timeout_s=120) as client:
        for chunk in client.stream(PROMPT, request_id=request_id, **options):
            parts.append(chunk.samples)
            if len(parts) == 2:
                for pid in victims:
                    chaos_cluster.kill(pid)
                service.inside.delay("")
    assert np.array_equal(np.concatenate(parts, axis=-1), wanted)
    chaos_cluster.wait_whole(kind, len(victims), victims)


@pytest.mark.parametrize("kind", ["LanguageModel", pytest.param("CodecDecoder", marks=pytest.mark.slow)])
def test_a_stream_goes_on_when_every_replica_of_a_part_is_killed(service: Running, kind: str) -> None:
    _stream_through(service, "grpc", kind, ONCE, f"killed-{kind}")


@pytest.mark.parametrize(
    ("protocol", "kind"),
    [("http", "HttpIngress"), pytest.param("grpc", "GrpcIngress", marks=pytest.mark.slow)],
)
def test_a_client_goes_on_when_its_ingress_is_killed_and_the_engine_lets_go(
    service: Running, protocol: str, kind: str
) -> None:
    before = service.inside.load()
    _stream_through(service, protocol, kind, PATIENT, f"resumed-{kind}")
    service.inside.wait_at_rest()
    after = service.inside.load()
    # The undisturbed piece and the resumed one finished; what the dead ingress had asked for ended too, either way.
    assert after.num_accepted - before.num_accepted == 3
    assert after.num_cancelled + after.num_finished - before.num_cancelled - before.num_finished == 3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_its_caller_leaves_does_not_go_on(service: Running, way: str, protocol: str) -> None:
    with ResetProxy() as proxy:
        cell = run_cell(service.inside, way, DECODE, protocol, 2, proxy, random.Random(f"{way} {protocol}"))
    assert cell.num_lost == 0, cell.reasons
    assert cell.num_hits >= 2
