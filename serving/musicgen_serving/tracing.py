"""OpenTelemetry spans of a request, across processes. Does nothing unless an endpoint is set.

A caller's W3C `traceparent` is the parent of the request's span; each call of a part takes the present span along, so
that what the part does is under it. No prompt, key or tenant is in any attribute.
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
        part: name of what runs here.
    Raises:
        MissingDependencyError: an endpoint, and the exporter is not installed.
    """
    if endpoint is None:
        return
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        install = "pip install 'musicgen-serve[tracing]'"
        raise MissingDependencyError(f"tracing: expected the OTLP exporter, got {error}; {install}") from error
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https"))
    provider = TracerProvider(resource=Resource.create({"service.name": f"musicgen-{part}"}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)


def present() -> str | None:
    """The `traceparent` of the present span, to take along; None if nobody traces."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier.get(_HEADER)


@contextmanager
def span(name: str, parent: str | None = None, **attributes: str | int | float) -> Iterator[None]:
    """What is done in this context is a span: under `parent` if there is one, else under the present span.

    Not around a `yield` of an asynchronous generator, whose parts run in other contexts: see `long_span`.
    """
    context = propagate.extract({_HEADER: parent}) if parent else None
    with trace.get_tracer(_TRACER).start_as_current_span(name, context, attributes=attributes):
        yield


@contextmanager
def long_span(name: str, parent: str | None = None, **attributes: str | int | float) -> Iterator[str | None]:
    """A span that is not made the present one. Gives its `traceparent`, for what belongs under it."""
    context = propagate.extract({_HEADER: parent}) if parent else None
    made = trace.get_tracer(_TRACER).start_span(name, context, attributes=attributes)
    carrier: dict[str, str] = {}
    propagate.inject(carrier, trace.set_span_in_context(made))
    try:
        yield carrier.get(_HEADER)
    finally:
        made.end()
