"""Fuzz the service with malformed requests: `python -m benchmarks.fuzz_serving --requests 20000`.

Runs the whole service in one process (demo model, short pieces) and four concurrent fuzzers in separate processes:
schemathesis on the OpenAPI document, mutated protobufs, corrupt recordings, malformed HTTP. There must be no 5xx
(except 503 for overload and 504 for a deadline) or INTERNAL and no missing response, and pages, files, tasks and
requests must return to their initial numbers. Prints tables, then one line of JSON; the exit status is 0 on success.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.machine import load_average
from benchmarks.serving_fuzzers import FUZZERS, Findings
from benchmarks.serving_local import Held, LocalProcess, local_process
from benchmarks.serving_report import aligned

SHARES = {"openapi": 0.4, "protobuf": 0.35, "audio": 0.2, "wire": 0.05}
WARM_UP_SHARE = 0.15
"""Fraction of requests sent before the memory baseline is taken, to fill caches and allocators."""
MAX_GROWTH_BYTES = 120 * 2**20
SETTLE_S = 45.0
SETTINGS = {
    "models": [{"name": "demo", "kv_memory_bytes": 64 * 2**20, "num_threads": 1, "max_requests": 8}],
    "limits": {"max_duration_s": 1.0, "max_file_bytes": 2_000_000, "max_recording_s": 2.0, "reader_stall_s": 5.0},
}


@dataclass(frozen=True, slots=True)
class Result:
    """A finished fuzzing run."""

    before: Held
    warm: Held
    after: Held
    found: dict[str, Findings]
    problems: list[str]
    seconds: float


def fuzz(num_requests: int, seed: int, settings: dict[str, Any] | None = None) -> Result:
    """Send about `num_requests` and compare resources before and after."""
    began = time.time()
    with local_process(settings or SETTINGS) as local:
        before = local.look()
        num_warm = round(WARM_UP_SHARE * num_requests)
        first = _send(local, num_warm, seed)
        warm = settled(local, before)
        second = _send(local, num_requests - num_warm, seed + 1000)
        after = settled(local, before)
    found = {name: _sum(first[name], second[name]) for name in FUZZERS}
    return Result(before, warm, after, found, problems(before, warm, after, found), time.time() - began)


def _send(local: LocalProcess, num: int, seed: int) -> dict[str, Findings]:
    """Run all fuzzers concurrently."""
    running = {}
    for name, share in SHARES.items():
        arguments = [name, local.http_url, local.grpc_url, str(max(1, round(num * share))), str(seed)]
        command = [sys.executable, "-m", "benchmarks.fuzz_serving", "--child", *arguments]
        running[name] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    found = {}
    for name, process in running.items():
        output, _ = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"fuzzer {name!r} failed; see its output above")
        found[name] = Findings(**json.loads(output.splitlines()[-1]))
    return found


def settled(local: LocalProcess, before: Held) -> Held:
    """Resources held once the service is idle, or after `SETTLE_S`."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        held = local.look()
        idle = held.running == held.pieces == 0
        idle = idle and held.num_files <= before.num_files and held.num_tasks <= before.num_tasks
        if idle or time.monotonic() > deadline:
            return held
        time.sleep(0.5)


def _sum(first: Findings, second: Findings) -> Findings:
    counts = dict(first.by_answer)
    for name, count in second.by_answer.items():
        counts[name] = counts.get(name, 0) + count
    return Findings(
        num_sent=first.num_sent + second.num_sent,
        by_answer=counts,
        bad=[*first.bad, *second.bad],
        num_bad=first.num_bad + second.num_bad,
        longest_s=max(first.longest_s, second.longest_s),
    )


def problems(before: Held, warm: Held, after: Held, found: dict[str, Findings]) -> list[str]:
    """Descriptions of all violations; empty if none."""
    failed = [f"{name}: {text}" for name, findings in found.items() for text in findings.bad]
    for name, held in (("after the warm-up", warm), ("at the end", after)):
        for what in ("running", "pieces", "backlog"):
            if getattr(held, what):
                failed.append(f"{name}: expected 0 {what}, got {getattr(held, what)}")
        if held.balanced != "yes":
            failed.append(f"{name}: {held.balanced}")
        if held.admitted != sum(held.ended.values()):
            failed.append(f"{name}: {held.admitted} admitted, but {held.ended} ended")
        if held.engine["accepted"] != sum(held.engine[n] for n in ("finished", "cancelled", "failed")):
            failed.append(f"{name}: the engine's counters do not balance: {held.engine}")
    if after.pages > before.pages:
        failed.append(f"{after.pages} pages held at the end, {before.pages} at the start")
    if after.num_files > before.num_files + 2:
        failed.append(f"{after.num_files} open files at the end, {before.num_files} at the start")
    if after.num_tasks > before.num_tasks + 2:
        failed.append(f"{after.num_tasks} tasks at the end, {before.num_tasks} at the start")
    if after.rss_bytes > warm.rss_bytes + MAX_GROWTH_BYTES:
        failed.append(f"{after.rss_bytes / 1e6:.0f} MB at the end, {warm.rss_bytes / 1e6:.0f} MB after the warm-up")
    return failed


def table(result: Result) -> str:
    """Tables of requests with their responses, and of resources held."""
    rows = [("fuzzer", "sent", "responses", "slowest, s", "findings")]
    for name, findings in result.found.items():
        answers = sorted(findings.by_answer.items(), key=lambda item: -item[1])
        text = ", ".join(f"{count} {answer}" for answer, count in answers)
        rows.append((name, str(findings.num_sent), text, f"{findings.longest_s:.2f}", str(findings.num_bad)))
    return aligned(rows) + "\n\n" + aligned(_held_rows(result))


def _held_rows(result: Result) -> Sequence[Sequence[str]]:
    columns = (result.before, result.warm, result.after)
    rows: list[list[str]] = [["held", "before", "after the warm-up", "at the end"]]
    rows.append(["resident MB", *(f"{held.rss_bytes / 1e6:.0f}" for held in columns)])
    for name in ("num_files", "num_threads", "num_tasks", "pages", "pieces", "running", "backlog", "admitted"):
        rows.append([name.removeprefix("num_"), *(str(getattr(held, name)) for held in columns)])
    for name in ("finished", "cancelled", "failed"):
        rows.append([name, *(str(held.ended[name]) for held in columns)])
    rows.append(["rejected", *(str(sum(held.rejected.values())) for held in columns)])
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, http_url, grpc_url, num, seed = args.child
        print(json.dumps(asdict(FUZZERS[name](http_url, grpc_url, int(num), int(seed)))))
        return 0
    result = fuzz(args.requests, args.seed)
    print(table(result))
    for problem in result.problems:
        print(f"problem: {problem}")
    num_sent = sum(findings.num_sent for findings in result.found.values())
    print(f"{num_sent} requests in {result.seconds:.0f} s, load average {load_average():.1f}")
    figures = {"benchmark": "fuzz_serving", "requests": num_sent, "seed": args.seed, **asdict(result)}
    print(json.dumps(figures))
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
