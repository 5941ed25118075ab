"""Which backend runs an operation: decided once per (operation, device, dtype), and told by `report`.

A backend's name is `reference`, `cpu`, `cuda` or `triton`; `cpu:avx2` (baseline, avx2, avx512) asks for one
instruction-set level. Order of preference: the `backend` argument, then the environment variable
MUSICGEN_KERNELS_BACKEND (`cpu`, or a list such as `linear=reference,paged_attention=cpu`), then the first
that supports the case in the order that `preference` gives. It knows the backends by name only; what each
supports is the backend module's own answer (`unavailable`).
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
# The CUDA product reads the weights once for every 4 rows of x; Triton's once for every 16, and multiplies 16-bit x on
# tensor cores: no more bytes at a decode step, far fewer at prefill. That is counted from the code, not measured.
# The choice may not depend on the number of rows: a row's bits would then change with the batch around it.
_PREFERENCE_OF = {("cuda", "linear"): ("triton", "cuda", "reference")}


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen for one operation, and why.

    Attributes:
        operation: one of OPERATIONS.
        backend: one of BACKENDS.
        reason: one line for a person.
    """

    operation: str
    backend: str
    reason: str


@functools.cache
def _load(backend: str) -> object:
    """What holds the backend's functions: its module, or for `cpu:level` that level; a str says why there is
    none.
    """
    name, _, level = backend.partition(":")
    if name not in BACKENDS or (level and name != "cpu"):
        return f"no such backend; there are {', '.join(BACKENDS)} and cpu:baseline, cpu:avx2, cpu:avx512"
    try:
        module = importlib.import_module(f"{__package__}.{name}")
        return module.load(level or None) if name == "cpu" else module
    except (ImportError, BackendUnavailableError) as error:
        return str(error)


def unavailable(backend: str, operation: str, device: str, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot run the operation on that device ("cuda:1") and dtype; None when it can."""
    module = _load(backend)
    if isinstance(module, str):
        return module
    if not hasattr(module, operation):
        return f"it does not offer {operation}"
    reason: str | None = getattr(module, "unavailable")(operation, device, dtype)  # noqa: B009
    return reason


def preference(operation: str, device: str) -> tuple[str, ...]:
    """The backends of a device, in the order in which the operation tries them."""
    device_type = device.partition(":")[0]
    return _PREFERENCE_OF.get((device_type, operation), _PREFERENCE.get(device_type, ("reference",)))


@functools.cache
def choose(operation: str, device: str, dtype: torch.dtype, wanted: str | None) -> Choice:
    """Choose a backend. `wanted` names one, None leaves it to preference. GPUs of one machine may differ.

    Raises:
        BackendUnavailableError: the one asked for cannot run this case.
    """
    if wanted is not None:
        reason = unavailable(wanted, operation, device, dtype)
        if reason is not None:
            raise BackendUnavailableError(wanted, f"{operation} on {device} {dtype}: {reason}")
        return Choice(operation, wanted, "asked for")
    refused: list[str] = []
    for name in preference(operation, device):
        reason = unavailable(name, operation, device, dtype)
        if reason is None:
            return Choice(operation, name, "; ".join(refused) or "the first choice for this device")
        refused.append(f"not {name}: {reason}")
    raise BackendUnavailableError("any", f"{operation} on {device} {dtype}: " + "; ".join(refused))


def from_environment(operation: str) -> str | None:
    """The backend that MUSICGEN_KERNELS_BACKEND names for this operation; None when it names none.

    Raises:
        BackendUnavailableError: the variable cannot be read.
    """
    text = os.environ.get(ENVIRONMENT)
    if not text:
        return None
    found = None
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = item.rpartition("=")
        if name and name not in OPERATIONS:
            raise BackendUnavailableError(item, f"{ENVIRONMENT} names no operation {name!r}")
        if not name or name == operation:
            found = value
    return found


def implementation(operation: str, device: torch.device, dtype: torch.dtype, backend: str | None) -> Callable[..., Any]:
    """The function that runs the operation.

    Raises:
        BackendUnavailableError: the backend asked for, by argument or environment, cannot run this case.
    """
    function: Callable[..., Any] = getattr(_chosen(operation, device, dtype, backend), operation)
    return function


def prepared(
    operation: str, device: torch.device, dtype: torch.dtype, backend: str | None, arguments: tuple[object, ...]
) -> Callable[[], None]:
    """The operation on those arguments, to be called as often as is wanted.

    A backend that can do some of it once offers `prepare_` and the operation's name.

    Raises:
        BackendUnavailableError: as `implementation`.
    """
    chosen = _chosen(operation, device, dtype, backend)
    prepare: Callable[..., Callable[[], None]] | None = getattr(chosen, f"prepare_{operation}", None)
    return functools.partial(getattr(chosen, operation), *arguments) if prepare is None else prepare(*arguments)


def _chosen(operation: str, device: torch.device, dtype: torch.dtype, backend: str | None) -> Any:
    return _load(choose(operation, str(device), dtype, backend or from_environment(operation)).backend)


def report(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Choice]:
    """What would run each operation on that device and dtype, and why."""
    return [choose(name, device, dtype, from_environment(name)) for name in OPERATIONS]
