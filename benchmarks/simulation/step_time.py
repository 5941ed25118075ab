"""How long a step takes, from what it computes. Knows bytes and FLOPs, or a measured table; no schedule.

The roofline: matrices are read once a step and multiplied with every position; each row's keys and values are read
up to its length. The two parts run one after the other, each as fast as memory or arithmetic allows. Left out:
embeddings, norms, sampling and a text's keys and values when it arrives (each below a percent of a step).
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.simulation.machines import WEIGHT_BYTES, Gpu, Shapes
from musicgen.config import KVDtype, WeightDtype
from musicgen.errors import InvalidRequestError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What one step computes; of `k` steps in a row where a field is an array."""

    num_positions: int
    """New positions of all rows, the same in each of the steps."""
    kv_positions: Floats
    """Positions whose keys and values are read, `[k]`."""
    attended: Floats
    """Pairs of a new position and one that it attends to, `[k]`."""


class StepTime(Protocol):
    """Seconds of each of k steps."""

    def seconds(self, load: StepLoad) -> Floats:
        """`[k]` seconds."""
        ...

    def describe(self) -> str:
        """One line, with every assumption."""
        ...


@dataclass(frozen=True, slots=True)
class Roofline:
    """A bound, or with shares below 1 an estimate.

    Args:
        bandwidth_share, flops_share: of the peaks that are reached (an assumption).
        overhead_s: added to each step: launches and the host's own work (an assumption).
    """

    gpu: Gpu
    shapes: Shapes
    weights: WeightDtype = "bfloat16"
    kv: KVDtype = "bfloat16"
    bandwidth_share: float = 1.0
    flops_share: float = 1.0
    overhead_s: float = 0.0

    def seconds(self, load: StepLoad) -> Floats:
        peak = self.gpu.float32_flops_s if self.weights == "float32" else self.gpu.flops_s
        flops_s, bytes_s = peak * self.flops_share, self.gpu.bytes_s * self.bandwidth_share
        matrices_s = max(
            self.shapes.num_weights * WEIGHT_BYTES[self.weights] / bytes_s,
            load.num_positions * self.shapes.token_flops / flops_s,
        )
        attention_s: Floats = np.maximum(
            load.kv_positions * (self.shapes.kv_bytes(self.kv) / bytes_s),
            load.attended * (self.shapes.attended_flops / flops_s),
        )
        return self.overhead_s + matrices_s + attention_s

    def describe(self) -> str:
        return (
            f"roofline of {self.gpu.name}, {self.shapes.name}, {self.weights} weights, {self.kv} KV, "
            f"{self.bandwidth_share:.0%} of bandwidth, {self.flops_share:.0%} of FLOP/s, "
            f"{self.overhead_s * 1e3:.2f} ms overhead a step"
        )


@dataclass(frozen=True, slots=True)
class MeasuredTable:
    """Least-squares plane through measured steps: seconds = a + b · new positions + c · positions read."""

    base_s: float
    position_s: float
    kv_position_s: float
    source: str
    worst_error: float
    """Largest relative error of the plane at a measured point."""

    @classmethod
    def read(cls, path: Path) -> MeasuredTable:
        """Fit a CSV file with the columns num_positions, kv_positions and seconds.

        Raises:
            InvalidRequestError: missing columns, or points that do not determine a plane.
        """
        names = ("num_positions", "kv_positions", "seconds")
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if not set(names) <= set(reader.fieldnames or ()):
                raise InvalidRequestError(f"columns {', '.join(names)}", str(reader.fieldnames), param="step-table")
            points = np.array([[float(row[name]) for name in names] for row in reader]).reshape(-1, 3)
        inputs = np.column_stack([np.ones(len(points)), points[:, :2]])
        if np.linalg.matrix_rank(inputs) < 3:
            expected = "points that differ in both counts"
            raise InvalidRequestError(expected, f"{len(points)} that do not", param="step-table")
        plane, *_ = np.linalg.lstsq(inputs / points[:, 2:], np.ones(len(points)), rcond=None)
        if plane.min() < 0:
            raise InvalidRequestError("times that grow with both counts", f"{plane}", param="step-table")
        worst = float(np.abs(inputs @ plane / points[:, 2] - 1).max())
        return cls(float(plane[0]), float(plane[1]), float(plane[2]), path.name, worst)

    def seconds(self, load: StepLoad) -> Floats:
        return self.base_s + load.num_positions * self.position_s + load.kv_positions * self.kv_position_s

    def describe(self) -> str:
        return (
            f"plane through {self.source}: {self.base_s * 1e3:.3f} ms + {self.position_s * 1e6:.3f} µs a new position "
            f"+ {self.kv_position_s * 1e9:.3f} ns a position read; worst error {self.worst_error:.1%}"
        )
