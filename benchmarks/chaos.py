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
from typing import Any

from musicgen_serving.client import Retries
from musicgen_serving.cluster import Endpoints

from benchmarks import chaos_cluster
from benchmarks.chaos_streams import Listener, Song, Tally, all_heard, longest_silence_s, undisturbed

PROMPTS = ("happy rock", "sad jazz", "slow piano", "fast drums", "calm harp", "loud brass", "old tango", "new waltz")
PATIENT = Retries(max_attempts=200, first_backoff_s=0.1, max_backoff_s=0.5)
PAUSE_S = (0.5, 2.5)
"""Between a service that is whole again and the next kill: random in these bounds."""
ENCODERS = ("TextEncoder", "ChromaExtractor")
"""They work only when a piece begins: their songs are short."""
SPEED_BOUND_S = 120.0
QUIET_S = 8.0
"""Before the first kill."""


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
    quiet_silences_s: list[float] = field(default_factory=list)
    """Before the first kill, the longest silence of a listener in each of a few intervals."""
    silences_s: list[float] = field(default_factory=list)
    """For each kill, the longest silence of a listener from then until all replicas ran again."""
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
    if options.table is not None:
        print(_table(_merged(options.table)))
        return 0
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
    parser.add_argument("--seconds", type=float, default=math.inf, help="no more kills of a kind after so long")
    parser.add_argument("--replicas", type=int, default=2, help="of the kind that is killed")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="append the line there too")
    parser.add_argument("--table", type=Path, help="run nothing: the table of all lines of such a file")
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
    _until(lambda: all_heard(listeners, 0.0))
    quiet_from = time.monotonic()
    time.sleep(QUIET_S)
    for number in range(round(QUIET_S / 2)):
        since = quiet_from + 2 * number
        outcome.quiet_silences_s.append(longest_silence_s(listeners, since, since + 2))
    with tally.lock:
        outcome.quiet_underruns_s = [s for s in tally.underruns_s if s > 0]
        tally.underruns_s.clear()
    rng = random.Random(f"{options.seed} {kind}")
    began = time.monotonic()
    while outcome.num_kills < options.kills and time.monotonic() - began < options.seconds:
        time.sleep(rng.uniform(*PAUSE_S))
        victim = rng.choice(sorted(chaos_cluster.replica_pids(kind)))
        at = time.monotonic()
        chaos_cluster.kill(victim)
        outcome.num_kills += 1
        outcome.replaced_s.append(chaos_cluster.wait_whole(kind, count, {victim}))
        whole_at = time.monotonic()
        _until(lambda since=whole_at: all_heard(listeners, since))  # type: ignore[misc]
        outcome.silences_s.append(longest_silence_s(listeners, at, whole_at))
        text = f"longest silence {outcome.silences_s[-1]:.2f} s, replaced after {outcome.replaced_s[-1]:.1f} s"
        print(f"{kind}: kill {outcome.num_kills}: {text}", file=sys.stderr, flush=True)
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


def _merged(path: Path) -> list[Outcome]:
    """The outcomes of several runs, those of the same kind and number of replicas added up."""
    merged: dict[tuple[str, int], dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        for values in json.loads(line)["kinds"]:
            known = merged.setdefault((values["kind"], values["num_replicas"]), {})
            for name, value in values.items():
                if name in ("kind", "num_replicas"):
                    known[name] = value
                elif name == "errors":
                    known[name] = known.get(name, {}) | value
                else:
                    known[name] = known[name] + value if name in known else value
    return [Outcome(**values) for values in merged.values()]


def _table(outcomes: list[Outcome]) -> str:
    head = ("killed", "replicas", "kills", "finished", "different", "failed", "refused", "silence before s", "after s",
            "max", "replaced s", "max", "pieces with a gap", "longest gap s")  # fmt: skip
    rows = [head, ("---",) * len(head), *map(_row, outcomes)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _row(o: Outcome) -> tuple[str, ...]:
    counts = (o.num_replicas, o.num_kills, o.num_finished, o.num_different, o.num_failed, o.num_refused)
    return (
        o.kind,
        *map(str, counts),
        f"{statistics.median(o.quiet_silences_s):.1f}",
        *(f"{figure(seconds):.1f}" for seconds in (o.silences_s, o.replaced_s) for figure in (statistics.median, max)),
        str(len(o.underruns_s)),
        f"{max(o.underruns_s, default=0.0):.1f}",
    )


if __name__ == "__main__":
    sys.exit(main())
