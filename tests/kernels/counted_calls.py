"""The kernel calls whose instructions are counted: run under callgrind by `instruction_counts.py`, one thread, without
torch, on one compiled library.

    python counted_calls.py LEVEL LIBRARY CASE

Every array is made here from a fixed seed, so that a count depends on the library alone.
"""

from __future__ import annotations

import random
import struct
import sys
from array import array
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from importlib.util import module_from_spec
from typing import Any

ROWS, HEADS, HEAD_DIM, POSITIONS, PAGE_LEN = 2, 8, 64, 1008, 16
REQUESTS, CODEBOOKS, CODES, STEPS, TOP_K = 16, 4, 2048, 16, 250
FEATURES = 1024
FP16, INT8 = 2, 3  # csrc/include/attention.h
PACKED = {"int8": (2, 128, 8), "int4": (3, 32, 4)}  # kind in csrc/include/linear.h, group, bits
HEADER_BYTES = 64


def ints(values: object) -> array[int]:
    """int32, as the kernels take indices."""
    return array("i", values)  # type: ignore[arg-type]


def at(data: array[Any]) -> int:
    """Address of the first element."""
    return data.buffer_info()[0]


def load(level: str, library: str) -> Any:
    """The compiled module from its file, without the package around it."""
    name = f"_cpu_{level}"
    loader = ExtensionFileLoader(name, library)
    module = module_from_spec(ModuleSpec(name, loader, origin=library))
    loader.exec_module(module)
    return module


def attention(native: Any, kind: int) -> None:
    """Decode: one query a row over POSITIONS positions in shuffled pages."""
    generator = random.Random(1)
    pages_per_row = -(-POSITIONS // PAGE_LEN)
    num_pages = ROWS * pages_per_row
    elements = num_pages * HEADS * PAGE_LEN * HEAD_DIM
    if kind == INT8:
        pages = array("b", generator.randbytes(elements))
    else:
        block = struct.pack("<4096e", *(generator.gauss(0.0, 1.0) for _ in range(4096)))
        pages = array("b", block * (elements // 4096))
    scales = array("f", [0.01] * (num_pages * HEADS * PAGE_LEN))
    order = list(range(num_pages))
    generator.shuffle(order)
    query = array("f", (generator.gauss(0.0, 1.0) for _ in range(ROWS * HEADS * HEAD_DIM)))
    out = array("f", bytes(4 * len(query)))
    table, offsets, lens = ints(order), ints(range(ROWS + 1)), ints([POSITIONS] * ROWS)
    cache = (at(pages), at(pages), at(scales), at(scales), kind, num_pages, HEADS, HEAD_DIM)
    rows = (at(table), at(offsets), at(lens), ROWS, pages_per_row)
    strides = (HEADS * HEAD_DIM, HEAD_DIM)
    native.paged_attention(cache, rows, True, at(query), *strides, HEAD_DIM**-0.5, at(out), ROWS, 1)
    check(out)


def linear(native: Any, kind: str) -> None:
    """Two rows by a square matrix, as at a decode step with guidance."""
    generator = random.Random(2)
    number, group, bits = PACKED[kind]
    codes = FEATURES * FEATURES * bits // 8
    scale = struct.pack("<H", 0x3C00)  # bfloat16, 2⁻⁷
    packed = array("B", bytes(HEADER_BYTES) + generator.randbytes(codes) + scale * (FEATURES * FEATURES // group))
    x = array("f", (generator.gauss(0.0, 1.0) for _ in range(ROWS * FEATURES)))
    y = array("f", bytes(4 * ROWS * FEATURES))
    matrix = (at(packed), HEADER_BYTES + codes, number, FEATURES, FEATURES, group)
    native.linear(*matrix, at(x), 0, 0, at(y), ROWS, False, 1)
    check(y)


def sampling(native: Any) -> None:
    """REQUESTS requests with guidance and top-k."""
    generator = random.Random(3)
    one = array("f", (generator.gauss(0.0, 3.0) for _ in range(2 * CODEBOOKS * CODES)))
    each = range(REQUESTS)
    tensors: list[array[Any]] = [
        one * REQUESTS, ints(range(0, 2 * REQUESTS + 1, 2)), ints(each), ints([10 for _ in each]),
        ints([100 for _ in each]), array("q", each), array("f", [3.0 for _ in each]), array("f", [0.0 for _ in each]),
        array("f", [1.0 for _ in each]), ints([TOP_K for _ in each]), array("f", [0.0 for _ in each]),
        ints(range(CODEBOOKS)), ints([-1] * (REQUESTS * CODEBOOKS * STEPS)), ints([-1] * (REQUESTS * CODEBOOKS)),
    ]  # fmt: skip
    sizes = (REQUESTS, 2 * REQUESTS, REQUESTS, STEPS, CODEBOOKS, CODES)
    native.delayed_sample_step(tuple(at(tensor) for tensor in tensors), sizes, 1)
    if not all(0 <= code < CODES for code in tensors[-1]):
        raise SystemExit("codes out of range")


def check(result: array[float]) -> None:
    """A call that did nothing, or overflowed, is not worth counting."""
    if not (any(result) and all(abs(value) < 1e6 for value in result)):
        raise SystemExit("the result is zero or not finite")


CASES: dict[str, Callable[[Any], None]] = {
    "attention fp16": lambda native: attention(native, FP16),
    "attention int8": lambda native: attention(native, INT8),
    "sampling": sampling,
    "linear int8": lambda native: linear(native, "int8"),
    "linear int4": lambda native: linear(native, "int4"),
}

if __name__ == "__main__":
    _, level, library, *names = sys.argv
    module = load(level, library)
    for name in names:
        CASES[name](module)
