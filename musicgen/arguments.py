"""Arguments of unknown type, as plain Python values: numbers, flags, lists and paths.

Each function returns its argument or raises InvalidRequestError, which states what was expected and what was given.
NumPy's numbers are accepted, bool is not a number, and nothing is parsed from strings. Independent of torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from numbers import Integral, Number, Real
from typing import TypeVar

from musicgen.errors import InvalidRequestError

T = TypeVar("T")


def shown(value: object) -> str:
    """A value as error messages give it: arrays and models by their type, as their text is long."""
    is_short = value is None or isinstance(value, str | bytes | Number)
    return repr(value) if is_short else f"a value of type {type(value).__name__}"


def checked_int(value: object, expected: str, hint: str = "", *, param: str, low: int, high: int | None = None) -> int:
    """An integer in [`low`, `high`]."""
    if not isinstance(value, bool) and isinstance(value, Integral):
        number = int(value)
        if low <= number and (high is None or number <= high):
            return number
    raise InvalidRequestError(expected, shown(value), hint, param=param)


def checked_float(
    value: object, is_valid: Callable[[float], bool], expected: str, hint: str = "", *, param: str
) -> float:
    """A real number for which `is_valid` is true."""
    if not isinstance(value, bool) and isinstance(value, Real):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if is_valid(number):
            return number
    raise InvalidRequestError(expected, shown(value), hint, param=param)


def checked_bool(value: object, *, param: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequestError("True or False", shown(value), param=param)
    return value


def checked_list(values: Iterable[T], expected: str, hint: str = "", *, param: str) -> list[T]:
    """The items of anything iterable but a string."""
    try:
        if not isinstance(values, str | bytes):
            return list(values)
    except TypeError as error:
        raise InvalidRequestError(expected, shown(values), hint, param=param) from error
    raise InvalidRequestError(expected, shown(values), hint, param=param)


def checked_path(path: object, expected: str = "a path", *, param: str) -> str:
    """A path that the operating system can represent, as a string."""
    try:
        if b"\0" not in os.fsencode(path):  # type: ignore[arg-type]
            return os.fsdecode(path)  # type: ignore[arg-type]
    except (TypeError, UnicodeEncodeError):
        pass
    raise InvalidRequestError(expected, shown(path), param=param)
