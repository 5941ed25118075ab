"""What every shipped GPU kernel costs: registers, spills, shared memory, widest global load; no GPU needed.

    python tests/kernels_gpu/gpu_resources.py            compare all six architectures with resources.json
    python tests/kernels_gpu/gpu_resources.py --update   write the table anew and say what changed
    … --arch 80 90 --only triton --quick                 a part; quick: the kernels of a 16-bit model

Triton kernels are compiled as the backend would launch them: each operation is called with tensors that have
no storage, and a driver that names an architecture stands in for the GPU, so that types, alignments and
constants are those of a real call. CUDA sources are compiled by nvcc with the flags of the real build.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parents[1] / "kernels"))

import gpu_nvcc  # noqa: E402
import gpu_triton_aot  # noqa: E402

TABLE = HERE / "resources.json"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)

Row = dict[str, int]
Rows = dict[str, dict[str, Row]]
"""Kernel → architecture ("sm_80") → figures."""


def measure(only: list[str], architectures: list[int], processes: int, quick: bool = False) -> dict[str, Rows]:
    """Compile and read the figures, by backend."""
    result: dict[str, Rows] = {}
    with ProcessPoolExecutor(processes) as pool:
        for backend in only:
            module = gpu_triton_aot if backend == "triton" else gpu_nvcc
            jobs = [(name, arch) for name in module.variants(quick) for arch in architectures]
            parts = pool.map(module.compile_variant, *zip(*jobs, strict=True))
            rows = result.setdefault(backend, {})
            for (_, arch), part in zip(jobs, parts, strict=True):
                for kernel, row in part.items():
                    rows.setdefault(kernel, {})[f"sm_{arch}"] = row
    return result


def differences(old: Rows, new: Rows, complete: bool) -> list[str]:
    """What changed, one line a figure, with what it means. `complete`: a kernel that is missing counts."""
    lines = [f"{kernel}: in the table, not compiled any more" for kernel in old if complete and kernel not in new]
    for kernel, by_arch in new.items():
        if kernel not in old:
            lines.append(f"{kernel}: new, not in the table")
            continue
        for arch, row in by_arch.items():
            before = old[kernel].get(arch, {})
            for figure, value in row.items():
                if before.get(figure) != value:
                    lines.append(f"{kernel} {arch}: {figure} {before.get(figure)} → {value}; {_MEANING[figure]}")
    return lines


_MEANING = {
    "registers": "the more, the fewer warps fit on a multiprocessor",
    "spill_bytes": "above 0: values travel through local memory, never accepted",
    "shared_bytes": "the more, the fewer blocks fit on a multiprocessor",
    "widest_load_bits": "the narrower, the more instructions for the same bytes",
}


def violations(rows: Rows) -> list[str]:
    """What no table may excuse: spills."""
    return [
        f"{kernel} {arch}: {row['spill_bytes']} bytes spilled"
        for kernel, by_arch in rows.items()
        for arch, row in by_arch.items()
        if row["spill_bytes"]
    ]


def toolchain(backend: str) -> str:
    """The compiler whose figures these are."""
    return gpu_triton_aot.toolchain() if backend == "triton" else gpu_nvcc.toolchain()


def load() -> dict[str, Any]:
    """The checked-in table: backend → {"toolchain": …, "kernels": Rows}."""
    table: dict[str, Any] = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    return table


def compare(backend: str, rows: Rows, complete: bool) -> list[str]:
    """Violations, and differences where the table was made by the same toolchain."""
    entry = load().get(backend, {"toolchain": toolchain(backend), "kernels": {}})
    lines = violations(rows)
    if entry["toolchain"] == toolchain(backend):
        lines += differences(entry["kernels"], rows, complete)
    return lines


def main() -> int:
    """Compare or update; exit status 1 if something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--only", nargs="+", choices=("triton", "cuda"), default=["triton", "cuda"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if "cuda" in options.only and (reason := gpu_nvcc.missing()):
        print(f"cuda left out: {reason}")
        options.only.remove("cuda")
    complete = tuple(options.arch) == ARCHITECTURES and not options.quick
    measured = measure(options.only, options.arch, options.processes, options.quick)
    lines = [line for backend, rows in measured.items() for line in compare(backend, rows, complete)]
    print("\n".join(lines) or "no difference")
    for backend, rows in measured.items():
        print(f"{backend} ({toolchain(backend)}): {len(rows)} kernels × {len(options.arch)} architectures")
    if options.update:
        _write(measured, complete)
    return bool(lines) and not options.update


def _write(measured: dict[str, Rows], complete: bool) -> None:
    table = load()
    for backend, rows in measured.items():
        old = {} if complete else table.get(backend, {}).get("kernels", {})
        merged = {kernel: {**old.get(kernel, {}), **by_arch} for kernel, by_arch in rows.items()}
        kernels = dict(sorted({**old, **merged}.items()))
        table[backend] = {"toolchain": toolchain(backend), "kernels": kernels}
    text = json.dumps(table, indent=1, sort_keys=True)
    TABLE.write_text(_one_line_rows(text) + "\n")


def _one_line_rows(text: str) -> str:
    """One line an architecture: a diff then shows the figures side by side."""
    import re

    return re.sub(r"\{\s+(\"registers\"[^}]*?)\s+\}", lambda m: "{" + re.sub(r"\s+", " ", m[1]) + "}", text)


if __name__ == "__main__":
    sys.exit(main())
