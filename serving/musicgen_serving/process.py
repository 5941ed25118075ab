"""Common setup of the service's processes. Does not import torch, which not every process needs."""

from __future__ import annotations

from musicgen_serving import inner_ports, logs, tracing
from musicgen_serving.settings import ObservabilitySettings

APP_NAME = "musicgen"
"""Name of the Serve application."""
GAUGES_S = 1.0
"""Interval at which replicas update their gauges."""


def set_up(part: str, observability: ObservabilitySettings) -> None:
    """Set up logging, tracing and internal ports.

    Args:
        part: name of the component, for logs and spans.
    """
    logs.set_up(observability.log_level, part)
    tracing.set_up(observability.otlp_endpoint, part)
    inner_ports.keep_to_this_machine()
