"""What the service tells of itself: log lines, spans, the simulated player, counters."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import logging
from collections.abc import Iterator

import pytest
from musicgen_serving import logs, tracing
from musicgen_serving.metrics import METRICS
from musicgen_serving.player import Player
from musicgen_serving.request_metrics import RequestMetrics
from musicgen_serving.types import GenerationEnd, PieceReport
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from serving.in_process import ListRecorder

from musicgen.types import FinishReason

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Iterator[InMemorySpanExporter]:
    exporter.clear()
    yield exporter
    exporter.clear()


def by_name(spans: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in spans.get_finished_spans()}


def test_spans_of_tasks_and_of_other_processes_hang_under_the_callers(spans: InMemorySpanExporter) -> None:
    async def call() -> None:
        with tracing.span("call"):
            taken_along = tracing.present()
        with tracing.long_span("remote", taken_along) as inner, tracing.span("inside", inner):
            pass

    async def request() -> None:
        with tracing.span("request", PARENT, request_id="r"):
            await asyncio.gather(*(asyncio.create_task(call()) for _ in range(1)))

    asyncio.run(request())
    found = by_name(spans)
    chain = ["request", "call", "remote", "inside"]
    assert {format(span.context.trace_id, "032x") for span in found.values()} == {PARENT[3:35]}
    assert format(found["request"].parent.span_id, "016x") == PARENT[36:52]
    for above, below in itertools.pairwise(chain):
        assert found[below].parent.span_id == found[above].context.span_id


def test_a_broken_traceparent_begins_a_new_trace(spans: InMemorySpanExporter) -> None:
    with tracing.span("request", "00-nonsense"):
        assert tracing.present() is not None
    assert by_name(spans)["request"].parent is None


def test_a_log_line_is_json_with_the_requests_id_and_no_more_than_was_said() -> None:
    logger, sink = logging.getLogger("musicgen_serving.test"), io.StringIO()
    handler = logging.StreamHandler(sink)
    handler.setFormatter(logs.JsonFormatter("http"))
    logger.addHandler(handler)
    logger.setLevel("INFO")
    try:
        logger.info("admitted", extra={"request_id": "r\n1", "audio_s": 2.5, "api_key": "secret"})
    finally:
        logger.removeHandler(handler)
    (line,) = sink.getvalue().splitlines()
    parsed = json.loads(line)
    assert parsed["request_id"] == "r\n1"
    assert (parsed["part"], parsed["message"], parsed["audio_s"]) == ("http", "admitted", 2.5)
    assert "secret" not in line


@pytest.mark.parametrize(
    ("arrivals", "underrun_s", "num_underruns"),
    [
        ([(1.0, 1.0), (1.5, 1.0)], 0.0, 0),  # the second comes before the first is over
        ([(1.0, 1.0), (2.0, 1.0)], 0.0, 0),  # just in time
        ([(1.0, 1.0), (2.75, 1.0)], 0.75, 1),
        ([(1.0, 0.25), (1.5, 0.25), (2.0, 0.5)], 0.0, 0),  # waits for half a second before it begins
        ([(1.0, 0.5), (2.0, 0.25), (2.25, 0.25), (5.0, 1.0)], 0.75 + 2.25, 2),  # and again after it ran dry
    ],
)
def test_the_player_hears_what_a_listener_would(
    arrivals: list[tuple[float, float]], underrun_s: float, num_underruns: int
) -> None:
    player = Player(0.5)
    for index, (now, audio_s) in enumerate(arrivals):
        player.receive(now, audio_s, last=index == len(arrivals) - 1)
    assert (player.underrun_s, player.num_underruns) == (pytest.approx(underrun_s), num_underruns)


def test_the_last_audio_is_played_however_short() -> None:
    player = Player(0.5)
    player.receive(0.0, 0.1, last=True)
    assert player.underrun_s == 0.0


def test_a_request_is_counted_once_under_names_of_the_table() -> None:
    recorder, now = ListRecorder(), [10.0]
    metrics = RequestMetrics(recorder, 0.5, lambda: now[0])
    metrics.rejected("demo", "free", "overloaded")
    request = metrics.admitted("r", "demo", "free", is_stream=True)
    for at, last in ((10.25, False), (11.0, False), (14.25, True)):
        now[0] = at
        request.audio(0, 1.0, last=last)
    report = PieceReport(0, 96000, "", 150, 0.1, 0.2, 3.0, 2)
    request.ended(GenerationEnd("r", FinishReason.FINISHED, (report,), 3.0), 3.0, None, 50.0)
    assert recorder.counted == {
        ("requests_rejected", "overloaded"): 1,
        ("requests_admitted", ""): 1,
        ("requests_finished", "finished"): 1,
        ("audio_seconds", ""): 3.0,
        ("failovers", ""): 2,
        ("underrun_seconds", ""): pytest.approx(2.0),
        ("streams_played", ""): 1,
    }
    assert recorder.observed["time_to_first_audio_seconds"] == [0.25]
    assert recorder.observed["real_time_factor"] == [pytest.approx(3.2 / 3)], "no wait, and no slow reader"
    assert {name for name, _ in recorder.counted} | set(recorder.observed) <= set(METRICS)
