"""Random lives of the gatekeeper: whatever edges and clients do, the books and the allowances balance after each step.

Edges are small honest or dead processes: each holds the tickets it runs, reports, obeys, settles. Beside the
gatekeeper the test counts, on its own, what each allowance must have lost.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections import Counter
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from musicgen_serving.admission import AdmissionRequest, Progress, Settlement, Ticket
from musicgen_serving.deployments.gatekeeper import GRACE_S, SWEEP_S, LocalGatekeeper
from musicgen_serving.errors import ConflictError, NotFoundError
from musicgen_serving.settings import load_settings

from musicgen.errors import OverloadedError, QuotaExceededError
from musicgen.types import FinishReason

START = 1_700_000_040.0 // 86400 * 86400
SILENCE_S = 5.0
MAX_CONCURRENT = 3
DAY_S = 400
NUM_LIVES = 15
STEPS_A_LIFE = 100

T = TypeVar("T")
met: Counter[str] = Counter()
"""What the lives came through, to know that they were worth living."""


class Running:
    """A request as its edge sees it."""

    def __init__(self, ticket: Ticket, audio_s: float, admitted_at: float) -> None:
        self.ticket, self.audio_s, self.admitted_at, self.done_s = ticket, audio_s, admitted_at, 0.0

    def progress(self) -> Progress:
        """More is made than given out."""
        return Progress(self.ticket, "demo", self.audio_s, self.done_s, min(self.audio_s, 1.5 * self.done_s))


class Life:
    """One gatekeeper, two tenants, three edges."""

    def __init__(self, file: Path, speed: float) -> None:
        self.file = file
        self.now = START
        self.loop = asyncio.new_event_loop()
        self.edges: dict[int, dict[str, Running]] = {0: {}, 1: {}, 2: {}}
        self.num_edges = 3
        self.names: list[tuple[str, str]] = []
        self.num_admitted = 0
        tenants = [
            {"name": "free", "max_concurrent": MAX_CONCURRENT, "audio_s_per_day": DAY_S, "key_sha256": ["a" * 64]},
            {"name": "paid", "weight": 3.0, "tenant_class": "paid", "audio_s_per_day": 10 * DAY_S},
        ]
        self.keeper = LocalGatekeeper(
            load_settings(
                {
                    "models": [{"name": "demo", "max_requests": 2}],
                    "admission": {"max_wait_s": 20.0, "initial_speed": speed},
                    "access": {"tenants": tenants, "usage_file": self.file},
                    "failover": {"edge_silence_s": SILENCE_S},
                }
            ),
            takeover_s=0.002,
            cancel_wait_s=0.0,
            poll_s=0.0,
            clock=lambda: self.now,
            wall_clock=lambda: self.now,
        )

    def wait(self, awaitable: Awaitable[T]) -> T:
        async def call() -> T:
            return await awaitable

        return self.loop.run_until_complete(call())

    def admit(self, tenant: str, edge: int, audio_s: float, key: str | None, old: int, fingerprint: str) -> None:
        request_id = self.names[-old][1] if 0 < old < 5 and old <= len(self.names) else f"r{len(self.names)}"
        request = AdmissionRequest(request_id, tenant, "demo", audio_s, key, fingerprint if key else "")
        before = self.wait(self.keeper.counts())
        try:
            ticket = self.wait(self.keeper.admit(request))
        except QuotaExceededError:
            met["quota"] += 1
        except OverloadedError:
            met["overload"] += 1
            assert self.num_running() >= 2  # never while a slot is free
        except ConflictError:
            met["conflict"] += 1
            after = self.wait(self.keeper.counts())
            assert after.running_by == before.running_by
        else:
            met["admitted"] += 1
            met["repeated"] += sum(before.running_by.values()) + 1 > self.num_running()
            met["paid before"] += ticket.paid_s > 0
            self.num_admitted += 1
            self.names.append((tenant, request_id))
            place = self.edges[list(self.edges)[edge]]
            place[ticket.serial] = Running(ticket, audio_s, self.now)
        self.balanced()

    def live(self, seconds: float, dead: int | None) -> None:
        """Time passes; edges make audio, report, and drop what they shall not run. One may be silent."""
        self.now += seconds
        for index, (edge, place) in enumerate(list(self.edges.items())):
            if index == dead:
                continue
            for running in place.values():
                running.done_s = min(running.audio_s, running.done_s + seconds)
            reports = [running.progress() for running in place.values()]
            for unwanted in self.wait(self.keeper.report(str(edge), reports)):
                met["told by a report"] += 1
                self.settle(place, unwanted.serial, FinishReason.CANCELLED)
        self.balanced()

    def listen(self, edge: int) -> None:
        name = list(self.edges)[edge]
        for unwanted in self.wait(self.keeper.wait_cancelled(str(name))):
            met["told by a poll"] += 1
            self.settle(self.edges[name], unwanted.serial, FinishReason.CANCELLED)
        self.balanced()

    def end(self, edge: int, reason: FinishReason, twice: bool) -> None:
        place = self.edges[list(self.edges)[edge]]
        if not place:
            return
        serial = next(iter(place))
        running = place[serial]
        if reason is FinishReason.FINISHED:
            running.done_s = running.audio_s
        self.settle(place, serial, reason)
        if twice:
            self.settle({serial: running}, serial, FinishReason.FAILED)
        self.balanced()

    def cancel(self, which: int, stranger: bool) -> None:
        tenant, request_id = self.names[-min(which, len(self.names))]
        if stranger:
            tenant = "paid" if tenant == "free" else "free"
        try:
            status = self.wait(self.keeper.cancel(tenant, request_id))
        except NotFoundError:
            assert (tenant, request_id) not in self.names
        else:
            assert (tenant, request_id) in self.names
            assert status.state in {"running", "finished", "cancelled", "failed"}
        self.balanced()

    def die(self, edge: int) -> None:
        """An edge is gone with all it ran, and another one starts."""
        met["edges died"] += 1
        del self.edges[list(self.edges)[edge]]
        self.edges[self.num_edges] = {}
        self.num_edges += 1

    def silence(self) -> None:
        """Enough time for the gatekeeper to settle what nobody runs any more."""
        for _ in range(2):
            self.live(SILENCE_S + SWEEP_S, None)
            self.live(GRACE_S, None)
        running = {record.ticket.serial for record in self.keeper._registry}
        assert running == {serial for place in self.edges.values() for serial in place}

    def settle(self, place: dict[str, Running], serial: str, reason: FinishReason) -> None:
        running = place.pop(serial, None)
        if running is not None:
            total_s = self.now - running.admitted_at
            self.wait(self.keeper.settle(Settlement(running.progress(), reason, None, total_s, 0)))

    def num_running(self) -> int:
        return self.wait(self.keeper.counts()).running

    def balanced(self) -> None:
        """What must hold at any moment."""
        self.wait(self.keeper.check())
        counts = self.wait(self.keeper.counts())
        totals = {
            name: sum(getattr(counts, name).values())
            for name in ("admitted", "finished", "cancelled", "failed", "running_by")
        }
        assert totals["admitted"] == self.num_admitted
        assert totals["admitted"] == sum(totals.values()) - totals["admitted"]
        lines = [json.loads(text) for text in self.file.read_text().splitlines()]
        reasons = Counter(line["reason"] for line in lines)
        assert all(reasons[name] == totals[name] for name in ("finished", "cancelled", "failed"))
        records = list(self.keeper._registry)
        assert counts.models["demo"].num_requests == len(records) == totals["running_by"]
        by_tenant = Counter(record.ticket.tenant for record in records)
        assert by_tenant["free"] <= MAX_CONCURRENT
        stored: Any = self.keeper._quotas._storage
        for tenant in ("free", "paid"):
            mine = [record for record in records if record.ticket.tenant == tenant]
            taken = sum(math.ceil(record.audio_s - record.ticket.paid_s) for record in mine)
            taken += sum(math.ceil(line["billed_s"]) for line in lines if line["tenant"] == tenant)
            assert stored.storage.get(f"musicgen/audio/86400/{tenant}/{int(START // 86400)}", 0) == taken
            assert taken <= (DAY_S if tenant == "free" else 10 * DAY_S)

    def step(self, draw: random.Random) -> None:
        """One transition."""
        edge = draw.randrange(3)
        kind = draw.choices(
            ("admit", "live", "listen", "end", "cancel", "die", "silence"), weights=(40, 25, 14, 12, 8, 4, 1)
        )[0]
        if kind == "admit":
            tenant, audio_s = draw.choice(("free", "paid")), draw.choice((1.0, 7.5, 30.0))
            key, fingerprint = draw.choice((None, None, "k1", "k2")), draw.choice("fffg")
            self.admit(tenant, edge, audio_s, key, draw.randint(0, 10), fingerprint)
        elif kind == "live":
            self.live(draw.choice((0.1, 0.5, 1.0, 3.0)), draw.choice((None, None, 0, 1, 2)))
        elif kind == "end":
            self.end(edge, draw.choice(list(FinishReason)), draw.random() < 0.3)
        elif kind == "cancel" and self.names:
            self.cancel(draw.randint(1, 4), draw.random() < 0.2)
        elif kind == "listen":
            self.listen(edge)
        elif kind == "die":
            self.die(edge)
        elif kind == "silence":
            self.silence()

    def finish(self) -> None:
        """All that runs ends, and nothing is left."""
        self.silence()
        for place in self.edges.values():
            for request_id in list(place):
                self.settle(place, request_id, FinishReason.FINISHED)
        self.balanced()
        assert self.num_running() == 0
        text = self.file.read_text()
        met["lost edges"] += text.count("edge_lost")
        met["superseded"] += text.count("superseded")

    def close(self) -> None:
        self.keeper.close()
        self.wait(asyncio.sleep(0))
        self.loop.close()


@pytest.mark.parametrize("speed", [0.5, 8.0])
def test_random_lives_balance(tmp_path: Path, speed: float) -> None:
    met.clear()
    for index in range(NUM_LIVES):
        life, draw = Life(tmp_path / str(index), speed), random.Random(index)
        try:
            for _ in range(STEPS_A_LIFE):
                life.step(draw)
            life.finish()
        finally:
            life.close()
    expected = {"admitted", "repeated", "conflict", "edges died", "lost edges", "superseded", "told by a report"}
    expected |= {"told by a poll", "paid before", "quota" if speed > 1 else "overload"}
    assert min(met[name] for name in expected) >= 10, met
