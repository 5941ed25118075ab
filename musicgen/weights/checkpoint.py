"""Reads tensors from checkpoint files and loads them into modules by a name map.

A name map gives, for each parameter of a module, its source in the checkpoint: one tensor, several to concatenate along
the first axis, or rows of a fused one. No code in a file is ever executed.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from musicgen.errors import WeightsError
from musicgen.weights.formats import found_instead


@dataclass(frozen=True, slots=True)
class Part:
    """A checkpoint tensor, or rows `start:stop` of its first axis in units of a third (fused Q, K, V)."""

    name: str
    thirds: tuple[int, int] | None = None


NameMap = Mapping[str, tuple[Part, ...]]
"""Module parameter → the parts concatenated into it."""

MAX_NAMES_SHOWN = 8


class TensorSource(Mapping[str, Tensor]):
    """Named tensors of a checkpoint, read on demand.

    Args:
        readers: name → function that reads it.
        origin: their source, for error messages.
    """

    def __init__(self, readers: Mapping[str, Callable[[], Tensor]], origin: str) -> None:
        self._readers, self.origin = readers, origin

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __contains__(self, name: object) -> bool:  # without reading the tensor
        return name in self._readers

    def under(self, prefix: str) -> TensorSource:
        """The tensors whose names start with `prefix`, which is stripped."""
        readers = {n.removeprefix(prefix): r for n, r in self._readers.items() if n.startswith(prefix)}
        return TensorSource(readers, f"{self.origin} ({prefix}*)")


def from_dict(tensors: Mapping[str, Tensor], origin: str) -> TensorSource:
    return TensorSource({name: partial(tensors.__getitem__, name) for name in tensors}, origin)


def from_safetensors(folder: Path, file: str = "model.safetensors") -> TensorSource:
    """The tensors of one file, or of the shards listed in its index. A shard is opened when one of its tensors is read,
    so shards of components that are not loaded may be missing.

    Raises:
        WeightsError: missing or corrupted file, or unreadable index; when reading: missing, corrupted or wrong shard.
    """
    index = folder / f"{file}.index.json"
    if not index.is_file():
        if not (folder / file).is_file():
            found = found_instead(entry.name for entry in folder.iterdir())
            raise WeightsError(f"{folder}: expected {file}, or its shards with {index.name}, {found}")
        only = _SafetensorsFile(folder / file)
        return TensorSource({name: partial(only.read, name) for name in only.names()}, str(folder))
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise WeightsError(f"{index}: expected a weight_map with names; download the checkpoint again")
    shards = {
        shard: _SafetensorsFile(folder / shard, {name for name, its_shard in shard_of.items() if its_shard == shard})
        for shard in set(shard_of.values())
    }
    return TensorSource({name: partial(shards[shard].read, name) for name, shard in shard_of.items()}, str(folder))


class _SafetensorsFile:
    """A file that is opened on first use and memory-mapped: only requested tensors are read from disk.

    Args:
        expected: the names listed in an index.
    """

    def __init__(self, path: Path, expected: Set[str] | None = None) -> None:
        self._path, self._expected = path, expected
        self._handle: Any = None

    def names(self) -> Set[str]:
        return set(self._open().keys())

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._open().get_tensor(name)
        return tensor

    def _open(self) -> Any:
        if self._handle is None:
            if not self._path.is_file():
                raise WeightsError(
                    f"{self._path.parent}: expected {self._path.name}, which is missing; download the checkpoint again"
                )
            try:
                handle: Any = safe_open(self._path, framework="pt")
            except SafetensorError as error:
                raise WeightsError(
                    f"{self._path}: expected a safetensors file, got a damaged or invalid one ({error})"
                ) from error
            if self._expected is not None and self._expected != set(handle.keys()):
                different = sorted(self._expected ^ set(handle.keys()))[:MAX_NAMES_SHOWN]
                raise WeightsError(
                    f"{self._path}: expected the tensors listed in its index, got others ({'; '.join(different)}); "
                    "download the checkpoint again"
                )
            self._handle = handle
        return self._handle


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        WeightsError: missing file, or not a JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: expected a JSON file, got: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def load_bin(path: Path) -> dict[str, object]:
    """Load a `torch.save` file of plain data (tensors, containers, strings), without executing code from it.

    Raises:
        WeightsError: unreadable, not a dictionary, or contains anything that would require executing code.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        try:  # the legacy (pre-zip) format cannot be memory-mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError):
            reason = str(error).splitlines()[0]
            raise WeightsError(f"{path}: expected a file of plain tensors, got: {reason}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a dictionary, got {type(content).__name__}")
    return content


@contextmanager
def unfilled() -> Iterator[None]:
    """Modules created inside have shapes but no values, for `assemble` to fill."""
    with torch.device("meta"), _NoInitialisation():
        yield


class _NoInitialisation(TorchFunctionMode):
    """Skips `nn.init`, which has no effect on the meta device but would import torch's compiler (2 s)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def assemble(module: nn.Module, source: TensorSource, name_map: NameMap, *, ignored: Iterable[str] = ()) -> None:
    """Fill `module` (mutated, may be on the meta device) from `source`.

    Parameters are fp32 in host memory; move or convert the module afterwards.

    Args:
        ignored: source names that are expected but not needed.
    Raises:
        WeightsError: lists all missing, unexpected or mis-shaped tensors.
    """
    wanted = {name: parameter.shape for name, parameter in module.state_dict().items()}
    assert wanted.keys() == name_map.keys(), wanted.keys() ^ name_map.keys()
    used = {part.name for parts in name_map.values() for part in parts}
    missing = sorted(used - source.keys())
    extra = sorted(source.keys() - used - set(ignored))
    misshaped: list[str] = []
    tensors: dict[str, Tensor] = {}
    for name, parts in name_map.items():
        if any(part.name not in source for part in parts):
            continue
        value = torch.cat([_read(source, part) for part in parts]) if parts else torch.empty(0)
        if value.shape != wanted[name]:
            origin = " + ".join(part.name for part in parts)
            misshaped.append(f"{origin}: expected {tuple(wanted[name])}, got {tuple(value.shape)}")
            continue
        tensors[name] = value
    _refuse(source.origin, {"missing": missing, "unexpected": extra, "of the wrong shape": misshaped})
    module.load_state_dict(tensors, assign=True)
    module.requires_grad_(False)


def _read(source: TensorSource, part: Part) -> Tensor:
    tensor = source[part.name].float()
    if part.thirds is None:
        return tensor
    third = tensor.shape[0] // 3
    return tensor[part.thirds[0] * third : part.thirds[1] * third]


def _refuse(origin: str, problems: Mapping[str, list[str]]) -> None:
    """Raise one WeightsError listing all problems, if there are any."""
    found = []
    for what, names in problems.items():
        if names:
            more = f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
            found.append(f"{len(names)} tensors {what}: {'; '.join(names[:MAX_NAMES_SHOWN])}{more}")
    if found:
        raise WeightsError(
            f"{origin}: the tensors do not fit the configuration. {'. '.join(found)}. "
            "Check that configuration and weights belong to the same model, or download both again"
        )
