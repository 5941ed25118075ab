"""Allowances of a tenant: requests a minute, audio-seconds a minute and a day.

Owns what is counted and when it is worth trying again. Knows no request and no queue. How many requests a tenant has
at the same time is not counted here: the gatekeeper knows which run.

Counters live in a storage of the `limits` library (memory, Redis). Its strategies are not used, because none of them
can take back a part of a hit, and its moving window keeps one record for each unit of a hit's cost. Here it is the
sliding-window counter over the storage's two plain operations: time is cut into windows of one period, each with its
own counter, and what counts at a moment that is a share `f` into its window is `previous · (1 − f) + current`. A
refund goes to the counter of the window that was charged, so it frees exactly what was taken and nothing else; one
for a window that is over and no longer counts changes nothing.

The approximation: hits of the previous window count as if they had been spread evenly over it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from limits.aio.storage import Storage
from limits.errors import ConfigurationError, StorageError
from limits.storage import storage_from_string

from musicgen.errors import InvalidRequestError, MissingDependencyError, OverloadedError, QuotaExceededError
from musicgen_serving.settings import TenantSettings

log = logging.getLogger(__name__)

STORAGE_RETRY_S = 2.0
_MINUTE, _DAY = 60, 86400
_PERIOD_NAMES = {_MINUTE: "minute", _DAY: "day"}
_TOLERANCE_S = 1e-3
"""A wait below this is none: the clock and the windows are rounded numbers."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What was taken from one window of one allowance."""

    key: str
    period_s: int
    amount: int
    audio: bool


Charge = tuple[Taken, ...]
"""What one request took from its tenant's allowances. Set by `Quotas.take`."""


@dataclass(frozen=True, slots=True)
class _Allowance:
    limit: int
    period_s: int
    audio: bool

    def __str__(self) -> str:
        unit = "seconds of audio" if self.audio else "requests"
        return f"{self.limit} {unit} a {_PERIOD_NAMES[self.period_s]}"

    def key(self, tenant: str, index: int) -> str:
        """The limit is not part of it: what was taken stays counted when the limit changes."""
        return f"musicgen/{'audio' if self.audio else 'requests'}/{self.period_s}/{tenant}/{index}"


class Quotas:
    """Takes from allowances and gives back.

    Args:
        storage: URL of the storage, such as `memory://` or `redis://host:6379`.
        clock: seconds of the epoch; shared by all that share the storage.

    Raises:
        InvalidRequestError: an unknown kind of storage.
        MissingDependencyError: the storage's client is not installed.
    """

    def __init__(self, storage: str, clock: Callable[[], float] = time.time) -> None:
        self._storage = _open_storage(storage)
        self._clock = clock

    async def take(self, tenant: TenantSettings, audio_s: float) -> Charge:
        """Take one request of `audio_s` seconds, rounded up, from all allowances of a tenant, or nothing from any.

        Raises:
            QuotaExceededError: one is used up; `retry_after_s` is when this request would fit if nobody takes more,
                None if it is larger than the whole allowance.
            OverloadedError: the storage does not answer.
        """
        allowances = _allowances(tenant)
        taken: list[Taken] = []
        try:
            for allowance in allowances:
                await self._check(tenant.name, allowance, _cost(allowance, audio_s))
            for allowance in allowances:
                await self._take_one(tenant.name, allowance, _cost(allowance, audio_s), taken)
        except StorageError as error:
            log.error("allowances cannot be counted: %s", type(error.storage_error).__name__)
            await self._put_back(taken)
            raise OverloadedError("allowances cannot be counted now", retry_after_s=STORAGE_RETRY_S) from None
        except BaseException:
            await self._put_back(taken)
            raise
        return tuple(taken)

    async def give_back(self, charge: Charge, unused_s: int) -> None:
        """Give back whole seconds of audio that were taken and not made; the request itself stays counted."""
        back = [Taken(t.key, t.period_s, min(unused_s, t.amount), True) for t in charge if t.audio]
        await self._put_back([taken for taken in back if taken.amount > 0])

    async def _check(self, tenant: str, allowance: _Allowance, cost: int) -> None:
        index, share = self._window(allowance)
        current = await self._storage.get(allowance.key(tenant, index))
        previous = await self._storage.get(allowance.key(tenant, index - 1))
        _judge(allowance, cost, previous, current, share)

    async def _take_one(self, tenant: str, allowance: _Allowance, cost: int, taken: list[Taken]) -> None:
        index, share = self._window(allowance)
        key, period_s = allowance.key(tenant, index), allowance.period_s
        current = await self._storage.incr(key, 2 * period_s + 60, amount=cost)
        taken.append(Taken(key, period_s, cost, allowance.audio))
        # Judged again: between the check and now another gatekeeper may have taken from the same storage.
        previous = await self._storage.get(allowance.key(tenant, index - 1))
        _judge(allowance, cost, previous, current - cost, share)

    async def _put_back(self, taken: list[Taken]) -> None:
        try:
            for part in taken:
                await self._storage.incr(part.key, 2 * part.period_s + 60, amount=-part.amount)
        except StorageError as error:
            log.error("an allowance could not be given back: %s", type(error.storage_error).__name__)

    def _window(self, allowance: _Allowance) -> tuple[int, float]:
        """Number of the window that the clock is in, and the share of it that is over."""
        share, index = math.modf(self._clock() / allowance.period_s)
        return int(index), share


