"""All errors that this project raises deliberately.

    MusicGenError
    ├── InvalidRequestError      fixable by the caller: bad argument, unreadable audio, unknown model name
    ├── RetryLaterError          not started; carries a retry delay if it is known
    │   ├── OverloadedError      no capacity at the moment
    │   └── QuotaExceededError   the tenant's quota is used up
    ├── DeadlineTooShortError    cannot be finished before its deadline
    ├── RequestCancelledError    cancelled by the caller or a deadline
    ├── EngineDeadError          the engine thread failed; the replica must be replaced
    ├── InternalError            one request cannot be computed; a bug, but others are unaffected
    ├── WeightsError             missing, incomplete or incompatible checkpoint
    └── MissingDependencyError   an optional package is required

Messages state what was expected, what was given and what to do. `musicgen_kernels.KernelError` is separate, because
the kernel package does not depend on this one; it indicates a bug in the calling code, never a user's mistake.
"""

from __future__ import annotations


class MusicGenError(Exception):
    """Base class of all errors of this project."""


class InvalidRequestError(MusicGenError, ValueError):
    """The request is invalid; retrying it unchanged will fail again.

    Args:
        expected: what is accepted.
        got: what was given; empty to omit it from the message.
        hint: how to fix it.
        param: the name of the offending argument, for API error bodies.
    """

    def __init__(self, expected: str, got: str, hint: str = "", *, param: str | None = None) -> None:
        self.expected, self.got, self.hint, self.param = expected, got, hint, param
        name = f"{param}: " if param else ""
        given = f", got {got}" if got else ""
        super().__init__(f"{name}expected {expected}{given}" + (f"; {hint}" if hint else ""))

    def __reduce__(self) -> tuple[object, ...]:
        return _remake, (type(self), self.args, self.__dict__)


class RetryLaterError(MusicGenError):
    """The request was not started; it may be accepted later.

    Args:
        retry_after_s: suggested delay before a retry; None: unknown.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)

    def __reduce__(self) -> tuple[object, ...]:
        return _remake, (type(self), self.args, self.__dict__)


class OverloadedError(RetryLaterError):
    """No capacity at the moment; the request was not started."""


class QuotaExceededError(RetryLaterError):
    """The tenant's quota is used up; the request was not started."""


class DeadlineTooShortError(MusicGenError):
    """The request was not started, because it cannot be finished before its deadline. A retry needs more time."""


class RequestCancelledError(MusicGenError):
    """The request was cancelled by its caller or its deadline."""


class EngineDeadError(MusicGenError):
    """The engine failed; none of this replica's requests can continue."""


class InternalError(MusicGenError):
    """One request cannot be computed although it is valid; retrying it is pointless. Others are unaffected."""


class WeightsError(MusicGenError):
    """A checkpoint cannot be used: missing, unexpected or mis-shaped tensors, or an unsafe file."""


class MissingDependencyError(MusicGenError):
    """An optional dependency is not installed; the message names the command that installs it."""


def _remake(kind: type[MusicGenError], args: tuple[object, ...], fields: dict[str, object]) -> MusicGenError:
    """Rebuild an unpickled error with its original fields."""
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(fields)
    return error
