"""Backend selection: decided once per (operation, device, dtype, head dim), and reported by `report`.

Backend names are `reference`, `cpu`, `cuda` and `triton`; `cpu:avx2` (baseline, avx2, avx512) selects one
instruction-set level. Precedence: the `backend` argument, then the environment variable MUSICGEN_KERNELS_BACKEND
(`cpu`, or a list such as `linear=reference,paged_attention=cpu`), then the first backend in the order of `preference`
that supports the case. Each backend module reports what it supports (`unavailable`).
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .errors import BackendUnavailableError

ENVIRONMENT = "MUSICGEN_KERNELS_BACKEND"
BACKENDS = ("reference", "cpu", "cuda", "triton")
OPERATIONS = (
    "append_paged_kv",
    "paged_attention",
    "cross_attention",
    "delayed_sample_step",
    "linear",
    "layer_norm",
    "embed_codes",
)
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
# The CUDA product reads the weights once per 4 rows of x; Triton's once per 16, with tensor cores for 16-bit x: no more
# bytes in a decode step, far fewer in prefill. These are counts from the code, not measurements. The choice must not
# depend on the number of rows: results would then change with the batch.
_PREFERENCE_OF = {("cuda", "linear"): ("triton", "cuda", "reference")}


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend chosen for one operation, and why.

    Attributes:
        operation: one of OPERATIONS.
        backend: one of BACKENDS.
        reason: one line, human-readable.
    """

    operation: str
    backend: str
    reason: str


@functools.cache
def _load(backend: str) -> object:
    """The object with the backend's functions: its module, or the level for `cpu:level`; a str with the reason if
    there is none.
    """
    name, _, level = backend.partition(":")
    if name not in BACKENDS or (level and name != "cpu"):
        return f"unknown backend; use one of {', '.join(BACKENDS)}, cpu:baseline, cpu:avx2, cpu:avx512"
    try:
        module = importlib.import_module(f"{__package__}.{name}")
        return module.load(level or None) if name == "cpu" else module
    except (ImportError, BackendUnavailableError) as error:
        return str(error)


def unavailable(
    backend: str, operation: str, device: str, dtype: torch.dtype, head_dim: int | None = None
) -> str | None:
    """Why `backend` cannot run the operation on that device ("cuda:1"), dtype and head dim (None: any that it
    supports); None when it can.
    """
    module = _load(backend)
    if isinstance(module, str):
        return module
    if not hasattr(module, operation):
        return f"does not implement {operation}"
    reason: str | None = getattr(module, "unavailable")(operation, device, dtype, head_dim)  # noqa: B009
    return reason


def preference(operation: str, device: str) -> tuple[str, ...]:
    """The backends for an operation on a device, in order of preference."""
    device_type = device.partition(":")[0]
    return _PREFERENCE_OF.get((device_type, operation), _PREFERENCE.get(device_type, ("reference",)))


@functools.cache
def choose(operation: str, device: str, dtype: torch.dtype, wanted: str | None, head_dim: int | None = None) -> Choice:
    """Choose a backend: `wanted`, or by preference if None. The result may differ between GPUs of one machine.

    Raises:
        BackendUnavailableError: the requested backend cannot run this case.
    """
    if wanted is not None:
        reason = unavailable(wanted, operation, device, dtype, head_dim)
        if reason is not None:
            raise BackendUnavailableError(wanted, f"{operation} on {device} {dtype}: {reason}")
        return Choice(operation, wanted, "requested")
    refused: list[str] = []
    for name in preference(operation, device):
        reason = unavailable(name, operation, device, dtype, head_dim)
        if reason is None:
            return Choice(operation, name, "; ".join(refused) or "default for this device")
        refused.append(f"not {name}: {reason}")
    raise BackendUnavailableError("any", f"{operation} on {device} {dtype}: " + "; ".join(refused))


def from_environment(operation: str) -> str | None:
    """The backend that MUSICGEN_KERNELS_BACKEND names for this operation; None when it names none.

    Raises:
        BackendUnavailableError: the variable is malformed.
    """
    text = os.environ.get(ENVIRONMENT)
    if not text:
        return None
    found = None
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = item.rpartition("=")
        if name and name not in OPERATIONS:
            raise BackendUnavailableError(item, f"{ENVIRONMENT} names an unknown operation {name!r}")
        if not name or name == operation:
            found = value
    return found


def implementation(
    operation: str, device: torch.device, dtype: torch.dtype, backend: str | None, head_dim: int | None = None
) -> Callable[..., Any]:
    """The function that runs the operation.

    Raises:
        BackendUnavailableError: the backend requested by argument or environment cannot run this case.
    """
    function: Callable[..., Any] = getattr(_chosen(operation, device, dtype, backend, head_dim), operation)
    return function


def prepared(
    operation: str, device: torch.device, dtype: torch.dtype, backend: str | None, arguments: tuple[object, ...]
) -> Callable[[], None]:
    """The operation bound to its arguments, for repeated calls.

    Backends that can hoist work out of the calls implement `prepare_<operation>`.

    Raises:
        BackendUnavailableError: see `implementation`.
    """
    chosen = _chosen(operation, device, dtype, backend)
    prepare: Callable[..., Callable[[], None]] | None = getattr(chosen, f"prepare_{operation}", None)
    return functools.partial(getattr(chosen, operation), *arguments) if prepare is None else prepare(*arguments)


def _chosen(
    operation: str, device: torch.device, dtype: torch.dtype, backend: str | None, head_dim: int | None = None
) -> Any:
    return _load(choose(operation, str(device), dtype, backend or from_environment(operation), head_dim).backend)


def report(device: str = "cpu", dtype: torch.dtype = torch.float32, head_dim: int | None = None) -> list[Choice]:
    """The backend of each operation on that device, dtype and head dim, and why."""
    dtypes = {"delayed_sample_step": torch.float32}  # of the logits, in every model
    return [choose(name, device, dtypes.get(name, dtype), from_environment(name), head_dim) for name in OPERATIONS]


def fallbacks(device: str, head_dim: int) -> list[Choice]:
    """The operations on a device for which the slow reference was chosen without being requested."""
    slow = [choice for choice in report(device, head_dim=head_dim) if choice.backend == "reference"]
    return [choice for choice in slow if from_environment(choice.operation) is None]