def retry_after_s(limit: int, cost: int, previous: int, current: int, share: float, period_s: float) -> float | None:
    """Seconds until `cost` fits under `limit` if nobody takes more; 0: now; None: never.

    Solves `previous · (1 − f) + current + cost ≤ limit` for `f` in this window, and, if there is no solution, with
    `current` as the previous count in the next.
    """
    if cost > limit:
        return None
    room = limit - cost
    if room >= current:
        fits_at = 1.0 - (room - current) / previous if previous > 0 else 0.0
        return max(0.0, fits_at - share) * period_s
    return (1.0 - share + max(0.0, 1.0 - room / current)) * period_s


def _judge(allowance: _Allowance, cost: int, previous: int, current: int, share: float) -> None:
    wait_s = retry_after_s(allowance.limit, cost, max(0, previous), max(0, current), share, allowance.period_s)
    if wait_s is None:
        raise QuotaExceededError(f"expected at most {allowance}, got a request for {cost}; ask for less")
    if wait_s > _TOLERANCE_S:
        raise QuotaExceededError(
            f"the allowance of {allowance} is used up; retry in {math.ceil(wait_s)} s", retry_after_s=wait_s
        )


def _allowances(tenant: TenantSettings) -> list[_Allowance]:
    limits = (
        (tenant.requests_per_minute, _MINUTE, False),
        (tenant.audio_s_per_minute, _MINUTE, True),
        (tenant.audio_s_per_day, _DAY, True),
    )
    return [_Allowance(limit, period_s, audio) for limit, period_s, audio in limits if limit is not None]


def _cost(allowance: _Allowance, audio_s: float) -> int:
    return math.ceil(audio_s) if allowance.audio else 1


def _open_storage(url: str) -> Storage:
    try:
        options = {"implementation": "redispy"} if url.startswith("redis") else {}
        storage = storage_from_string(f"async+{url.removeprefix('async+')}", wrap_exceptions=True, **options)
    except ConfigurationError as error:
        scheme = url.partition("://")[0]
        if "prerequisite" in str(error):
            raise MissingDependencyError(f"storage {scheme} needs its client; `pip install redis` for Redis") from error
        raise InvalidRequestError(
            "a storage such as memory:// or redis://host:6379", scheme, param="access.limits_storage"
        ) from None
    assert isinstance(storage, Storage)
    return storage
