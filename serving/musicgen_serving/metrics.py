"""The service's Prometheus metrics, in one table, and Ray as the place where they go.

Labels are the model, the tenant's class and a reason: never a tenant, a request or a prompt. Every replica writes to
Ray's metrics; each node's agent offers all of its node's to Prometheus, and `/metrics` of the service shows those of
the node that it runs on.
"""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import ray
from ray.util import metrics

PREFIX = "musicgen_"
RAY_PREFIX = "ray_"
"""Ray puts this before every name."""

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120)
_RATIO = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1, 1.2, 1.5, 2, 4, 10)
_STEP_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
_BY_TENANT = ("model", "tenant_class")


@dataclass(frozen=True, slots=True)
class Metric:
    """One line of the table."""

    kind: Literal["counter", "gauge", "histogram"]
    description: str
    labels: tuple[str, ...]
    boundaries: tuple[float, ...] = ()


METRICS: Mapping[str, Metric] = {
    "requests_admitted": Metric("counter", "requests admitted", _BY_TENANT),
    "requests_finished": Metric("counter", "admitted requests that completed successfully", (*_BY_TENANT, "reason")),
    "requests_cancelled": Metric("counter", "admitted requests that were cancelled", (*_BY_TENANT, "reason")),
    "requests_failed": Metric("counter", "admitted requests that failed", (*_BY_TENANT, "reason")),
    "requests_rejected": Metric("counter", "requests rejected, at any stage", (*_BY_TENANT, "reason")),
    "audio_seconds": Metric("counter", "seconds of audio delivered to clients", _BY_TENANT),
    "failovers": Metric("counter", "failovers to another replica", _BY_TENANT),
    "underrun_seconds": Metric("counter", "seconds of buffer underrun at a simulated real-time player", _BY_TENANT),
    "streams_played": Metric(
        "counter", "finished streams, by whether playback was gapless", (*_BY_TENANT, "continuous")
    ),
    "time_to_first_audio_seconds": Metric("histogram", "time from admission to the first audio", _BY_TENANT, _SECONDS),
    "queue_seconds": Metric("histogram", "time from engine submission to start of prefill", _BY_TENANT, _SECONDS),
    "real_time_factor": Metric(
        "histogram", "engine time per second of audio (prefill + decode, excluding queueing)", _BY_TENANT, _RATIO
    ),
    "step_seconds": Metric("gauge", "running mean of the engine's step time", ("model", "replica")),
    "batch_pieces": Metric("gauge", "pieces in the running batch", ("model", "replica")),
    "waiting_pieces": Metric("gauge", "pieces queued at the engine", ("model", "replica")),
    "queued_frames": Metric("gauge", "frames the engine has yet to decode", ("model", "replica")),
    "kv_pages_used": Metric("gauge", "KV-cache pages in use", ("model", "replica")),
    "kv_pages": Metric("gauge", "KV-cache pages in total", ("model", "replica")),
    "codec_calls": Metric("gauge", "decode calls in flight", ("model", "replica")),
    "usage_lines_lost": Metric("gauge", "usage records lost since the gatekeeper started", ()),
    "tenants_stale": Metric("gauge", "1 while the tenants file is invalid and the previous list is still in use", ()),
    "quoted_wait_seconds": Metric("gauge", "estimated queue time of a new request", ("model",)),
}


class RayRecorder:
    """Hands numbers to Ray's metrics; implements `request_metrics.Recorder`."""

    def __init__(self) -> None:
        self._made: dict[str, metrics.Counter | metrics.Gauge | metrics.Histogram] = {}

    def count(self, name: str, amount: float, labels: Mapping[str, str]) -> None:
        if amount > 0:
            metric = self._metric(name)
            assert isinstance(metric, metrics.Counter)
            metric.inc(amount, tags=dict(labels))

    def observe(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        metric = self._metric(name)
        assert isinstance(metric, metrics.Histogram)
        metric.observe(max(value, 1e-9), tags=dict(labels))

    def set(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        """The present value of a gauge."""
        metric = self._metric(name)
        assert isinstance(metric, metrics.Gauge)
        metric.set(value, tags=dict(labels))

    def _metric(self, name: str) -> metrics.Counter | metrics.Gauge | metrics.Histogram:
        if name not in self._made:
            line, full = METRICS[name], PREFIX + name
            if line.kind == "histogram":
                made: metrics.Counter | metrics.Gauge | metrics.Histogram = metrics.Histogram(
                    full, line.description, boundaries=list(line.boundaries), tag_keys=line.labels
                )
            else:
                kind = metrics.Counter if line.kind == "counter" else metrics.Gauge
                made = kind(full, line.description, tag_keys=line.labels)
            self._made[name] = made
        return self._made[name]


async def node_metrics() -> bytes:
    """What this node's agent offers to Prometheus, as far as it is the service's: Prometheus' text format."""
    me = ray.get_runtime_context().get_node_id()
    (node,) = (node for node in await asyncio.to_thread(ray.nodes) if node["NodeID"] == me)
    text = await asyncio.to_thread(_fetch, f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics")
    ours = RAY_PREFIX + PREFIX
    lines = [line.replace(ours, PREFIX) for line in text.splitlines() if ours in line.split("{")[0]]
    return ("\n".join(lines) + "\n").encode()


def _fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        text: str = answer.read().decode()
        return text
