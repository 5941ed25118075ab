"""Type-checked settings from configuration files: JSON objects and audiocraft's YAML. Independent of any model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import yaml

from musicgen.errors import WeightsError

_REFERENCE = re.compile(r"^\$\{([\w.]+)\}$")
_MAX_REFERENCES = 8
_ABSENT: Any = object()

T = TypeVar("T", int, float, bool, str, list[Any], dict[str, Any])


def complete(given: Mapping[str, Any], defaults: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The settings named in `defaults`, with values from `given` or the defaults.

    A value must have the type of its default (a list if that is a tuple), and integers must be ≥ 1. Settings whose
    default is None are not checked.

    Args:
        origin: source of `given`, for error messages.
    Raises:
        WeightsError: wrong type, or an integer below 1.
    """
    settings = {name: given.get(name, default) for name, default in defaults.items()}
    for name, default in defaults.items():
        value, expected = settings[name], type(default)
        if isinstance(value, tuple):
            settings[name] = value = list(value)
        fits = type(value) is expected and (expected is not int or value >= 1)
        if default is not None and not fits:
            raise WeightsError(f"{origin}: expected {name} as {_kind(expected)}, got {value!r}")
    return settings


class XpConfig:
    """The YAML text under `xp.cfg` in an audiocraft file, accessed by dotted paths.

    audiocraft stores it unresolved: a value such as `${sample_rate}` refers to the value at that path.

    Args:
        origin: source of the text, for error messages.
    Raises:
        WeightsError: not YAML, or not a mapping.
    """

    def __init__(self, text: str, origin: str) -> None:
        try:
            tree = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise WeightsError(f"{origin}: expected YAML under xp.cfg, got: {error}") from error
        if not isinstance(tree, dict):
            raise WeightsError(f"{origin}: expected a mapping under xp.cfg, got {type(tree).__name__}")
        self._tree, self.origin = tree, origin

    def raw(self, path: str, default: Any = _ABSENT) -> Any:
        """The value at `path`, of any type.

        Raises:
            WeightsError: no value and no default, or unresolvable references.
        """
        value = self._follow(path, 0)
        if value is not _ABSENT:
            return value
        if default is _ABSENT:
            raise WeightsError(f"{self.origin}: expected {path} in its configuration")
        return default

    def get(self, path: str, kind: type[T], default: T | None = None) -> T:
        """The value at `path`, which must be of type `kind`; integers must be ≥ 1, floats > 0.

        Args:
            default: for a setting that is absent or null; None: the setting is required.
        Raises:
            WeightsError: see `raw`; or a value of the wrong type.
        """
        value = self.raw(path) if default is None else self.raw(path, default)
        if value is None and default is not None:
            return default
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        if kind in (int, float) and is_number and kind(value) == value:
            return kind(value)
        if kind not in (int, float) and isinstance(value, kind):
            return value
        raise WeightsError(f"{self.origin}: expected {path} as {_kind(kind)}, got {value!r}")

    def require(self, path: str, expected: Any, default: Any = _ABSENT) -> None:
        """Require the `expected` value at `path`.

        Raises:
            WeightsError: another value, as used only by other architectures.
        """
        value = self.raw(path, default)
        if value != expected:
            raise WeightsError(
                f"{self.origin}: expected {path} = {expected!r}, got {value!r}; "
                "only MusicGen's own architecture is supported"
            )

    def _follow(self, path: str, depth: int) -> Any:
        if depth == _MAX_REFERENCES:
            raise WeightsError(f"{self.origin}: expected a value, got circular references at {path}")
        value: Any = self._tree
        for key in path.split("."):
            if not isinstance(value, dict) or key not in value:
                return _ABSENT
            value = value[key]
            if isinstance(value, str) and (reference := _REFERENCE.match(value)):
                value = self._follow(reference.group(1), depth + 1)
        return value


def _kind(kind: type) -> str:
    names = {int: "an integer ≥ 1", float: "a number > 0", bool: "true or false", dict: "a mapping"}
    return names.get(kind, f"a {kind.__name__}")
