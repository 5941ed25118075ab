"""How long a request would wait for one model: the quoted wait, and the refusal when that is too long.

Owns the speed estimate and the model of the queue. Knows no allowance, no ids but those it is given, and nothing of
what the engines really do: it sees admissions, ends, and how far each request is.

**The queue.** A model with `R` replicas decodes up to `S = R · max_requests` pieces side by side, at `v` seconds of
audio a second in all; a slot that is taken then moves at `v / S`. While fewer than `S` pieces are there, the next
starts at once: its wait is 0, whatever it asks for, so an idle service refuses nobody. Otherwise those that have given
out audio hold slots, then the oldest of the others, and the rest wait. The wait of a new request is when the slot that
falls to it is free: the earliest slot goes to the first that waits, and so on, through all that go before the new one.

**Who goes before it.** The engines go by priority, then by weighted fair shares between tenants, in the order of
arrival within one. So before a new request of tenant `t` go: all that wait with a lower priority number; all of `t`'s
own that wait, `W_t` seconds; and of each other tenant `u` of the same priority what its weight entitles it to in the
meantime: those that begin within its first `W_t · w_u / w_t` seconds, hence always its oldest, which was there before.
A tenant that floods the service waits for itself; another waits for one request of the flood.

**Who is not refused.** A tenant whose next piece is still within its share of the slots, by weight, is taken in however
long it would wait: it is others that are too many. All shares together are the slots, so this cannot pile up. While
others ask for more than `BURST` times theirs, so many times its own counts: requests come in bursts, and the engines
have places beyond the slots for it.

**The speed** `v` is seconds of audio given out per second, as a ratio of two sums that forget with a time constant, so
that audio which comes in lumps counts as what it is over time. There are two such ratios. One counts all time with
work. The other counts only time with all slots taken, and starts with the speed that the settings promise. `v` is the
larger: few pieces at a time never show what a full batch can do, so they may raise the estimate but not lower it. Time
without any engine counts for neither: one that comes back is as fast as it was.

It is an estimate: pieces move alike only roughly, guidance and long windows take more, and audio reaches the client
after the language model has made it. The engines' own queue bounds stand behind it.
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
"""Time constant of the speed estimate."""
PRIOR_S = 5.0
"""Seconds of work that the initial speed counts for."""
MIN_RETRY_S, MAX_RETRY_S = 1.0, 60.0
"""Bounds of what a refusal tells the caller. By the upper one the speed will have been measured anew."""


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """One model at this moment."""

    wait_s: float
    """Quoted wait of a request behind all others."""
    speed: float
    """Seconds of audio a second, all replicas."""
    left_s: float
    """Seconds of audio that running requests still have to give out."""
    num_requests: int


@dataclass(slots=True)
class _Work:
    """A request that was admitted and has not ended."""

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
    """Seconds of audio over seconds, both forgetting."""

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
    """The requests of one model that were admitted and have not ended.

    Args:
        num_replicas: language-model replicas.
        num_slots: pieces that a replica decodes at the same time.
        initial_speed: seconds of audio a second of one replica, until it has been measured.
        max_wait_s: a request that would wait longer is refused.
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
        """Quotes since the last event: in a storm of refusals the same tenants ask again and again."""
        self._since = clock()

    @property
    def speed(self) -> float:
        """Seconds of audio a second, all replicas."""
        return max(self._any.value, self._full.value)

    def set_capacity(self, num_replicas: int) -> None:
        """The number of replicas has changed: so has the speed, in proportion. None at all counts as one, which is
        being replaced."""
        self._pass_time()
        self._has_engine = num_replicas > 0
        num_replicas = max(1, num_replicas)
        for ratio in (self._any, self._full):
            ratio.audio_s *= num_replicas / self._num_replicas
        self._num_replicas = num_replicas

    def check(self, tenant: str, weight: float, priority: int) -> float:
        """Seconds that a request would wait until its decoding starts.

        Raises:
            OverloadedError: it is longer than `max_wait_s`, and the tenant has its share; with `retry_after_s`.
        """
        wait_s = self.quote(tenant, weight, priority)
        if wait_s > self._max_wait_s and not self._is_below_share(tenant, weight, priority):
            retry_after_s = min(MAX_RETRY_S, max(MIN_RETRY_S, wait_s - self._max_wait_s))
            raise OverloadedError(
                f"the request would wait {wait_s:.0f} s to start, more than {self._max_wait_s:g} s; "
                f"retry in {math.ceil(retry_after_s)} s",
                retry_after_s=retry_after_s,
            )
        return wait_s

    def _is_below_share(self, tenant: str, weight: float, priority: int) -> bool:
        """Whether rivals of the same priority keep a tenant from the slots that its weight entitles it to."""
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
        """Seconds that a request would wait until its decoding starts."""
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

    def end_s(self, request_id: str) -> float:
        """Seconds until a running request may have ended, if it runs now and moves like the others."""
        work = self._works[request_id]
        num_moving = max(work.num_pieces, min(self._num_pieces, self._slots))
        return work.left_s / work.num_pieces * num_moving / self.speed if self.speed > 0 else math.inf

    def load(self) -> ModelLoad:
        """The model at this moment."""
        full = self._num_pieces >= self._slots
        return ModelLoad(
            wait_s=self._wait_s(*self._split()) if full else 0.0,
            speed=self.speed,
            left_s=math.fsum(work.left_s for work in self._works.values()),
            num_requests=len(self._works),
        )

    def add(
        self, request_id: str, tenant: str, weight: float, priority: int, audio_s: float, num_pieces: int = 1
    ) -> None:
        """A request is admitted."""
        assert request_id not in self._works
        self._pass_time()
        self._works[request_id] = _Work(tenant, weight, priority, audio_s, num_pieces)
        self._num_pieces += num_pieces

    def progress(self, request_id: str, done_s: float, counts: bool = True) -> None:
        """A request has given out `done_s` seconds of audio so far.

        Args:
            counts: False for what was made while nobody looked: it says nothing about the speed.
        """
        work = self._works[request_id]
        made_s = done_s - work.done_s
        if made_s > 0:
            work.done_s = done_s
            self._pass_time(made_s if counts else 0.0)

    def remove(self, request_id: str, done_s: float) -> None:
        """A request has ended after `done_s` seconds of audio."""
        self.progress(request_id, done_s)
        self._pass_time()
        self._num_pieces -= self._works.pop(request_id).num_pieces

    def withdraw(self, request_id: str) -> None:
        """A request was not admitted after all."""
        self.remove(request_id, 0.0)

    @property
    def _slots(self) -> int:
        return self._num_replicas * self._num_slots

    def _pass_time(self, made_s: float = 0.0) -> None:
        """An event: count the time since the last one, with the state it had, and the audio made in it."""
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
        """Those that hold the slots, and those that wait, in the order of their arrival."""
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
        """When the slot that comes after all `ahead` is free; a slot moves at speed / slots."""
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
