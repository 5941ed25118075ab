"""Allowances: what is taken, what is refused and until when, and what comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limits.errors import StorageError
from musicgen_serving.quotas import Charge, Quotas, retry_after_s
from musicgen_serving.settings import TenantSettings

from musicgen.errors import InvalidRequestError, OverloadedError, QuotaExceededError

START = 1_700_000_040.0 // 86400 * 86400
"""The beginning of a day, hence of a minute."""


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


async def refused(quotas: Quotas, tenant: TenantSettings, audio_s: float) -> float | None:
    with pytest.raises(QuotaExceededError) as caught:
        await quotas.take(tenant, audio_s)
    return caught.value.retry_after_s


def test_no_limits_take_nothing() -> None:
    async def body() -> None:
        quotas = Quotas("memory://", Clock())
        for _ in range(100):
            assert await quotas.take(TenantSettings(name="a"), 1e6) == ()

    run(body())


def test_requests_a_minute_slide() -> None:
    async def body() -> None:
        clock, tenant = Clock(), TenantSettings(name="a", requests_per_minute=4)
        quotas = Quotas("memory://", clock)
        for _ in range(4):
            await quotas.take(tenant, 500.0)
        # Full: the next fits when a quarter of the four no longer counts, a quarter into the next minute.
        assert await refused(quotas, tenant, 1.0) == pytest.approx(75.0)
        clock.now += 60.0
        assert await refused(quotas, tenant, 1.0) == pytest.approx(15.0)
        clock.now += 14.9
        assert await refused(quotas, tenant, 1.0) == pytest.approx(0.1)
        clock.now += 0.1
        await quotas.take(tenant, 1.0)
        assert await refused(quotas, tenant, 1.0) == pytest.approx(15.0)
        clock.now += 120.0
        for _ in range(4):
            await quotas.take(tenant, 1.0)
        await refused(quotas, tenant, 1.0)

    run(body())


def test_audio_is_rounded_up_and_counted_by_tenant() -> None:
    async def body() -> None:
        quotas = Quotas("memory://", Clock())
        a, b = (TenantSettings(name=name, audio_s_per_minute=10) for name in "ab")
        await quotas.take(a, 9.01)
        assert await refused(quotas, a, 0.1) is not None
        await quotas.take(b, 10.0)

    run(body())


def test_a_request_above_the_whole_allowance_is_told_so() -> None:
    async def body() -> None:
        quotas = Quotas("memory://", Clock())
        tenant = TenantSettings(name="a", audio_s_per_minute=10)
        with pytest.raises(InvalidRequestError, match="10 seconds of audio per minute, got 11"):
            await quotas.take(tenant, 10.5)
        await quotas.take(tenant, 10.0)

    run(body())


@pytest.mark.parametrize("last", ["requests", "minute", "day"])
def test_nothing_is_taken_if_any_allowance_is_used_up(last: str) -> None:
    async def body() -> None:
        limits = {"requests": 100, "minute": 1000, "day": 1000} | {last: {"requests": 1}.get(last, 10)}
        tenant = TenantSettings(
            name="a",
            requests_per_minute=limits["requests"],
            audio_s_per_minute=limits["minute"],
            audio_s_per_day=limits["day"],
        )
        quotas = Quotas("memory://", Clock())
        await quotas.take(tenant, 10.0)
        before = dict(quotas._storage.storage)  # type: ignore[attr-defined]
        assert sorted(before.values()) == [1, 10, 10]
        for _ in range(5):
            await refused(quotas, tenant, 5.0)
        assert dict(quotas._storage.storage) == before  # type: ignore[attr-defined]

    run(body())


def test_what_others_took_between_check_and_charge_is_seen_and_all_is_put_back() -> None:
    async def body() -> None:
        quotas = Quotas("memory://", Clock())
        tenant = TenantSettings(name="a", requests_per_minute=5, audio_s_per_day=10)
        storage = quotas._storage
        real = storage.incr

        async def incr(key: str, expiry: int, amount: int = 1) -> int:
            if "audio" in key and amount == 8:
                await real(key, expiry, 5)  # another gatekeeper is quicker
            return await real(key, expiry, amount)

        storage.incr = incr  # type: ignore[method-assign]
        await refused(quotas, tenant, 8.0)
        assert sorted(storage.storage.values()) == [0, 5]  # type: ignore[attr-defined]

    run(body())


def test_what_was_not_made_comes_back_to_the_window_it_was_taken_from() -> None:
    async def body() -> None:
        clock = Clock()
        quotas = Quotas("memory://", clock)
        tenant = TenantSettings(name="a", audio_s_per_minute=30, requests_per_minute=2)
        charge = await quotas.take(tenant, 30.0)
        await quotas.give_back(charge, 20)
        second = await quotas.take(tenant, 20.0)
        assert await refused(quotas, tenant, 1.0) is not None  # two requests stay two requests
        clock.now += 90.0
        # Half of 30 of the minute before counts. Giving 20 of them back frees 10 now, not 20.
        await quotas.give_back(second, 20)
        assert await refused(quotas, tenant, 26.0) == pytest.approx(6.0)
        await quotas.take(tenant, 25.0)
        clock.now += 200.0
        await quotas.give_back(second, 20)  # long over: changes nothing
        await quotas.take(tenant, 30.0)
        await refused(quotas, tenant, 1.0)

    run(body())


def test_no_more_comes_back_than_was_taken() -> None:
    async def body() -> None:
        quotas = Quotas("memory://", Clock())
        tenant = TenantSettings(name="a", audio_s_per_minute=30)
        await quotas.take(tenant, 20.0)
        await quotas.give_back(await quotas.take(tenant, 10.0), 1000)
        assert await refused(quotas, tenant, 11.0) is not None
        await quotas.take(tenant, 10.0)

    run(body())


class Storage:
    """A storage that breaks after some calls."""

    def __init__(self, real: Any, num_calls: int) -> None:
        self.real, self.num_calls = real, num_calls

    async def _call(self, name: str, *args: Any, **kwargs: Any) -> int:
        self.num_calls -= 1
        if self.num_calls < 0:
            raise StorageError(OSError("redis://user:password@host"))
        return await getattr(self.real, name)(*args, **kwargs)

    async def get(self, key: str) -> int:
        return await self._call("get", key)

    async def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        return await self._call("incr", key, expiry, amount=amount)


@pytest.mark.parametrize("num_calls", [0, 1, 5])
def test_a_storage_that_does_not_answer_is_an_overload_and_tells_no_secret(
    num_calls: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        quotas = Quotas("memory://", Clock())
        quotas._storage = Storage(quotas._storage, num_calls)  # type: ignore[assignment]
        with pytest.raises(OverloadedError) as caught:
            await quotas.take(TenantSettings(name="a", audio_s_per_minute=9, requests_per_minute=9), 1.0)
        assert caught.value.retry_after_s is not None
        assert "password" not in str(caught.value) + caplog.text

    run(body())


@pytest.mark.parametrize("url", ["carrier-pigeon://x", "nothing", ""])
def test_an_unknown_storage_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequestError, match="storage"):
        Quotas(url)


@given(
    limit=st.integers(1, 50),
    cost=st.integers(1, 60),
    previous=st.integers(0, 60),
    current=st.integers(0, 60),
    share=st.floats(0, 0.999),
)
@settings(max_examples=300, deadline=None)
def test_the_quoted_retry_is_the_first_moment_that_fits(
    limit: int, cost: int, previous: int, current: int, share: float
) -> None:
    def counted(after: float) -> float:
        """What counts `after` periods from now, if nobody takes more."""
        at = share + after
        if at < 1:
            return previous * (1 - at) + current
        return max(0.0, current * (2 - at))

    wait = retry_after_s(limit, cost, previous, current, share, 1.0)
    if wait is None:
        assert cost > limit
        return
    assert counted(wait + 1e-9) + cost <= limit + 1e-6
    for part in (0.0, 0.5, 0.9, 0.999):
        assert wait < 1e-6 or counted(wait * part) + cost > limit - 1e-9


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12), st.integers(0, 12)), max_size=40))
@settings(max_examples=60, deadline=None)
def test_a_long_run_stays_below_the_allowance(steps: list[tuple[int, int, int]]) -> None:
    """In any run of takes and refunds, no window of a minute holds more than twice the limit (what was given back not
    counted), and no aligned one more than the limit."""

    async def body() -> None:
        clock, tenant = Clock(), TenantSettings(name="a", audio_s_per_minute=20)
        quotas = Quotas("memory://", clock)
        kept: list[tuple[float, int]] = []
        waits: list[float | None] = []
        for wait_s, cost, back in steps:
            clock.now += wait_s
            try:
                charge: Charge = await quotas.take(tenant, cost)
            except QuotaExceededError as error:
                waits.append(error.retry_after_s)
                continue
            await quotas.give_back(charge, min(back, cost))
            kept.append((clock.now, cost - min(back, cost)))
            for begin in (clock.now // 60 * 60, clock.now - 59.999):
                total = sum(cost for at, cost in kept if at >= begin)
                assert total <= (20 if begin % 60 == 0 else 40)
        assert all(wait_s is not None and 0 < wait_s <= 120 for wait_s in waits)

    run(body())
