"""Every error this project raises on purpose.

    MusicGenError
    ├── InvalidRequestError      the caller can fix it: bad argument, unreadable audio, unknown model name
    ├── RetryLaterError          not started; says when to try again, if that is known
    │   ├── OverloadedError      the server cannot take it now
    │   │   └── DeadlineTooShortError   it could not be finished in the time that its caller gives
    │   └── QuotaExceededError   the tenant has used up its allowance
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

    def __reduce__(self) -> tuple[object, ...]:
        return _remake, (type(self), self.args, self.__dict__)


class RetryLaterError(MusicGenError):
    """The request was not started; the same one may be taken later.

    Args:
        retry_after_s: when it is worth trying again; None: unknown.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)

    def __reduce__(self) -> tuple[object, ...]:
        return _remake, (type(self), self.args, self.__dict__)


class OverloadedError(RetryLaterError):
    """No capacity now; the request was not started."""


class DeadlineTooShortError(OverloadedError):
    """It could not be finished in the time that its caller gives, as things are now; the request was not started."""


class QuotaExceededError(RetryLaterError):
    """The tenant's allowance is used up; the request was not started."""


class RequestCancelledError(MusicGenError):
    """The request ended because its caller or its deadline asked for that."""


class EngineDeadError(MusicGenError):
    """The engine failed; no request of this replica can go on."""


class WeightsError(MusicGenError):
    """A checkpoint cannot be used: missing, incomplete, extra or mis-shaped tensors, or an unsafe file."""


class MissingDependencyError(MusicGenError):
    """An optional dependency is not installed; the message names the command that installs it."""


def _remake(kind: type[MusicGenError], args: tuple[object, ...], fields: dict[str, object]) -> MusicGenError:
    """An error that went through a process boundary, as it was."""
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(fields)
    return error
