"""How many replicas a deployment should have, from the load that each reports. Runs in Serve's controller, many times a
second: nothing but arithmetic. Serve applies the bounds and the delays."""

from __future__ import annotations

import math
from typing import Any

LOAD = "load"
"""The name under which replicas report their load: decode frames, or calls."""


class ByLoad:
    """Aims at `target_load` a replica.

    Args:
        target_load: in the unit in which the replicas report.
    """

    def __init__(self, target_load: float) -> None:
        self._target_load = target_load

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Serve's policy: `AutoscalingContext` → (replicas, state)."""
        loads = (context.aggregated_metrics or {}).get(LOAD, {})
        if not loads:  # no replica has reported yet
            return context.target_num_replicas, {}
        # Replicas that have just started have not reported: what is known is shared out over all.
        return max(1, math.ceil(sum(loads.values()) / self._target_load)), {}
