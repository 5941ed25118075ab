"""SIGKILL replicas of a running service, one kind after another, while streaming over both protocols.

python -m benchmarks.chaos --group parts --kills 10
python -m benchmarks.chaos --group ingresses --kills 10
python -m benchmarks.chaos --table FILE

Eight clients stream pieces continuously; each finished piece is compared with an undisturbed one. Component failures
must be invisible to clients: while components are killed, a lost connection counts as a failure. While ingresses are
killed, clients reconnect and resume from the next sample. There is a single gatekeeper; without it nothing is admitted.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path

from musicgen_serving.client import Retries
from musicgen_serving.cluster import Endpoints

from benchmarks import chaos_cluster
from benchmarks.chaos_report import Kill, Outcome, merged, table
from benchmarks.chaos_streams import Listener, Song, Tally, all_heard, longest_silence_s, undisturbed

GROUPS = {"parts": (*chaos_cluster.PARTS, "Gatekeeper"), "ingresses": tuple(chaos_cluster.INGRESSES)}
PROMPTS = ("happy rock", "sad jazz", "slow piano", "fast drums", "calm harp", "loud brass", "old tango", "new waltz")
PATIENT = Retries(max_attempts=300, first_backoff_s=0.1, max_backoff_s=0.5)
PAUSE_S = (1.5, 3.0)
"""Bounds of the random minimum pause between kills."""
QUIET_S = 8.0
"""Time before the first kill."""
LIMIT_S = 120.0
"""Timeout for everything."""


def main() -> int:
    options = _options()
    if options.table is not None:
        print(table(merged(options.table)))
        return 0
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    outcome = _run(options)
    print(table([outcome]))
    line = json.dumps({"benchmark": "chaos", **asdict(outcome)})
    print(line)
    if options.json is not None:
        with options.json.open("a") as file:
            file.write(line + "\n")
    return int(bool(outcome.num_failed or outcome.num_different))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", choices=GROUPS, default="parts", help="what to kill")
    parser.add_argument("--kinds", nargs="+", choices=chaos_cluster.KINDS, help="only these kinds of the group")
    parser.add_argument("--kills", type=int, default=10, help="kills per kind")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop killing after this time")
    parser.add_argument("--replicas", type=int, default=2, help="replicas of each killed kind")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--json", type=Path, help="also append the JSON line to this file")
    parser.add_argument("--table", type=Path, help="run nothing; print the table of such a file")
    return parser.parse_args()


def _run(options: argparse.Namespace) -> Outcome:
    kinds = [kind for kind in GROUPS[options.group] if kind in (options.kinds or chaos_cluster.KINDS)]
    outcome = Outcome(options.group, options.replicas, options.streams)
    counts = {kind: 1 if kind == "Gatekeeper" else options.replicas for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        how = chaos_cluster.settings(counts, usage_file=Path(folder) / "usage.jsonl")
        began = time.monotonic()
        with chaos_cluster.running(how) as endpoints:
            _say(f"service ready after {time.monotonic() - began:.0f} s")
            tally = Tally()
            listeners = _listeners(options, endpoints, tally)
            try:
                _disturb(counts, listeners, tally, options, outcome)
            finally:
                _end(listeners, tally, outcome)
    return outcome


def _disturb(
    counts: dict[str, int], listeners: list[Listener], tally: Tally, options: argparse.Namespace, outcome: Outcome
) -> None:
    for listener in listeners:
        listener.start()
    _until(lambda: all_heard(listeners, 0.0))
    began = time.monotonic()
    time.sleep(QUIET_S)
    for second in range(0, int(QUIET_S), 2):
        outcome.quiet_silences_s.append(longest_silence_s(listeners, began + second, began + second + 2))
    outcome.num_quiet, outcome.quiet_underruns_s = tally.take_underruns()
    rng = random.Random(f"{options.seed} {options.group}")
    began = time.monotonic()
    watchers: dict[str, threading.Thread] = {}
    for _ in range(options.kills):
        for kind, count in counts.items():
            if kind in watchers:
                watchers[kind].join()
            if time.monotonic() - began > options.seconds:
                break
            kill = Kill(kind, count)
            outcome.kills.append(kill)
            watchers[kind] = _kill(kill, rng, listeners)
    for watcher in watchers.values():
        watcher.join()


def _kill(kill: Kill, rng: random.Random, listeners: list[Listener]) -> threading.Thread:
    """Kill one replica, pause, then wait until every listener has received audio again. Returns the thread that waits
    for the replacement."""
    victim = rng.choice(sorted(chaos_cluster.replica_pids(kill.kind)))
    at = time.monotonic()
    chaos_cluster.kill(victim)

    def watch() -> None:
        kill.replaced_s = chaos_cluster.wait_whole(kill.kind, kill.num_replicas, {victim})

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    time.sleep(rng.uniform(*PAUSE_S))
    if kill.num_replicas == 1:  # listeners may depend on the replacement
        watcher.join()
    whole_at = time.monotonic()
    _until(lambda: all_heard(listeners, whole_at))
    kill.silence_s = longest_silence_s(listeners, at, time.monotonic())
    _say(f"{kill.kind} killed: longest silence {kill.silence_s:.2f} s")
    return watcher


def _end(listeners: list[Listener], tally: Tally, outcome: Outcome) -> None:
    """Let every piece finish, and count."""
    for listener in listeners:
        listener.stop()
    for listener in listeners:
        listener.join(LIMIT_S)
    outcome.num_finished, outcome.num_different = tally.num_finished, tally.num_different
    outcome.num_failed = sum(tally.failed.values()) + sum(listener.is_alive() for listener in listeners)
    outcome.num_refused = sum(tally.refused.values())
    outcome.errors = {f"failed: {e}": n for e, n in tally.failed.items()}
    outcome.errors |= {f"refused: {e}": n for e, n in tally.refused.items()}
    _, outcome.underruns_s = tally.take_underruns()


def _listeners(options: argparse.Namespace, endpoints: Endpoints, tally: Tally) -> list[Listener]:
    """Of every four listeners, two use HTTP and two gRPC; two stream long pieces, two short ones with a melody."""
    assert endpoints.grpc is not None
    retries = PATIENT if options.group == "ingresses" else None
    made: list[Listener] = []
    for number in range(options.streams):
        url = (endpoints.http, endpoints.grpc)[number % 2]
        is_short = number % 4 >= 2
        prompt = PROMPTS[number % len(PROMPTS)]
        song = Song(prompt, number, 3.0 if is_short else 10.0, _melody() if is_short else None)
        made.append(Listener(url, song, undisturbed(url, song), tally, retries))
    return made


def _melody() -> bytes:
    import io

    import soundfile

    from musicgen.demo.tune import SAMPLE_RATE_HZ, melody

    buffer = io.BytesIO()
    soundfile.write(buffer, melody()[: 10 * SAMPLE_RATE_HZ], SAMPLE_RATE_HZ, format="WAV")
    return buffer.getvalue()


def _until(condition: object) -> None:
    """Raises: TimeoutError."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise TimeoutError(f"some listeners received no audio within {LIMIT_S:g} s")
        time.sleep(0.05)


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
