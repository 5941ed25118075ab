"""An engine on its thread, for asyncio and for threads: streams side by side, all ways of leaving and of ending.

The runner waits for a permit before each step, so a test decides how far the engine is when something happens.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import numpy as np
import pytest
import torch
from engine.fakes import FakeRunner, Listener, VirtualClock, alone, codes_request, new_core

from musicgen.engine.async_engine import AsyncEngine, AsyncStream
from musicgen.engine.batch import ScheduledBatch
from musicgen.engine.core import EngineCore
from musicgen.engine.thread import EngineStream, EngineThread, get_stats
from musicgen.errors import EngineDeadError, InvalidRequestError
from musicgen.types import ChunkPolicy, CodeChunk, CodesRequest, EndOfRequest, EngineEvent, EngineRequest, FinishReason

PATIENCE_S = 20.0
EVERY_FRAME = ChunkPolicy(first_frames=1, max_frames=1)
ALL = 10_000
"""Permits for more steps than any test takes."""
T = TypeVar("T")


class GatedRunner(FakeRunner):
    """Runs a step for each permit."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__(1000, clock)
        self._changed = threading.Condition()
        self._num_permits = 0
        self._is_waiting = False

    def allow(self, num_steps: int = 1) -> None:
        with self._changed:
            self._num_permits += num_steps
            self._changed.notify_all()

    def wait_until_blocked(self) -> None:
        """Until a step is under way that has no permit: the engine answers nobody before it gets one."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._is_waiting and not self._num_permits, PATIENCE_S)

    def run(self, batch: ScheduledBatch) -> np.ndarray:
        with self._changed:
            self._is_waiting = True
            self._changed.notify_all()
            allowed = self._changed.wait_for(lambda: self._num_permits > 0, PATIENCE_S)
            assert allowed, "the test never let this step run"
            self._is_waiting = False
            self._num_permits -= 1
        return super().run(batch)


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """Every engine's thread has ended when its test has."""
    before = set(threading.enumerate())
    yield
    left = [t.name for t in threading.enumerate() if t not in before and t.name.startswith("musicgen-engine")]
    assert left == []


def gated() -> tuple[EngineCore, GatedRunner]:
    clock = VirtualClock()
    runner = GatedRunner(clock)
    return new_core(runner=runner, clock=clock), runner


def request(name: str, codes: CodesRequest, chunks: ChunkPolicy | None = EVERY_FRAME) -> EngineRequest:
    return EngineRequest(name, codes, chunks=chunks)


def run(main: Callable[[], Awaitable[T]]) -> T:
    """Run in an event loop of its own; a test that hangs fails."""

    async def bounded() -> T:
        return await asyncio.wait_for(main(), PATIENCE_S)

    return asyncio.run(bounded())


async def submit_all(engine: AsyncEngine, runner: GatedRunner, requests: list[EngineRequest]) -> list[AsyncStream]:
    """Requests are accepted between steps, so each comes with a permit for the step that may be under way."""
    streams = []
    for each in requests:
        runner.allow()
        streams.append(await engine.submit(each))
    return streams


async def collect(stream: AsyncStream) -> tuple[torch.Tensor, EndOfRequest]:
    listener = Listener()
    async with stream:
        async for event in stream:
            listener.take([event])
    return listener.codes(stream.request_id), listener.ends[stream.request_id]


# --- asyncio ---


def test_two_streams_at_once_give_what_each_gives_alone() -> None:
    first, second = codes_request(20, seed=1), codes_request(33, seed=2, text=2)

    async def main() -> None:
        engine = AsyncEngine(new_core())
        try:
            streams = [await engine.submit(request("a", first)), await engine.submit(request("b", second))]
            (a, end_a), (b, end_b) = await asyncio.gather(*map(collect, streams))
        finally:
            await engine.close()
        assert torch.equal(a, alone(first))
        assert torch.equal(b, alone(second))
        assert end_a.reason is end_b.reason is FinishReason.FINISHED
        assert (end_a.usage.num_frames, end_b.usage.num_frames) == (20, 33)

    run(main)


def test_streams_advance_together() -> None:
    """The second stream's first frames come before the first stream's last ones."""

    async def main() -> list[str]:
        core, runner = gated()
        engine = AsyncEngine(core)
        order: list[str] = []

        async def listen(stream: AsyncStream) -> None:
            async with stream:
                async for event in stream:
                    order.append(event.request_id)

        streams = await submit_all(engine, runner, [request(name, codes_request(20)) for name in "ab"])
        runner.allow(ALL)
        await asyncio.gather(*map(listen, streams))
        await engine.close()
        return order

    order = run(main)
    assert order.index("b") < len(order) - 1 - order[::-1].index("a")


