"""How many replicas a load asks for, and how soon Serve is told to see it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from musicgen_serving.app import _deployment
from musicgen_serving.autoscaling import LOAD, ByLoad
from musicgen_serving.settings import ReplicaSettings, ServeSettings


@pytest.mark.parametrize(
    ("loads", "expected"), [([0.0], 1), ([600.0], 1), ([601.0], 2), ([500.0, 800.0], 3), ([0.0, 0.0, 10.0], 1)]
)
def test_the_load_of_all_replicas_is_shared_out(loads: list[float], expected: int) -> None:
    metrics = {LOAD: {f"replica-{i}": load for i, load in enumerate(loads)}}
    context = SimpleNamespace(aggregated_metrics=metrics, target_num_replicas=7)
    assert ByLoad(600.0)(context) == (expected, {})


def test_nothing_changes_before_anyone_has_reported() -> None:
    assert ByLoad(600.0)(SimpleNamespace(aggregated_metrics=None, target_num_replicas=7)) == (7, {})


def test_a_load_is_seen_within_seconds() -> None:
    how = ReplicaSettings(min_replicas=1, max_replicas=3, upscale_delay_s=2.0, downscale_delay_s=9.0)
    made = _deployment(type("Part", (), {}), "Part", how, ServeSettings())
    scaling = made._deployment_config.autoscaling_config
    assert scaling is not None
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 3)
    assert (scaling.upscale_delay_s, scaling.downscale_delay_s) == (2.0, 9.0)
    assert scaling.look_back_period_s < 15  # Serve's own 30 s let a load go unseen for 20
