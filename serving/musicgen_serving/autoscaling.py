"""Autoscaling policy: number of replicas from the load that each reports. Runs in Serve's controller, many times a
second, so it is pure arithmetic. Serve applies bounds and delays."""

from __future__ import annotations

import math
from typing import Any

LOAD = "load"
"""Metric name under which replicas report their load: queued frames, or calls."""


class ByLoad:
    """Targets a load of `target_load` per replica.

    Args:
        target_load: in the unit that the replicas report.
    """

    def __init__(self, target_load: float) -> None:
        self._target_load = target_load

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Serve's policy: `AutoscalingContext` → (replicas, state)."""
        loads = (context.aggregated_metrics or {}).get(LOAD, {})
        if not loads:  # no replica has reported yet
            return context.target_num_replicas, {}
        # Newly started replicas have not reported yet; the known load is spread over all.
        return max(1, math.ceil(sum(loads.values()) / self._target_load)), {}
