"""The engine at MusicGen's real sizes, against transformers in the same run: `python -m benchmarks.bench_engine`.

Random weights, guidance on. Every case runs in its own process. Prints a table, then one line of JSON. The bound for
decoding is the read bandwidth measured within the run: no step can read its weights, keys and values faster.
transformers runs in fp32; its time for a whole piece is extrapolated from measured steps, see `engine_peer`.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import engine_peer
from benchmarks.engine_cases import CASES, STAGGERED_S, Figure, Options
from benchmarks.engine_peer import PeerTimes, prefix_len
from benchmarks.engine_report import plot, table
from benchmarks.meter import Reading

TARGETS = {  # × transformers
    "small-fp32-float16": 3.5,
    "small-fp32-int8": 3.5,
    "small-int4-int8": 10.0,
    "small-staggered": 10.0,
    "melody-int4-int8": 16.0,
    "melody-prefill-fp32": 1.0,
    "melody-prefill-int4": 2.0,
}


def main() -> None:
    args = _parse()
    options = Options(args.seconds, args.repeats, args.threads)
    torch.set_num_threads(args.threads)
    if args.child:
        print(json.dumps(_child(args.child, options)))
        return
    began = time.time()
    peers: dict[str, PeerTimes] = {}
    figures: list[Figure] = []
    for name in _chosen(args):
        key = _peer_of(name)
        if key is not None and key not in peers and not args.no_transformers:
            peers[key] = _peer_times(_run_child(f"transformers:{key}", options))
            figures += _peer_figures(key, peers[key], options)
        own = [_figure(raw) for raw in _run_child(name, options)]
        figures += [_beside(figure, peers.get(key or ""), options) for figure in own]
        print(table(figures[-len(own) :]), file=sys.stderr)
    print(table(figures))
    result = {
        "benchmark": "engine",
        "machine": f"{platform.processor() or platform.machine()}, {args.threads} threads",
        "torch": torch.__version__,
        "options": asdict(options),
        "seconds": round(time.time() - began, 1),
        "figures": [asdict(figure) for figure in figures],
    }
    if args.plot:
        plot(figures, Path(args.plot))
    print(json.dumps(result))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="all", help=f"comma-separated prefixes of: {', '.join(CASES)}")
    parser.add_argument("--seconds", type=float, default=30.0, help="duration of a piece")
    parser.add_argument("--repeats", type=int, default=1, help="pieces per case; the median counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="only a few quantized cases, with pieces of 5 s")
    parser.add_argument("--no-transformers", action="store_true", help="skip transformers")
    parser.add_argument("--plot", metavar="FILE", help="plot the fractions of the bound")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.seconds = min(args.seconds, 5.0)
        args.cases = "small-int4-int8,small-staggered,small-overhead-1" if args.cases == "all" else args.cases
    return args


def _chosen(args: argparse.Namespace) -> list[str]:
    if args.cases == "all":
        return list(CASES)
    beginnings = tuple(args.cases.split(","))
    chosen = [name for name in CASES if name.startswith(beginnings)]
    if not chosen:
        raise SystemExit(f"--cases: expected prefixes of {', '.join(CASES)}, got {args.cases}")
    return chosen


# --- processes ---


def _run_child(name: str, options: Options) -> Any:
    arguments = [f"--seconds={options.piece_s}", f"--repeats={options.num_repeats}", f"--threads={options.num_threads}"]
    command = [sys.executable, "-m", "benchmarks.bench_engine", f"--child={name}", *arguments]
    print(f"… {name}", file=sys.stderr, flush=True)
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def _child(name: str, options: Options) -> Any:
    if name.startswith("transformers:"):
        _, size, num_requests = name.split(":")
        times = engine_peer.measure(size, int(num_requests), num_frames=int(50 * options.piece_s))
        return asdict(times)
    case = CASES[name]
    return [asdict(figure) for figure in case.measure(case, options)]


def _figure(raw: dict[str, Any]) -> Figure:
    reading = raw.pop("reading")
    return Figure(**raw, reading=None if reading is None else Reading(**reading))


def _peer_times(raw: dict[str, Any]) -> PeerTimes:
    return PeerTimes(**{**raw, "reading": Reading(**raw["reading"])})


# --- comparison with transformers ---


def _peer_of(case: str) -> str | None:
    """Size and number of requests to time transformers with."""
    if "overhead" in case or "first-audio" in case:
        return None
    return f"{CASES[case].size}:{CASES[case].num_requests}"


def _peer_figures(key: str, peer: PeerTimes, options: Options) -> list[Figure]:
    size, num_requests = key.split(":")
    name = f"transformers {size} ×{num_requests}"
    middle_ms = 1e3 * peer.step_s(prefix_len(size) + 25 * options.piece_s)
    return [
        Figure(name, "decode step, middle of a piece", middle_ms, "ms", reading=peer.reading),
        Figure(name, "prefill and first step", peer.prefill_s, "s", reading=peer.reading),
    ]


def _beside(figure: Figure, peer: PeerTimes | None, options: Options) -> Figure:
    """The figure with transformers' value added, where both were measured."""
    if peer is None:
        return figure
    size, num_frames = CASES[figure.case].size, int(50 * options.piece_s)
    target = f"≥ {TARGETS[figure.case]:g} ×" if figure.case in TARGETS else ""
    if figure.name == "decode, whole piece":
        decode_s = peer.piece_s(num_frames, prefix_len(size)) - peer.prefill_s
        theirs = (num_frames + 2) / decode_s
    elif figure.name == "useful frames":  # one static batch, as long as its longest request
        scale = options.piece_s / 30
        theirs = sum(int(50 * s * scale) for s in STAGGERED_S) / peer.piece_s(num_frames, prefix_len(size))
    elif figure.name == "piece with prefill":
        theirs = peer.piece_s(num_frames, prefix_len(size))
        return replace(figure, peer=theirs, peer_ratio=theirs / figure.value)
    elif figure.name.startswith("prefill"):
        theirs = peer.prefill_s
        return replace(figure, peer=theirs, peer_ratio=theirs / figure.value, target=target)
    else:
        return figure
    both = ", ".join(part for part in (figure.target, target) if part)
    return replace(figure, peer=theirs, peer_ratio=figure.value / theirs, target=both)


if __name__ == "__main__":
    main()
