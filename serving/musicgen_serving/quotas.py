"""Quotas of a tenant: requests per minute, audio-seconds per minute and per day.

Owns the counting and the retry delay. Independent of requests and queues. The concurrency limit is not enforced here:
the gatekeeper knows which requests are running.

Counters live in a storage of the `limits` library (memory, Redis). Its strategies are not used, because none of them
supports partial refunds, and its moving window keeps one record per unit of cost. This is a sliding-window counter over
the storage's two basic operations: time is divided into windows of one period, each with its own counter, and the usage
at a fraction `f` into the current window is `previous · (1 − f) + current`. A refund goes to the counter of the window
that was charged, so it frees exactly what was charged; a refund for a window that no longer counts has no effect.

Approximation: hits of the previous window count as if spread evenly over it.
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
"""Shorter waits count as zero, because of rounding."""


@dataclass(frozen=True, slots=True)
class Taken:
    """Amount charged to one window of one quota."""

    key: str
    period_s: int
    amount: int
    audio: bool


Charge = tuple[Taken, ...]
"""What one request was charged across its tenant's quotas. Set by `Quotas.take`."""


@dataclass(frozen=True, slots=True)
class _Allowance:
    limit: int
    period_s: int
    audio: bool

    def __str__(self) -> str:
        unit = "seconds of audio" if self.audio else "requests"
        return f"{self.limit} {unit} per {_PERIOD_NAMES[self.period_s]}"

    def key(self, tenant: str, index: int) -> str:
        """Does not include the limit, so that usage survives a change of the limit."""
        return f"musicgen/{'audio' if self.audio else 'requests'}/{self.period_s}/{tenant}/{index}"


class Quotas:
    """Charges and refunds quotas.

    Args:
        storage: storage URL, such as `memory://` or `redis://host:6379`.
        clock: seconds since the epoch; must agree between all users of the storage.

    Raises:
        InvalidRequestError: unknown storage type.
        MissingDependencyError: the storage's client is not installed.
    """

    def __init__(self, storage: str, clock: Callable[[], float] = time.time) -> None:
        self._storage = _open_storage(storage)
        self._clock = clock

    async def take(self, tenant: TenantSettings, audio_s: float) -> Charge:
        """Charge one request of `audio_s` seconds, rounded up, to all quotas of a tenant, or to none.

        Raises:
            QuotaExceededError: a quota is exhausted; `retry_after_s` is when this request would fit without further
                usage.
            InvalidRequestError: the request exceeds a whole quota, so that it would never fit.
            OverloadedError: the storage does not respond.
        """
        allowances = _allowances(tenant)
        taken: list[Taken] = []
        try:
            for allowance in allowances:
                await self._check(tenant.name, allowance, _cost(allowance, audio_s))
            for allowance in allowances:
                await self._take_one(tenant.name, allowance, _cost(allowance, audio_s), taken)
        except StorageError as error:
            log.error("quota storage unavailable: %s", type(error.storage_error).__name__)
            await self._put_back(taken)
            raise OverloadedError("quota storage is unavailable", retry_after_s=STORAGE_RETRY_S) from None
        except BaseException:
            await self._put_back(taken)
            raise
        return tuple(taken)

    async def give_back(self, charge: Charge, unused_s: int) -> None:
        """Refund whole seconds of audio that were charged but not generated; the request itself stays counted."""
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
        # Check again: another gatekeeper may have charged the same storage in the meantime.
        previous = await self._storage.get(allowance.key(tenant, index - 1))
        _judge(allowance, cost, previous, current - cost, share)

    async def _put_back(self, taken: list[Taken]) -> None:
        try:
            for part in taken:
                await self._storage.incr(part.key, 2 * part.period_s + 60, amount=-part.amount)
        except StorageError as error:
            log.error("quota refund failed: %s", type(error.storage_error).__name__)

    def _window(self, allowance: _Allowance) -> tuple[int, float]:
        """Index of the current window, and the elapsed fraction of it."""
        share, index = math.modf(self._clock() / allowance.period_s)
        return int(index), share


def retry_after_s(limit: int, cost: int, previous: int, current: int, share: float, period_s: float) -> float | None:
    """Seconds until `cost` fits under `limit` without further usage; 0: now; None: never.

    Solves `previous · (1 − f) + current + cost ≤ limit` for `f` in this window or, if there is no solution, in the next
    one, with `current` as its previous count.
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
        raise InvalidRequestError(f"at most the quota of {allowance}", f"{cost}", "request less", param="duration_s")
    if wait_s > _TOLERANCE_S:
        raise QuotaExceededError(f"quota of {allowance} exceeded; retry in {math.ceil(wait_s)} s", retry_after_s=wait_s)


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
            raise MissingDependencyError(f"storage {scheme} requires its client, e.g. pip install redis") from error
        raise InvalidRequestError(
            "a storage URL such as memory:// or redis://host:6379", scheme, param="access.limits_storage"
        ) from None
    assert isinstance(storage, Storage)
    return storage
