"""Command-line options of `python -m benchmarks.simulate`, with examples, and the resulting settings."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from benchmarks.simulation.arrivals import Process
from benchmarks.simulation.cluster import Balancing
from benchmarks.simulation.job import Listening
from benchmarks.simulation.machines import GPUS, MODELS, WEIGHT_BYTES, model_config
from benchmarks.simulation.replica import ReplicaConfig
from benchmarks.simulation.step_time import MeasuredTable, Roofline, StepTime
from benchmarks.simulation.workload import Kind, Mix, Tenant
from musicgen.config import KVDtype, SchedulerConfig
from musicgen.errors import InvalidRequestError
from musicgen.types import ChunkPolicy

DESCRIPTION = """\
How many machines does it take? Runs the real scheduler on a virtual clock: requests arrive, replicas execute steps with
times from a roofline model or a measured table, listeners play in real time. All results are simulated; no GPU was
measured.
"""

EXAMPLES = """\
examples:
  one L4 replica of small at 70 % of its capacity, 2,000 requests (half a minute):
    python -m benchmarks.simulate --gpu L4 --model small --load 0.7 --requests 2000
  plot of time to first audio versus load:
    python -m benchmarks.simulate --replicas 4 --load 0.5 0.7 0.8 0.9 0.95 --requests 4000 --plot load.png
  bursty arrivals (Markov-modulated, five times the calm rate):
    python -m benchmarks.simulate --replicas 4 --load 0.8 --arrivals bursts --burstiness 5
  replicas for 1,000 concurrent listeners, p95 of first audio within 2 s, and almost no underruns:
    python -m benchmarks.simulate --listeners 1000 --find-replicas --slo-first-audio 2 --slo-underrun 0.001
  8-bit weights and KV, a bound instead of an estimate (100 % of bandwidth, no launch overhead):
    python -m benchmarks.simulate --weights int8 --kv int8 --bandwidth-share 1 --flops-share 1 --kernel-us 0 --host-ms 0
  measured step times (CSV: num_positions,kv_positions,seconds) and a given number of pages:
    python -m benchmarks.simulate --step-table steps.csv --num-pages 4000 --load 0.8
  100,000 requests in two processes, each with half of the replicas behind its own balancer:
    python -m benchmarks.simulate --replicas 100 --load 0.8 --requests 100000 --cells 2
  two tenants, one with four times the load at the same weight:
    python -m benchmarks.simulate --tenants big=0.8,small=0.2 --load 1.1

load is the arrival rate relative to the closed-form capacity of the replicas (see docs/capacity.md); the last line
is one JSON object.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.simulate",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _machine(p.add_argument_group("machine and model"))
    _load(p.add_argument_group("load"))
    _service(p.add_argument_group("service"))
    out = p.add_argument_group("output")
    out.add_argument(
        "--slo-first-audio", type=float, default=2.0, metavar="S", help="p95 objective for first audio (2)"
    )
    out.add_argument("--slo-underrun", type=float, metavar="RATIO", help="objective for the underrun ratio (none)")
    out.add_argument("--plot", type=Path, metavar="FILE", help="write a plot, .png or .svg")
    out.add_argument("--csv", type=Path, metavar="FILE", help="write one line per request (of the last run)")
    out.add_argument("--seed", type=int, default=0, help="seed of arrivals, requests and the balancer (0)")
    out.add_argument("--processes", type=int, default=1, help="loads simulated in parallel (1)")
    out.add_argument("--cells", type=int, default=1, help="cells of the cluster with their own balancer (1)")
    return p