def test_leaving_a_stream_cancels_its_request_alone() -> None:
    async def main() -> None:
        core, runner = gated()
        engine = AsyncEngine(core)
        wanted = [request("stays", codes_request(30, seed=1)), request("leaves", codes_request(40, seed=2))]
        stays, leaves = await submit_all(engine, runner, wanted)
        runner.allow(8)
        async with leaves:
            async for event in leaves:
                assert isinstance(event, CodeChunk)
                break
        runner.allow(ALL)
        codes, end = await collect(stays)
        stats = await engine.stats()
        await engine.close()
        assert torch.equal(codes, alone(codes_request(30, seed=1)))
        assert end.reason is FinishReason.FINISHED
        assert (stats.num_cancelled, stats.num_finished, stats.pages_held) == (1, 1, 0)

    run(main)


def test_an_error_in_the_consumer_cancels_its_request() -> None:
    async def main() -> None:
        core, runner = gated()
        engine = AsyncEngine(core)
        stream = await engine.submit(request("a", codes_request(40)))
        runner.allow(6)

        async def fail() -> None:
            async with stream:
                async for _ in stream:
                    raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail()
        runner.allow(1)
        stats = await engine.stats()
        await engine.close()
        assert (stats.num_cancelled, stats.num_running, stats.pages_held) == (1, 0, 0)

    run(main)


def test_a_stream_read_to_its_end_is_not_cancelled_afterwards() -> None:
    async def main() -> None:
        engine = AsyncEngine(new_core())
        stream = await engine.submit(request("a", codes_request(20)))
        await collect(stream)
        again = await engine.submit(request("a", codes_request(20)))  # the id is free; a late abort would hit this one
        _, end = await collect(again)
        await engine.close()
        assert end.reason is FinishReason.FINISHED

    run(main)


def test_cancelled_while_waiting_for_acceptance() -> None:
    """The engine is in a step, so nobody can be accepted; the one who gives up meanwhile leaves nothing behind."""

    async def main() -> None:
        core, runner = gated()
        engine = AsyncEngine(core)
        first = await engine.submit(request("first", codes_request(20, seed=1)))
        await asyncio.to_thread(runner.wait_until_blocked)
        pending = asyncio.create_task(engine.submit(request("gives-up", codes_request(40, seed=2))))
        await asyncio.sleep(0)  # it has asked, and waits
        pending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pending
        runner.allow(ALL)
        codes, _ = await collect(first)
        stats = await engine.stats()
        await engine.close()
        assert torch.equal(codes, alone(codes_request(20, seed=1)))
        assert (stats.num_accepted, stats.num_finished, stats.num_cancelled) == (2, 1, 1)
        assert stats.pages_held == 0

    run(main)


def test_a_refused_request_harms_nobody() -> None:
    async def main() -> None:
        engine = AsyncEngine(new_core())
        stream = await engine.submit(request("a", codes_request(40)))
        with pytest.raises(InvalidRequestError):
            await engine.submit(request("bad", codes_request(windows=[])))
        _, end = await collect(stream)
        engine.check_health()
        await engine.close()
        assert end.reason is FinishReason.FINISHED

    run(main)


def test_giving_up_a_refused_request_leaves_the_one_with_its_id_alone() -> None:
    async def main() -> None:
        core, runner = gated()
        engine = AsyncEngine(core)
        first = await engine.submit(request("same", codes_request(20)))
        await asyncio.to_thread(runner.wait_until_blocked)
        pending = asyncio.create_task(engine.submit(request("same", codes_request(40))))
        await asyncio.sleep(0)
        pending.cancel()
        runner.allow(ALL)
        with pytest.raises(asyncio.CancelledError):
            await pending
        _, end = await collect(first)
        await engine.close()
        assert end.reason is FinishReason.FINISHED

    run(main)


def test_a_stream_left_after_its_end_leaves_the_next_one_with_its_id_alone() -> None:
    async def main() -> None:
        engine = AsyncEngine(new_core())
        async with await engine.submit(request("same", codes_request(20))):
            while (await engine.stats()).num_finished == 0:
                pass
            again = await engine.submit(request("same", codes_request(40)))
        _, end = await collect(again)
        await engine.close()
        assert end.reason is FinishReason.FINISHED

    run(main)


def test_abort_by_id_ends_the_stream_as_cancelled() -> None:
    async def main() -> EndOfRequest:
        core, runner = gated()
        engine = AsyncEngine(core)
        stream = await engine.submit(request("a", codes_request(40)))
        runner.allow(10)
        engine.abort("a")
        engine.abort("never was")
        runner.allow(1)
        async with stream:
            events = [event async for event in stream]
        await engine.close()
        assert isinstance(events[-1], EndOfRequest)
        return events[-1]

    assert run(main).reason is FinishReason.CANCELLED


