"""SIGKILL replicas of a running service, one after the other, under streams over both protocols.

python -m benchmarks.chaos --kinds LanguageModel CodecDecoder --kills 10

Each kind gets a service of its own with `--replicas` of that kind (there is only ever one gatekeeper). Eight listeners
stream songs without a pause; every finished one is compared with the undisturbed one. Only listeners of the ingress
that is killed may connect again: for everybody else a lost connection counts as a failure. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from musicgen_serving.client import Retries
from musicgen_serving.cluster import Endpoints

from benchmarks import chaos_cluster
from benchmarks.chaos_streams import Listener, Song, Tally, stalls_s, undisturbed

PROMPTS = ("happy rock", "sad jazz", "slow piano", "fast drums", "calm harp", "loud brass", "old tango", "new waltz")
PATIENT = Retries(max_attempts=200, first_backoff_s=0.1, max_backoff_s=0.5)
PAUSE_S = (0.5, 2.5)
"""Between a service that is whole again and the next kill: random in these bounds."""
ENCODERS = ("TextEncoder", "ChromaExtractor")
"""They work only when a piece begins: their songs are short."""
SPEED_BOUND_S = 120.0


@dataclass(slots=True)
class Outcome:
    """What was seen of one kind."""

    kind: str
    num_replicas: int
    num_kills: int = 0
    num_finished: int = 0
    num_different: int = 0
    num_failed: int = 0
    num_refused: int = 0
    stalls_s: list[float] = field(default_factory=list)
    """For each kill, seconds until the last of the listeners got audio again."""
    replaced_s: list[float] = field(default_factory=list)
    """For each kill, seconds until all replicas ran again."""
    underruns_s: list[float] = field(default_factory=list)
    """Of pieces whose player fell silent, seconds of silence."""
    quiet_underruns_s: list[float] = field(default_factory=list)
    """The same before the first kill."""
    errors: dict[str, int] = field(default_factory=dict)


def main() -> int:
    options = _options()
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    outcomes = []
    for kind in options.kinds:
        outcome = _run_kind(kind, options)
        outcomes.append(outcome)
        print(_table(outcomes), flush=True)
    line = json.dumps({"benchmark": "chaos", "streams": options.streams, "kinds": [asdict(o) for o in outcomes]})
    print(line)
    if options.json is not None:
        with options.json.open("a") as file:
            file.write(line + "\n")
    return int(any(o.num_failed or o.num_different for o in outcomes))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=chaos_cluster.KINDS, default=chaos_cluster.KINDS)
    parser.add_argument("--kills", type=int, default=10, help="of each kind")
    parser.add_argument("--replicas", type=int, default=2, help="of the kind that is killed")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="append the line there too")
    return parser.parse_args()


def _run_kind(kind: str, options: argparse.Namespace) -> Outcome:
    count = 1 if kind == "Gatekeeper" else options.replicas
    outcome = Outcome(kind, count)
    with tempfile.TemporaryDirectory() as folder:
        how = chaos_cluster.settings({kind: count}, usage_file=Path(folder) / "usage.jsonl")
        began = time.monotonic()
        with chaos_cluster.running(how) as endpoints:
            print(f"{kind}: the service is ready after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            _disturb(kind, count, endpoints, options, outcome)
    return outcome


def _disturb(kind: str, count: int, endpoints: Endpoints, options: argparse.Namespace, outcome: Outcome) -> None:
    tally = Tally()
    listeners = _listeners(kind, endpoints, options.streams, tally)
    for listener in listeners:
        listener.start()
    _until(lambda: all(listener.received_at for listener in listeners))
    time.sleep(5)
    with tally.lock:
        outcome.quiet_underruns_s = [s for s in tally.underruns_s if s > 0]
        tally.underruns_s.clear()
    rng = random.Random(f"{options.seed} {kind}")
    for _ in range(options.kills):
        time.sleep(rng.uniform(*PAUSE_S))
        victim = rng.choice(sorted(chaos_cluster.replica_pids(kind)))
        at = time.monotonic()
        chaos_cluster.kill(victim)
        outcome.num_kills += 1
        outcome.replaced_s.append(chaos_cluster.wait_whole(kind, count, {victim}))
        _until(lambda at=at: not any(map(math.isnan, stalls_s(listeners, at))))  # type: ignore[misc]
        outcome.stalls_s.append(max(stalls_s(listeners, at)))
        print(
            f"{kind}: kill {outcome.num_kills}: audio for all after {outcome.stalls_s[-1]:.2f} s, "
            f"replaced after {outcome.replaced_s[-1]:.1f} s",
            file=sys.stderr,
            flush=True,
        )
    for listener in listeners:
        listener.stop()
    for listener in listeners:
        listener.join(SPEED_BOUND_S)
    outcome.num_finished, outcome.num_different = tally.num_finished, tally.num_different
    outcome.num_failed = sum(tally.failed.values()) + sum(listener.is_alive() for listener in listeners)
    outcome.num_refused = sum(tally.refused.values())
    outcome.underruns_s = [s for s in tally.underruns_s if s > 0]
    outcome.errors = {f"failed: {e}": n for e, n in tally.failed.items()}
    outcome.errors |= {f"refused: {e}": n for e, n in tally.refused.items()}


def _listeners(kind: str, endpoints: Endpoints, num_streams: int, tally: Tally) -> list[Listener]:
    """Half over HTTP, half over gRPC; every fourth follows a melody."""
    assert endpoints.grpc is not None
    made: list[Listener] = []
    for number in range(num_streams):
        protocol = ("http", "grpc")[number % 2]
        url = endpoints.http if protocol == "http" else endpoints.grpc
        melody = _melody() if kind == "ChromaExtractor" or number % 4 == 3 else None
        song = Song(PROMPTS[number % len(PROMPTS)], number, 3.0 if kind in ENCODERS else 10.0, melody)
        may_resume = chaos_cluster.INGRESSES.get(kind) == protocol
        made.append(Listener(url, song, undisturbed(url, song), tally, PATIENT if may_resume else None))
    return made


def _melody() -> bytes:
    import io

    import soundfile

    from musicgen.demo.tune import SAMPLE_RATE_HZ, melody

    buffer = io.BytesIO()
    soundfile.write(buffer, melody()[: 10 * SAMPLE_RATE_HZ], SAMPLE_RATE_HZ, format="WAV")
    return buffer.getvalue()


def _until(condition: object, timeout_s: float = SPEED_BOUND_S) -> None:
    """Raises: TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise TimeoutError(f"expected every listener to get audio within {timeout_s:g} s, some got none")
        time.sleep(0.05)


def _table(outcomes: list[Outcome]) -> str:
    head = (
        "killed", "replicas", "kills", "finished", "different", "failed", "refused", "audio again s: median", "max",
        "replica back s: median", "max", "pieces with a gap", "longest gap s",
    )  # fmt: skip
    rows = [head, ("---",) * len(head), *map(_row, outcomes)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _row(o: Outcome) -> tuple[str, ...]:
    counts = (o.num_replicas, o.num_kills, o.num_finished, o.num_different, o.num_failed, o.num_refused)
    return (
        o.kind,
        *map(str, counts),
        *(f"{figure(seconds):.1f}" for seconds in (o.stalls_s, o.replaced_s) for figure in (statistics.median, max)),
        str(len(o.underruns_s)),
        f"{max(o.underruns_s, default=0.0):.1f}",
    )


if __name__ == "__main__":
    sys.exit(main())
