"""OpenTelemetry spans of a request, across processes. Inactive unless an endpoint is set.

A caller's W3C `traceparent` is the parent of the request's span; calls to components propagate the current span.
Attributes never contain prompts, keys or tenants.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import propagate, trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from musicgen.errors import MissingDependencyError

_TRACER = "musicgen"
_HEADER = "traceparent"


def set_up(endpoint: str | None, part: str) -> None:
    """Send this process's spans to an OTLP endpoint (gRPC).

    Args:
        part: name of the component.
    Raises:
        MissingDependencyError: an endpoint is set, but the exporter is not installed.
    """
    if endpoint is None:
        return
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        install = "pip install 'musicgen-serve[tracing]'"
        raise MissingDependencyError(f"tracing requires the OTLP exporter ({error}); {install}") from error
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https"))
    provider = TracerProvider(resource=Resource.create({"service.name": f"musicgen-{part}"}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)


def present() -> str | None:
    """The `traceparent` of the current span, for propagation; None if tracing is off."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier.get(_HEADER)


@contextmanager
def span(name: str, parent: str | None = None, **attributes: str | int | float) -> Iterator[None]:
    """Run this context in a span, under `parent` if given, else under the current span.

    Do not use it around a `yield` of an async generator, which may resume in another context: see `long_span`.
    """
    context = propagate.extract({_HEADER: parent}) if parent else None
    with trace.get_tracer(_TRACER).start_as_current_span(name, context, attributes=attributes):
        yield


@contextmanager
def long_span(name: str, parent: str | None = None, **attributes: str | int | float) -> Iterator[str | None]:
    """A span that does not become the current one. Yields its `traceparent`, for child spans."""
    context = propagate.extract({_HEADER: parent}) if parent else None
    made = trace.get_tracer(_TRACER).start_span(name, context, attributes=attributes)
    carrier: dict[str, str] = {}
    propagate.inject(carrier, trace.set_span_in_context(made))
    try:
        yield carrier.get(_HEADER)
    finally:
        made.end()
