"""What every process of the service does first. Without torch: a process that computes nothing need not load it."""

from __future__ import annotations

from musicgen_serving import inner_ports, logs, tracing
from musicgen_serving.settings import ObservabilitySettings

APP_NAME = "musicgen"
"""Of the one application in Serve."""
GAUGES_S = 1.0
"""Between two looks of a replica at its own load."""


def set_up(part: str, observability: ObservabilitySettings) -> None:
    """Logs, spans, ports.

    Args:
        part: what runs here, for logs and spans.
    """
    logs.set_up(observability.log_level, part)
    tracing.set_up(observability.otlp_endpoint, part)
    inner_ports.keep_to_this_machine()
