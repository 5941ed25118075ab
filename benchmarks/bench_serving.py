"""The service under open-loop load, against the bare engine in the same run: `python -m benchmarks.bench_serving`.

First runs all requests at once on the model in one process, then on a cluster: the difference is the overhead of the
service. Then Poisson arrivals at fractions of that throughput, or at the given `--rate`s. Finally the bare engine
again, to measure machine drift. Clients run in a separate process. Prints tables, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.machine import load_average
from benchmarks.serving_engine import Bare, measure
from benchmarks.serving_load import Load, run_load
from benchmarks.serving_model import add_model_options, model_settings
from benchmarks.serving_plan import Ask, Protocol, plan
from benchmarks.serving_report import Figures, Slo, aligned, by_protocol, plot, table
from benchmarks.serving_service import Service, own_service

TARGET_LOSS = 0.05
LONG_WAIT_S = 3600.0
"""Admission limit for the all-at-once run: nothing is rejected."""


def main() -> None:
    args = _parse()
    began = time.time()
    model = _model_settings(args)
    burst = _plan(args, math.inf, "burst", model["name"], args.requests)
    before = None if args.url or args.no_engine else _bare(burst, model)
    settings = {"models": [model], "admission": {"max_wait_s": args.max_wait_s}}
    running = nullcontext(_given(args)) if args.url else own_service(settings)
    with running as service:
        run_load(plan(4, math.inf, [1.0], _protocols(args), model=model["name"], name="warm-up"), service.urls)
        at_once = run_load(burst, service.urls)
        rows = by_protocol("all at once", at_once, None, _slo(args), load_average())
        loads: list[tuple[Figures, Load]] = [(rows[0], at_once)]
        print(table(rows), file=sys.stderr)
        for rate_hz in _rates(args, rows[0], burst):
            num = args.requests_at_rate or max(2, round(rate_hz * args.duration_s))
            load = run_load(_plan(args, rate_hz, f"rate-{rate_hz:.2f}", model["name"], num), service.urls)
            new = by_protocol(f"{rate_hz:.2f}/s", load, rate_hz, _slo(args), load_average())
            loads.append((new[0], load))
            rows += new
            print(table(new), file=sys.stderr)
    after = None if before is None else _bare(burst, model)
    print(table(rows))
    losses = _losses(rows[0], before, after)
    print(losses_table(losses, rows[0]))
    if args.plot:
        title = f"{args.random or args.model}: {burst[0].model}, {len(burst)} requests"
        plot([(row, load.outcomes) for row, load in loads], _slo(args), Path(args.plot), title)
    result = {
        "benchmark": "serving",
        "model": model,
        "options": {k: v for k, v in vars(args).items() if k != "plot"},
        "seconds": round(time.time() - began, 1),
        "bare": [asdict(bare) for bare in (before, after) if bare is not None],
        "losses": losses,
        "loads": [asdict(row) for row in rows],
        "clients": [asdict(load.own) for _, load in loads],
    }
    print(json.dumps(result, default=str))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_model_options(parser)
    add("--url", nargs="*", help="http:// and grpc:// URLs of a running service; skips the bare engine")
    add("--protocol", choices=("http", "grpc", "both"), default="both")
    add("--requests", type=int, default=24, help="number of requests in the all-at-once run")
    add("--durations", type=float, nargs="+", default=[4.0, 6.0, 8.0, 10.0], help="durations in seconds, in rotation")
    add("--rate", type=float, nargs="+", help="requests per second")
    add("--load", type=float, nargs="*", default=[0.5, 0.8], help="fractions of the measured throughput; unless --rate")
    add("--duration-s", type=float, default=60.0, help="duration of each rate")
    add("--requests-at-rate", type=int, help="requests per rate, instead of --duration-s")
    add("--burstiness", type=float, default=1.0, help="coefficient of variation between arrivals; 1: Poisson")
    add("--seed", type=int, default=0)
    add("--max-requests", type=int, default=8, help="pieces that the engine decodes concurrently")
    add("--kv-memory-mb", type=int, default=600)
    add("--threads", type=int, help="threads of an engine step; default: one per core")
    add("--max-wait-s", type=float, default=LONG_WAIT_S, help="admission limit; default: nothing is rejected")
    add("--slo-first-audio", type=float, default=2.0)
    add("--player-buffer", type=float, default=0.5)
    add("--no-engine", action="store_true", help="skip the bare engine")
    add("--plot", metavar="FILE")
    return parser.parse_args()


def _model_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Model settings, for the service and the bare engine."""
    kv_memory_bytes = args.kv_memory_mb * 2**20
    return model_settings(
        args, kv_memory_bytes=kv_memory_bytes, max_requests=args.max_requests, num_threads=args.threads
    )