def test_close_cancels_open_streams_and_refuses_new_ones() -> None:
    async def main() -> None:
        core, runner = gated()
        engine = AsyncEngine(core)
        streams = await submit_all(engine, runner, [request(name, codes_request(40)) for name in "ab"])
        await asyncio.to_thread(runner.wait_until_blocked)
        closing = asyncio.create_task(engine.close())
        await asyncio.to_thread(_wait_until, lambda: not engine._thread._calls.empty())
        runner.allow(1)
        ends = [(await collect_end(stream))[1] for stream in streams]
        await closing
        assert [end.reason for end in ends] == [FinishReason.CANCELLED] * 2
        with pytest.raises(EngineDeadError, match="closed"):
            await engine.submit(request("late", codes_request(20)))
        await engine.close()  # twice is once

    run(main)


def test_a_failure_reaches_every_stream_and_the_health_check() -> None:
    async def main() -> None:
        core, runner = gated()
        engine = AsyncEngine(core)
        streams = await submit_all(engine, runner, [request(name, codes_request(40)) for name in "abc"])
        engine.check_health()
        runner.allow(6)
        assert isinstance(await anext(aiter(streams[0])), CodeChunk)  # all is well at first
        runner.fail = True
        runner.allow(1)
        for stream in streams:
            _, end = await collect_end(stream)
            assert end.reason is FinishReason.FAILED
            assert end.error is not None
        with pytest.raises(EngineDeadError, match="told to fail"):
            engine.check_health()
        with pytest.raises(EngineDeadError):
            await engine.submit(request("late", codes_request(20)))
        with pytest.raises(EngineDeadError):
            await engine.stats()
        await engine.close()

    run(main)


async def collect_end(stream: AsyncStream) -> tuple[int, EndOfRequest]:
    """Number of chunks left, and the terminal event."""
    async with stream:
        events = [event async for event in stream]
    assert isinstance(events[-1], EndOfRequest)
    return len(events) - 1, events[-1]


def test_a_loop_that_closes_early_stops_nobody_else() -> None:
    """Its streams' events have nowhere to go; the engine goes on for another loop."""
    core, runner = gated()
    engine = AsyncEngine(core)

    async def leaves_it() -> None:
        await engine.submit(request("left behind", codes_request(20, seed=1)))

    async def another_loop() -> torch.Tensor:
        runner.allow(ALL)
        stream = await engine.submit(request("later", codes_request(40, seed=2)))
        codes, _ = await collect(stream)
        await engine.close()
        return codes

    asyncio.run(leaves_it())
    runner.allow(1)  # the step that was under way when the loop closed
    assert torch.equal(run(another_loop), alone(codes_request(40, seed=2)))


# --- threads ---


def test_streams_of_two_threads() -> None:
    thread = EngineThread(new_core())
    wanted = {"a": codes_request(20, seed=1), "b": codes_request(33, seed=2)}
    results: dict[str, torch.Tensor] = {}

    def work(name: str) -> None:
        listener = Listener()
        with EngineStream(thread, request(name, wanted[name])) as stream:
            listener.take(list(stream))
        results[name] = listener.codes(name)

    workers = [threading.Thread(target=work, args=(name,)) for name in wanted]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE_S)
    thread.close()
    assert results.keys() == wanted.keys()
    assert all(torch.equal(results[name], alone(codes)) for name, codes in wanted.items())


def test_closing_a_stream_frees_its_pages() -> None:
    core, runner = gated()
    thread = EngineThread(core)
    with EngineStream(thread, request("a", codes_request(40))) as stream:
        runner.allow(8)
        assert isinstance(next(iter(stream)), CodeChunk)
    runner.allow(1)
    stats = get_stats(thread)
    thread.close()
    assert (stats.num_cancelled, stats.num_running, stats.pages_held) == (1, 0, 0)


def test_closing_the_engine_ends_every_stream_and_answers_every_call() -> None:
    core, runner = gated()
    thread = EngineThread(core)
    stream = EngineStream(thread, request("a", codes_request(40)))
    runner.wait_until_blocked()
    # Asked while a step is under way: the first call closes the engine, so the second must be refused, not forgotten.
    closer = threading.Thread(target=thread.close)
    closer.start()
    answers: list[BaseException | None] = []
    answered = threading.Event()

    def done(_: object, error: BaseException | None) -> None:
        answers.append(error)
        answered.set()

    _wait_until(lambda: not thread._calls.empty())
    thread.submit(request("late", codes_request(20)), lambda _: None, done)
    runner.allow(1)
    closer.join(PATIENCE_S)
    assert answered.wait(PATIENCE_S)
    assert isinstance(answers[0], EngineDeadError)
    *_, end = stream
    assert isinstance(end, EndOfRequest)
    assert end.reason is FinishReason.CANCELLED


