"""Settings of a configuration file, completed by their defaults and checked by type. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from musicgen.errors import WeightsError


def complete(given: Mapping[str, Any], defaults: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The settings that `defaults` names, each as given or as there.

    A value is of its default's type (a tuple may stand for a list), and a whole number at least 1. What a default of
    None stands for is the caller's to check.

    Args:
        origin: where `given` comes from, for the message.
    Raises:
        WeightsError: a value of another type, or a whole number below 1.
    """
    settings = {name: given.get(name, default) for name, default in defaults.items()}
    for name, default in defaults.items():
        value, expected = settings[name], type(default)
        if isinstance(value, tuple):
            settings[name] = value = list(value)
        fits = type(value) is expected and (expected is not int or value >= 1)
        if default is not None and not fits:
            kind = "an integer ≥ 1" if expected is int else f"a {expected.__name__}"
            raise WeightsError(f"{origin}: expected {name} as {kind}, got {value!r}")
    return settings
