"""Kernel microbenchmarks: `python -m benchmarks.bench_kernels`. Includes the GPU backends if a GPU is available.

Every row is measured between two STREAM probes and compared with them; rows whose probes differ by more than 10 % are
marked. The last line on stdout is one JSON object. Data is cold unless reused within one call.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .gpu_machine import GPU_BACKENDS
from .kernel_cases import Case, Target, attention_case, kinds_of, linear_case, sampling_case
from .kernel_places import Measured, backends, place
from .machine import DRIFT_LIMIT, gpu_name, load_average
from .step_case import SHAPES, step_case, transformers_step

Row = dict[str, Any]
COLUMNS = (
    *("op", "backend", "isa", "weights", "activations", "kv", "rows", "length", "heads", "page", "threads"),
    *("median_us", "p10_us", "p95_us", "bytes", "gb_per_s", "stream_gb_per_s", "pct_of_stream", "gflop_per_s"),
    *("pct_of_peak", "bound_us", "pct_of_bound", "peer_us", "times_peer", "max_error", "error_ratio", "load"),
    *("note", "command"),
)
PRINTED = (
    *("op", "backend", "weights", "kv", "rows", "length", "median_us", "p10_us", "p95_us", "gb_per_s"),
    *("pct_of_stream", "gflop_per_s", "pct_of_peak", "pct_of_bound", "times_peer", "max_error", "note"),
)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_kernels", description=__doc__)
    parser.add_argument("--op", default="linear,attention,sampling,step", help="comma-separated")
    parser.add_argument("--backend", help="cpu, cpu:level, cuda or triton; comma-separated; default: all available")
    parser.add_argument("--activations", default="bf16", choices=("fp32", "bf16", "fp16"), help="GPU only")
    parser.add_argument("--weights", default="fp32,bf16,int8,int4")
    parser.add_argument("--kv", default="fp32,bf16,fp16,int8")
    parser.add_argument("--rows", default="2,16", help="rows of linear; attention and step use the first")
    parser.add_argument("--length", type=int, default=1008, help="positions of attention")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--size", default="4096x4096", help="NxK of linear")
    parser.add_argument("--model", default="small", choices=sorted(SHAPES))
    parser.add_argument("--step", default="int4/int8,int8/fp16", help="weights/KV of whole steps")
    parser.add_argument("--step-length", type=int, default=750)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--refcheck", action="store_true", help="measure errors against float64")
    parser.add_argument("--peer", action="store_true", help="also time transformers' fp32 step")
    parser.add_argument("--cold", action="store_true", help="flush the caches before every repeat")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="roofline plot, PNG or SVG; the backend is appended to the name")
    return parser.parse_args(given)


def cases(options: argparse.Namespace, target: Target) -> Iterator[Case]:
    """The requested cases of one backend, created lazily so that their memory is freed."""
    ops, rows = options.op.split(","), [int(r) for r in options.rows.split(",")]
    n, k = (int(part) for part in options.size.split("x"))
    if "linear" in ops:
        yield from (linear_case(target, kind, r, n, k) for kind in kinds_of(options.weights) for r in rows)
    if "attention" in ops:
        for kv in options.kv.split(","):
            yield attention_case(target, kv, rows[0], options.length, options.heads)
    if "sampling" in ops:
        yield sampling_case(target, 16, 4, 2048)
    if "step" in ops and target.device == "cpu":  # only the CPU has a whole step in one call
        peer = transformers_step(options.model, rows[0], options.step_length) if options.peer else None
        for pair in options.step.split(","):
            kind, kv = pair.split("/")
            size = (rows[0], options.step_length)
            yield step_case(target.backend, options.model, kinds_of(kind)[0], kv, *size, peer)


def measure(case: Case, machine: Measured, peaks: dict[str, float], options: argparse.Namespace) -> Row:
    """Time a case between two STREAM probes."""
    first = machine.stream_bytes_per_s()
    times = machine.seconds_of(case.run, options.repeats, cold=options.cold)
    second = machine.stream_bytes_per_s()
    times = [t / case.calls for t in times]
    median, stream = statistics.median(times), (first + second) / 2
    peak = peaks[case.peak]
    bound = max(case.num_bytes / stream, case.operations / peak)
    notes = [case.note] if case.note else []
    if abs(first - second) > DRIFT_LIMIT * stream:
        notes.append(f"STREAM drifted: {first / 1e9:.1f} to {second / 1e9:.1f} GB/s")
    peer = statistics.median(machine.seconds_of(case.peer, 5)) if case.peer is not None else math.nan
    error, ratio = math.nan, math.nan
    if options.refcheck:
        error, ratio = case.errors()
        notes += [case.error_note.format(error=error)] if case.error_note else []
    return {
        **{name: getattr(case, name) for name in ("op", "backend", "weights", "activations", "kv")},
        **{name: getattr(case, name) for name in ("rows", "length", "heads")},
        "isa": machine.level,
        "page": 16,
        "threads": 0 if case.backend in GPU_BACKENDS else options.threads,
        "bytes": case.num_bytes,
        "median_us": median * 1e6,
        "p10_us": quantile(times, 0.1) * 1e6,
        "p95_us": quantile(times, 0.95) * 1e6,
        "gb_per_s": case.num_bytes / median / 1e9,
        "stream_gb_per_s": stream / 1e9,
        "pct_of_stream": 100 * case.num_bytes / median / stream,
        "bound_us": bound * 1e6,
        "gflop_per_s": case.operations / median / 1e9,
        "pct_of_peak": 100 * case.operations / median / peak,
        "pct_of_bound": 100 * bound / median,
        "peer_us": peer * 1e6,
        "times_peer": peer / median,
        "max_error": error,
        "error_ratio": ratio,
        "load": load_average(),
        "note": "; ".join(notes),
        "command": command(case, options),
    }


def quantile(ordered: list[float], fraction: float) -> float:
    """The nearest entry of a sorted list."""
    return ordered[min(len(ordered) - 1, round(fraction * (len(ordered) - 1)))]


def command(case: Case, options: argparse.Namespace) -> str:
    """The command that reproduces this row."""
    on_gpu = case.backend in GPU_BACKENDS
    how = f"--activations {case.activations}" if on_gpu else f"--threads {options.threads}"
    text = f"python -m benchmarks.bench_kernels --backend {case.backend} {how} --repeats {options.repeats}"
    text += " --cold" * options.cold + " --refcheck" * options.refcheck
    if case.op == "linear":
        return f"{text} --op linear --weights {case.weights} --rows {case.rows} --size {options.size}"
    if case.op == "paged_attention":
        sizes = f"--rows {case.rows} --length {case.length} --heads {case.heads}"
        return f"{text} --op attention --kv {case.kv} {sizes}"
    if case.op.startswith("step"):
        sizes = f"--model {options.model} --rows {case.rows} --step-length {case.length}"
        return f"{text} --op step --step {case.weights}/{case.kv} {sizes}" + (" --peer" if options.peer else "")
    return f"{text} --op sampling"


def show(row: Row) -> str:
    def cell(value: object) -> str:
        if isinstance(value, float):
            return "-" if math.isnan(value) else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
        return str(value)

    return "  ".join(f"{name}={cell(row[name])}" for name in PRINTED if row[name] not in ("", "-"))


def plot(rows: list[Row], peaks: dict[str, float], path: Path) -> None:
    """Roofline plot: each row by operations per byte and operations per second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    stream = statistics.median(row["stream_gb_per_s"] for row in rows)
    grid = [2.0**i for i in range(-3, 9)]
    for name, peak in peaks.items():
        axes.plot(grid, [min(x * stream, peak / 1e9) for x in grid], label=f"bound, {name} arithmetic")
    for row in rows:
        if row["gflop_per_s"] > 0:
            x, y = row["gflop_per_s"] / row["gb_per_s"], row["gflop_per_s"]
            axes.plot([x], [y], "o")
            name = f"{row['op']} {row['weights']} {row['kv']} x{row['rows']}".replace(" -", "")
            axes.annotate(name, (x, y), fontsize=6)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GFLOP/s (int8: GOP/s)")
    axes.legend()
    figure.savefig(path, bbox_inches="tight", dpi=150)


def main() -> None:
    options = arguments()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    summary: dict[str, Any] = {"gpu": gpu_name(), "threads": options.threads}
    for backend in backends(options.backend):
        target, machine = place(backend, options.activations, options.threads)
        peaks = machine.peak_rates()
        told = ", ".join(f"{name} {peak / 1e9:.0f} GOP/s" for name, peak in peaks.items())
        print(f"# {backend} ({machine.level}): {told}")
        own = []
        for case in cases(options, target):
            own.append(measure(case, machine, peaks, options))
            print(show(own[-1]), flush=True)
        summary[f"peaks {backend}"] = {f"{name}_op_per_s": peak for name, peak in peaks.items()}
        rows += own
        if options.plot:
            plot(own, peaks, options.plot.with_stem(f"{options.plot.stem}-{backend.replace(':', '-')}"))
    write(rows, summary, options)


def write(rows: list[Row], summary: dict[str, Any], options: argparse.Namespace) -> None:
    """Write the requested files, and the JSON object on the last line."""
    clean = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]
    text = json.dumps({**summary, "rows": clean})
    if options.json:
        options.json.write_text(text + "\n")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS)
            table.writeheader()
            table.writerows(clean)
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
