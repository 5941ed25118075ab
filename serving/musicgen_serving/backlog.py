"""Estimated queue time of a request for one model, and its rejection if that is too long.

Owns the throughput estimate and the queue model. Sees only admissions, ends and progress of requests, not the state of
the engines; independent of quotas.

**Queue model.** A model with `R` replicas decodes up to `S = R · max_requests` pieces concurrently, at a total of `v`
seconds of audio per second; with all slots busy, each advances at `v / S`. While fewer than `S` pieces are present, the
next one starts at once: its wait is 0 regardless of size, so an idle service rejects nobody. Otherwise slots belong to
the requests that have delivered audio, then to the oldest of the others; the rest wait. The wait of a new request is
the time until its slot is free: the earliest slot goes to the first waiting request, and so on, through all requests
ahead of the new one.

**Requests ahead.** The engines schedule by priority, then by weighted fair share between tenants, then FIFO within a
tenant. Ahead of a new request of tenant `t` are therefore: all waiting requests with a lower priority number; all
waiting requests of `t`, `W_t` seconds in total; and for every other tenant `u` of the same priority its fair share in
the meantime: the requests that start within its first `W_t · w_u / w_t` seconds, hence always its oldest, which was
there before. A tenant that floods the service waits for itself; any other tenant waits for one request of the flood.

**Guaranteed admission.** A tenant whose next piece is within its weighted share of the slots is admitted however long
the wait: the excess is due to others. The shares add up to the slots, so this cannot accumulate. While others exceed
`BURST` times their share, `BURST` times its own share counts: requests come in bursts, and the engines have extra slots
for this case.

**Throughput** `v` is delivered seconds of audio per second, as a ratio of two exponentially decaying sums, so that
bursty delivery averages out. There are two such ratios. One covers all time with work. The other covers only time with
all slots busy, and starts from the configured speed. `v` is the larger one: a few concurrent pieces never show what a
full batch can do, so they may raise the estimate but not lower it. Time without any engine counts for neither: a
recovered engine is as fast as before.

This is an estimate: pieces advance only roughly at the same rate, guidance and long windows cost more, and audio
reaches the client after the language model has generated it. The engines' own queue limits are the backstop.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from musicgen.config import BURST
from musicgen.engine.fairness import burst
from musicgen.errors import OverloadedError

MEMORY_S = 30.0
"""Time constant of the throughput estimate."""
PRIOR_S = 5.0
"""Weight of the initial speed, as seconds of work."""
MIN_RETRY_S, MAX_RETRY_S = 1.0, 60.0
"""Bounds of the retry delay. By the upper one, the throughput estimate will have been refreshed."""


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """Current load of one model."""

    wait_s: float
    """Estimated queue time of a request behind all others."""
    speed: float
    """Seconds of audio per second, over all replicas."""
    left_s: float
    """Seconds of audio that admitted requests have yet to deliver."""
    num_requests: int


@dataclass(slots=True)
class _Work:
    """An admitted request that has not ended."""

    tenant: str
    weight: float
    priority: int
    audio_s: float
    num_pieces: int
    done_s: float = 0.0

    @property
    def left_s(self) -> float:
        return max(0.0, self.audio_s - self.done_s)


@dataclass(slots=True)
class _Ratio:
    """Seconds of audio over seconds of time, both decaying exponentially."""

    audio_s: float
    time_s: float

    def add(self, audio_s: float, time_s: float) -> None:
        keep = math.exp(-time_s / MEMORY_S)
        self.audio_s = self.audio_s * keep + audio_s
        self.time_s = self.time_s * keep + time_s

    @property
    def value(self) -> float:
        return self.audio_s / self.time_s


class Backlog:
    """The admitted, unfinished requests of one model.

    Args:
        num_replicas: language-model replicas.
        num_slots: pieces that a replica decodes concurrently.
        initial_speed: assumed throughput of one replica, in seconds of audio per second, until measured.
        max_wait_s: requests with a longer estimated wait are rejected.
        clock: seconds, monotonic.
    """

    def __init__(
        self, num_replicas: int, num_slots: int, initial_speed: float, max_wait_s: float, clock: Callable[[], float]
    ) -> None:
        self._num_replicas, self._num_slots, self._max_wait_s, self._clock = num_replicas, num_slots, max_wait_s, clock
        self._works: dict[str, _Work] = {}
        self._num_pieces = 0
        self._has_engine = True
        self._any = _Ratio(initial_speed * num_replicas * PRIOR_S, PRIOR_S)
        self._full = _Ratio(initial_speed * num_replicas * PRIOR_S, PRIOR_S)
        self._quotes: dict[tuple[str, float, int], float] = {}
        """Cache of quotes since the last event: under overload, the same tenants ask again and again."""
        self._since = clock()

    @property
    def speed(self) -> float:
        """Seconds of audio per second, over all replicas."""
        return max(self._any.value, self._full.value)

    def set_capacity(self, num_replicas: int) -> None:
        """Set the number of replicas; the throughput estimate scales with it. 0 counts as one replica that is being
        replaced."""
        self._pass_time()
        self._has_engine = num_replicas > 0
        num_replicas = max(1, num_replicas)
        for ratio in (self._any, self._full):
            ratio.audio_s *= num_replicas / self._num_replicas
        self._num_replicas = num_replicas

    def check(self, tenant: str, weight: float, priority: int) -> float:
        """Estimated seconds until decoding of a new request starts.

        Raises:
            OverloadedError: longer than `max_wait_s`, and the tenant has its share; with `retry_after_s`.
        """
        wait_s = self.quote(tenant, weight, priority)
        if wait_s > self._max_wait_s and not self._is_below_share(tenant, weight, priority):
            retry_after_s = min(MAX_RETRY_S, max(MIN_RETRY_S, wait_s - self._max_wait_s))
            raise OverloadedError(
                f"estimated queue time of {wait_s:.0f} s exceeds the limit of {self._max_wait_s:g} s; "
                f"retry in {math.ceil(retry_after_s)} s",
                retry_after_s=retry_after_s,
            )
        return wait_s

    def _is_below_share(self, tenant: str, weight: float, priority: int) -> bool:
        """Whether tenants of the same priority keep this one below its weighted share of the slots."""
        if any(work.priority < priority for work in self._works.values()):
            return False
        rivals = {w.tenant: w.weight for w in self._works.values() if w.priority == priority and w.tenant != tenant}
        num_pieces: Counter[str] = Counter()
        for work in self._works.values():
            num_pieces[work.tenant] += work.num_pieces
        per_weight = self._slots / (weight + math.fsum(rivals.values()))
        some_flood = any(num_pieces[rival] > burst(per_weight * rivals[rival]) for rival in rivals)
        share = (BURST if some_flood else 1.0) * per_weight * weight
        return bool(rivals) and num_pieces[tenant] + 1 <= share

    def quote(self, tenant: str, weight: float, priority: int) -> float:
        """Estimated seconds until decoding of a new request starts."""
        if self._num_pieces < self._slots:
            return 0.0
        key = tenant, weight, priority
        if key not in self._quotes:
            self._quotes[key] = self._new_quote(tenant, weight, priority)
        return self._quotes[key]

    def _new_quote(self, tenant: str, weight: float, priority: int) -> float:
        running, waiting = self._split()
        own_s = math.fsum(work.left_s for work in waiting if work.tenant == tenant and work.priority == priority)
        passed: dict[str, float] = {}
        ahead: list[_Work] = []
        for work in waiting:
            if work.priority > priority:
                continue
            if work.priority == priority and work.tenant != tenant:
                before_s = passed.get(work.tenant, 0.0)
                if before_s > own_s * work.weight / weight:
                    continue
                passed[work.tenant] = before_s + work.left_s
            ahead.append(work)
        return self._wait_s(running, ahead)

    def end_s(self, serial: str) -> float:
        """Estimated seconds until a request ends, if it is running and advances like the others."""
        work = self._works[serial]
        num_moving = max(work.num_pieces, min(self._num_pieces, self._slots))
        return work.left_s / work.num_pieces * num_moving / self.speed if self.speed > 0 else math.inf

    def load(self) -> ModelLoad:
        """Current load of the model."""
        full = self._num_pieces >= self._slots
        return ModelLoad(
            wait_s=self._wait_s(*self._split()) if full else 0.0,
            speed=self.speed,
            left_s=math.fsum(work.left_s for work in self._works.values()),
            num_requests=len(self._works),
        )

    def add(self, serial: str, tenant: str, weight: float, priority: int, audio_s: float, num_pieces: int = 1) -> None:
        """A request is admitted."""
        assert serial not in self._works
        self._pass_time()
        self._works[serial] = _Work(tenant, weight, priority, audio_s, num_pieces)
        self._num_pieces += num_pieces

    def progress(self, serial: str, done_s: float, counts: bool = True) -> None:
        """A request has delivered `done_s` seconds of audio so far.

        Args:
            counts: whether to use it for the throughput estimate; False for audio delivered at unknown times.
        """
        work = self._works[serial]
        made_s = done_s - work.done_s
        if made_s > 0:
            work.done_s = done_s
            self._pass_time(made_s if counts else 0.0)

    def remove(self, serial: str, done_s: float) -> None:
        """A request has ended after `done_s` seconds of audio."""
        self.progress(serial, done_s)
        self._pass_time()
        self._num_pieces -= self._works.pop(serial).num_pieces

    def withdraw(self, serial: str) -> None:
        """A request was not admitted after all."""
        self.remove(serial, 0.0)

    @property
    def _slots(self) -> int:
        return self._num_replicas * self._num_slots

    def _pass_time(self, made_s: float = 0.0) -> None:
        """Account for the time since the last event, in the state since then, and the audio delivered in it."""
        self._quotes.clear()
        now = self._clock()
        past_s, self._since = max(0.0, now - self._since), now
        if not self._has_engine and not made_s:
            return
        if self._works:
            self._any.add(made_s, past_s)
        if self._num_pieces >= self._slots:
            self._full.add(made_s, past_s)

    def _split(self) -> tuple[list[_Work], list[_Work]]:
        """Requests that hold slots, and waiting ones, in arrival order."""
        running = [work for work in self._works.values() if work.done_s > 0]
        free = self._slots - sum(work.num_pieces for work in running)
        waiting: list[_Work] = []
        for work in self._works.values():
            if work.done_s > 0:
                continue
            if free > 0:
                running.append(work)
                free -= work.num_pieces
            else:
                waiting.append(work)
        return running, waiting

    def _wait_s(self, running: Iterable[_Work], ahead: Iterable[_Work]) -> float:
        """Seconds until a slot is free after all of `ahead`; each slot advances at speed / slots."""
        free_at = [work.left_s / work.num_pieces for work in running for _ in range(work.num_pieces)]
        if len(free_at) < self._slots:
            return 0.0
        heapq.heapify(free_at)
        for _ in range(len(free_at) - self._slots):
            heapq.heappop(free_at)
        for work in ahead:
            piece_s = work.left_s / work.num_pieces
            for _ in range(work.num_pieces):
                heapq.heapreplace(free_at, free_at[0] + piece_s)
        return free_at[0] * self._slots / self.speed if self.speed > 0 else math.inf