def _plan(args: argparse.Namespace, rate_hz: float, name: str, model: str, num: int) -> list[Ask]:
    return plan(
        num,
        rate_hz,
        args.durations,
        _protocols(args),
        model=model,
        seed=args.seed,
        burstiness=args.burstiness,
        name=name,
    )


def _protocols(args: argparse.Namespace) -> tuple[Protocol, ...]:
    return ("http", "grpc") if args.protocol == "both" else (args.protocol,)


def _given(args: argparse.Namespace) -> Service:
    http = next((url for url in args.url if url.startswith("http")), None)
    grpc = next((url for url in args.url if url.startswith("grpc")), None)
    return Service(http, grpc)


def _slo(args: argparse.Namespace) -> Slo:
    return Slo(args.slo_first_audio, args.player_buffer)


def _rates(args: argparse.Namespace, at_once: Figures, burst: list[Ask]) -> list[float]:
    if args.rate:
        return list(args.rate)
    mean_s = sum(ask.duration_s for ask in burst) / len(burst)
    return [share * at_once.audio_s_per_s / mean_s for share in args.load]


def _bare(burst: list[Ask], model: dict[str, Any]) -> Bare:
    bare = measure(burst, model)
    print(f"bare engine: {bare.alone:.2f} audio s/s alone, {bare.with_codec:.2f} with the codec", file=sys.stderr)
    return bare


def _losses(at_once: Figures, before: Bare | None, after: Bare | None) -> dict[str, float]:
    """The service's overhead, as a fraction of the bare engine's throughput (mean of both runs)."""
    if before is None or after is None:
        return {}
    alone, with_codec = ((getattr(before, n) + getattr(after, n)) / 2 for n in ("alone", "with_codec"))
    return {
        "engine_alone": alone,
        "engine_with_codec": with_codec,
        "service": at_once.audio_s_per_s,
        "loss_against_engine_with_codec": 1 - at_once.audio_s_per_s / with_codec,
        "loss_against_engine_alone": 1 - at_once.audio_s_per_s / alone,
        "drift_with_codec": abs(after.with_codec / before.with_codec - 1),
        "drift_alone": abs(after.alone / before.alone - 1),
    }


def losses_table(losses: dict[str, float], at_once: Figures) -> str:
    """The service against the bare engine."""
    if not losses:
        return ""
    rows = [("all at once", "audio s/s", "service overhead", "target", "drift within the run")]
    for name, title in (("with_codec", "engine, text encoder, codec in one process"), ("alone", "engine alone")):
        loss = losses[f"loss_against_engine_{name}"]
        target = f"≤ {100 * TARGET_LOSS:.0f} %" if name == "with_codec" else ""
        drift = f"{100 * losses[f'drift_{name}']:.0f} %"
        rows.append((title, f"{losses[f'engine_{name}']:.2f}", f"{100 * loss:.1f} %", target, drift))
    rows.append(("service", f"{at_once.audio_s_per_s:.2f}", "", "", ""))
    return aligned(rows)


if __name__ == "__main__":
    main()