def test_an_error_that_the_core_does_not_know_is_a_failure_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody waits for a thread that has ended."""
    core, runner = gated()
    thread = EngineThread(core)
    accepted: queue.SimpleQueue[object] = queue.SimpleQueue()
    events: queue.SimpleQueue[list[EngineEvent]] = queue.SimpleQueue()
    thread.submit(request("a", codes_request(40)), events.put, lambda _, error: accepted.put(error))
    assert accepted.get(timeout=PATIENCE_S) is None

    def broken() -> list[EngineEvent]:
        raise KeyError("nobody expects it")

    monkeypatch.setattr(core, "step", broken)
    runner.allow(1_000)
    (end,) = events.get(timeout=PATIENCE_S)[-1:]
    assert isinstance(end, EndOfRequest)
    assert "KeyError: 'nobody expects it'" in str(end.error)
    thread.close()
    assert "KeyError: 'nobody expects it'" in str(thread.failure)
    with pytest.raises(EngineDeadError, match="KeyError: 'nobody expects it'"):
        EngineStream(thread, request("late", codes_request(20)))
    assert "nobody expects it" in caplog.text


def test_a_failure_reaches_every_thread() -> None:
    core, runner = gated()
    thread = EngineThread(core)
    accepted: queue.SimpleQueue[object] = queue.SimpleQueue()
    events: queue.SimpleQueue[EngineEvent] = queue.SimpleQueue()
    for name in ("a", "b"):
        thread.submit(
            request(name, codes_request(40)),
            lambda own: [events.put(event) for event in own],  # type: ignore[func-returns-value]
            lambda _, error: accepted.put(error),
        )
    runner.allow(1)  # the first step may begin before the second request is taken in
    assert [accepted.get(timeout=PATIENCE_S) for _ in "ab"] == [None, None]
    runner.fail = True
    runner.allow(1)
    ends: dict[str, EndOfRequest] = {}
    while len(ends) < 2:
        event = events.get(timeout=PATIENCE_S)
        if isinstance(event, EndOfRequest):
            ends[event.request_id] = event
    thread.close()
    assert {end.reason for end in ends.values()} == {FinishReason.FAILED}
    assert thread.failure is not None
    with pytest.raises(EngineDeadError, match="told to fail"):
        EngineStream(thread, request("late", codes_request(20)))


def test_requests_from_many_threads_that_come_and_go() -> None:
    """Every one ends once, the ledger balances and all pages are free."""
    core = new_core(max_requests=4)
    thread = EngineThread(core)
    reasons: list[FinishReason] = []

    def work(index: int) -> None:
        for turn in range(5):
            codes = codes_request(10 + index, seed=turn)
            with EngineStream(thread, request(f"{index}-{turn}", codes)) as stream:
                for event in stream:
                    if isinstance(event, EndOfRequest):
                        reasons.append(event.reason)
                    elif (index + turn) % 3 == 0:
                        break

    workers = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE_S)
    stats = get_stats(thread)
    thread.close()
    core.check()
    num_left = sum((index + turn) % 3 == 0 for index in range(8) for turn in range(5))
    assert reasons.count(FinishReason.FINISHED) == len(reasons) == 40 - num_left
    assert stats.num_accepted == 40 == stats.num_finished + stats.num_cancelled
    assert stats.pages_held == 0


def _wait_until(condition: Callable[[], bool]) -> None:
    waiter = threading.Event()
    for _ in range(int(PATIENCE_S / 0.001)):
        if condition():
            return
        waiter.wait(0.001)
    raise AssertionError("waited in vain")


def test_a_listener_that_fails_harms_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    core, runner = gated()
    runner.allow(ALL)
    thread = EngineThread(core)

    def fail(*_: object) -> None:
        raise RuntimeError("a listener's own mistake")

    try:
        thread.submit(request("bad", codes_request(5)), fail, fail)
        events = list(EngineStream(thread, request("good", codes_request(5))))
        assert isinstance(events[-1], EndOfRequest)
        assert events[-1].reason is FinishReason.FINISHED
        assert thread.failure is None
        assert "an engine listener raised an exception" in caplog.text
    finally:
        thread.close()


def test_a_stream_that_has_ended_gives_nothing_more() -> None:
    core, runner = gated()
    runner.allow(ALL)
    thread = EngineThread(core)
    try:
        stream = EngineStream(thread, request("a", codes_request(5)))
        assert list(stream)
        assert list(stream) == []
    finally:
        thread.close()
