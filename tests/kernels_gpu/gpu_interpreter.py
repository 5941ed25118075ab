"""pytest plugin for Triton's interpreter: products of matrices whose rows do not depend on their place.

The interpreter hands `tl.dot` to NumPy, and so to a BLAS that on some processors sums the rows at the edge of its own
tiles in another order. A GPU's matrix instructions treat all rows of a tile alike, which is what the tests of row
invariance are about.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from triton.runtime import interpreter

Array = NDArray[Any]


def pytest_configure(config: pytest.Config) -> None:
    """Replace the interpreter's product."""
    interpreter.InterpreterBuilder.create_dot = _create_dot


def _create_dot(_builder: object, a: Any, b: Any, d: Any, _input_precision: object, _max_imprecise: object) -> Any:
    """d + a b, one input after the other for every element."""
    dtype = d.data.dtype
    left, right = a.data.astype(dtype), b.data.astype(dtype)
    total = np.zeros(d.data.shape, dtype)
    for k in range(left.shape[-1]):
        total += left[..., k : k + 1] * right[..., k : k + 1, :]
    return interpreter.TensorHandle(total + d.data, d.dtype.scalar)
