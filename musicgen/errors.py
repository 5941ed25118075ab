"""Every error this project raises on purpose.

    MusicGenError
    ├── InvalidRequestError      the caller can fix it: bad argument, unreadable audio, unknown model name
    ├── OverloadedError          the server cannot take it now; retry later
    ├── QuotaExceededError       the tenant has used up its allowance; retry after it is refilled
    ├── RequestCancelledError    the caller, or a deadline, ended the request
    ├── EngineDeadError          the engine thread failed; the replica must be replaced
    ├── WeightsError             a checkpoint is missing, incomplete or of another shape
    └── MissingDependencyError   an optional package is needed for what was asked

A message says what was expected, what was got, and what to do. `musicgen_kernels.KernelError` stands apart, because
the kernel package does not know this one: it marks a caller's mistake inside the program, never a user's.
"""

from __future__ import annotations


class MusicGenError(Exception):
    """Base of all errors of this project."""


class InvalidRequestError(MusicGenError, ValueError):
    """The request is wrong in itself; the same request will fail again.

    Args:
        expected: what is accepted.
        got: what was given.
        hint: what to do about it.
        param: the name of the offending argument, for API error bodies.
    """

    def __init__(self, expected: str, got: str, hint: str = "", *, param: str | None = None) -> None:
        self.expected, self.got, self.hint, self.param = expected, got, hint, param
        name = f"{param}: " if param else ""
        super().__init__(f"{name}expected {expected}, got {got}" + (f"; {hint}" if hint else ""))


class OverloadedError(MusicGenError):
    """No capacity now; the request was not started."""


class QuotaExceededError(MusicGenError):
    """The tenant's allowance is used up; the request was not started."""


class RequestCancelledError(MusicGenError):
    """The request ended because its caller or its deadline asked for that."""


class EngineDeadError(MusicGenError):
    """The engine failed; no request of this replica can go on."""


class WeightsError(MusicGenError):
    """A checkpoint cannot be used: missing, incomplete, extra or mis-shaped tensors, or an unsafe file."""


class MissingDependencyError(MusicGenError):
    """An optional dependency is not installed; the message names the command that installs it."""
