"""Duration of a step from its work: a roofline model, or a measured table. Independent of the schedule.

The roofline: matrices are read once per step and multiplied with every position; each row's KV is read up to its
length. The two phases run one after another, each as fast as memory or arithmetic allows. Not modelled: embeddings,
norms, sampling, and computing a text's KV on arrival (each below 1 % of a step).
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
    """Work of one step; array fields cover `k` consecutive steps."""

    num_positions: int
    """New positions over all rows, the same in each step."""
    kv_positions: Floats
    """Positions whose KV is read, `[k]`."""
    attended: Floats
    """Pairs of a new and an attended position, `[k]`."""


class StepTime(Protocol):
    """Model of step durations."""

    def seconds(self, load: StepLoad) -> Floats:
        """`[k]` seconds."""
        ...

    def describe(self) -> str:
        """All assumptions, in one line."""
        ...


@dataclass(frozen=True, slots=True)
class Roofline:
    """A bound or, with fractions below 1, an estimate.

    Args:
        bandwidth_share, flops_share: assumed fractions of the peaks.
        overhead_s: assumed launch and host overhead per step.
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
            f"{self.overhead_s * 1e3:.2f} ms overhead per step"
        )


@dataclass(frozen=True, slots=True)
class MeasuredTable:
    """Least-squares fit of measured steps: seconds = a + b · new positions + c · positions read."""

    base_s: float
    position_s: float
    kv_position_s: float
    source: str
    worst_error: float
    """Largest relative error of the fit at a measured point."""

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
            raise InvalidRequestError(expected, f"{len(points)} degenerate points", param="step-table")
        plane, *_ = np.linalg.lstsq(inputs / points[:, 2:], np.ones(len(points)), rcond=None)
        if plane.min() < 0:
            raise InvalidRequestError("times that grow with both counts", f"coefficients {plane}", param="step-table")
        worst = float(np.abs(inputs @ plane / points[:, 2] - 1).max())
        return cls(float(plane[0]), float(plane[1]), float(plane[2]), path.name, worst)

    def seconds(self, load: StepLoad) -> Floats:
        return self.base_s + load.num_positions * self.position_s + load.kv_positions * self.kv_position_s

    def describe(self) -> str:
        return (
            f"fit of {self.source}: {self.base_s * 1e3:.3f} ms + {self.position_s * 1e6:.3f} µs per new position "
            f"+ {self.kv_position_s * 1e9:.3f} ns per position read; worst error {self.worst_error:.1%}"
        )