def _machine(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--gpu", choices=sorted(GPUS), default="H100")
    group.add_argument("--model", choices=sorted(MODELS), default="melody")
    group.add_argument("--weights", choices=sorted(WEIGHT_BYTES), default="bfloat16")
    group.add_argument("--kv", choices=get_args(KVDtype), default="bfloat16", help="KV dtype")
    group.add_argument("--memory-share", type=float, default=0.9, help="of the device, for weights and pages (0.9)")
    group.add_argument("--num-pages", type=int, help="number of pages; default: as many as fit")
    group.add_argument("--step-table", type=Path, metavar="CSV", help="measured steps instead of the roofline")
    group.add_argument("--bandwidth-share", type=float, default=0.7, help="assumed fraction of the peak (0.7)")
    group.add_argument("--flops-share", type=float, default=0.5, help="assumed fraction of the peak (0.5)")
    group.add_argument("--kernel-us", type=float, default=1.0, help="assumed overhead per kernel, in a graph (1)")
    group.add_argument(
        "--host-ms", type=float, default=0.5, help="assumed host time per step, scheduler and Python (0.5)"
    )


def _load(group: argparse._ArgumentGroup) -> None:
    how = group.add_mutually_exclusive_group()
    how.add_argument(
        "--load", type=float, nargs="+", metavar="L", help="fraction of capacity; several for a sweep (0.8)"
    )
    how.add_argument("--rate", type=float, metavar="HZ", help="requests per second, over all replicas")
    how.add_argument("--listeners", type=float, metavar="N", help="concurrent listeners: rate × mean duration")
    group.add_argument(
        "--requests", type=int, default=2000, help="number of requests; the first tenth is warm-up (2000)"
    )
    group.add_argument("--arrivals", choices=get_args(Process), default="poisson")
    group.add_argument("--burstiness", type=float, default=3.0, help="see --arrivals in docs/capacity.md (3)")
    group.add_argument("--durations", type=float, nargs=2, default=(5.0, 30.0), metavar=("MIN", "MAX"))
    group.add_argument("--kinds", default="text=0.45,melody=0.35,double=0.05,continuation=0.15")
    group.add_argument("--tenants", default="a=0.6,b=0.3,c=0.1", help="name=share[:weight],…")
    group.add_argument("--repeat-share", type=float, default=0.1, help="share of requests with a recent prompt (0.1)")
    group.add_argument("--leave-share", type=float, default=0.05, help="share of early disconnects (0.05)")


def _service(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--replicas", type=int, default=1)
    group.add_argument("--find-replicas", action="store_true", help="find the fewest that meet the objective")
    group.add_argument(
        "--balancing", choices=get_args(Balancing), default="two", help="two: the less loaded of two random replicas"
    )
    group.add_argument("--max-requests", type=int, default=256, help="maximum running requests per replica (256)")
    group.add_argument("--prefill-tokens", type=int, default=256, help="chunked-prefill budget of a step (256)")
    group.add_argument("--max-waiting", type=int, default=1024)
    group.add_argument("--deadline-factor", type=float, default=float("inf"), metavar="X")
    group.add_argument("--first-chunk", type=int, default=ChunkPolicy().first_frames, metavar="FRAMES")
    group.add_argument("--max-chunk", type=int, default=ChunkPolicy().max_frames, metavar="FRAMES")
    group.add_argument("--chunk-growth", type=float, default=ChunkPolicy().growth)
    group.add_argument("--before-ms", type=float, default=30.0, help="assumed: text encoder, chroma, network (30)")
    group.add_argument("--codec-ms", type=float, default=30.0, help="assumed: codec and network, per chunk (30)")
    group.add_argument("--prebuffer", type=float, default=0.0, metavar="S", help="playback buffer of the player")


@dataclass(frozen=True, slots=True)
class Settings:
    """The resolved options."""

    replica: ReplicaConfig
    mix: Mix


def settings(options: argparse.Namespace) -> Settings:
    """Resolve the options.

    Raises:
        InvalidRequestError: a malformed share or list, or a model that does not fit.
    """
    shapes, gpu = MODELS[options.model], GPUS[options.gpu]
    num_pages = options.num_pages
    if num_pages is None:
        num_pages = shapes.num_pages(gpu, options.weights, options.kv, options.memory_share)
    if num_pages < 1:
        raise InvalidRequestError("a model that fits", f"{options.model} on {options.gpu}", "try int8 or int4")
    scheduler = SchedulerConfig(
        max_requests=options.max_requests,
        max_rows=3 * options.max_requests,
        max_step_rows=3 * options.max_requests,
        prefill_tokens=options.prefill_tokens,
        max_waiting=options.max_waiting,
    )
    config = model_config(shapes)
    listening = Listening(config.frame_rate_hz, options.before_ms / 1e3, options.codec_ms / 1e3, options.prebuffer)
    replica = ReplicaConfig(
        model=config,
        step_time=_step_time(options),
        num_pages=num_pages,
        scheduler=scheduler,
        chunks=ChunkPolicy(options.first_chunk, options.max_chunk, options.chunk_growth),
        listening=listening,
        deadline_factor=options.deadline_factor,
    )
    mix = Mix(
        kinds=_kinds(options.kinds),
        tenants=_tenants(options.tenants),
        durations_s=tuple(options.durations),
        repeat_share=options.repeat_share,
        leave_share=options.leave_share,
    )
    return Settings(replica, mix)


def _step_time(options: argparse.Namespace) -> StepTime:
    if options.step_table is not None:
        return MeasuredTable.read(options.step_table)
    shapes = MODELS[options.model]
    return Roofline(
        GPUS[options.gpu],
        shapes,
        options.weights,
        options.kv,
        bandwidth_share=options.bandwidth_share,
        flops_share=options.flops_share,
        overhead_s=options.kernel_us * 1e-6 * shapes.num_kernels + options.host_ms * 1e-3,
    )


def _kinds(text: str) -> dict[Kind, float]:
    shares = {name: float(share) for name, share in _pairs(text, "kinds")}
    if not set(shares) <= set(get_args(Kind)):
        raise InvalidRequestError(f"kinds of {', '.join(get_args(Kind))}", text, param="kinds")
    return {name: shares[name] for name in get_args(Kind) if shares.get(name)}


def _tenants(text: str) -> tuple[Tenant, ...]:
    tenants = []
    for name, value in _pairs(text, "tenants"):
        share, _, weight = value.partition(":")
        tenants.append(Tenant(name, float(share), float(weight or 1)))
    return tuple(tenants)


def _pairs(text: str, param: str) -> list[tuple[str, str]]:
    pairs = [item.partition("=")[::2] for item in text.split(",")]
    try:
        if all(float(value.split(":")[0]) >= 0 for _, value in pairs):
            return pairs
    except ValueError:
        pass
    raise InvalidRequestError("name=share,name=share with shares ≥ 0", text, param=param)
