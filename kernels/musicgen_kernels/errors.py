"""The errors of the kernel package.

- KernelError
    - KernelArgumentError: an argument has the wrong shape, dtype, device, layout or value (also a ValueError)
    - BackendUnavailableError: the requested backend cannot run here; the message says why
"""

from __future__ import annotations


class KernelError(Exception):
    """Base of all errors of this package."""


class KernelArgumentError(KernelError, ValueError):
    """Invalid argument: nothing was computed or written.

    Args:
        argument: the name of the offending argument.
        expected: what is accepted.
        got: what was given.
        hint: how to fix it.
    """

    def __init__(self, argument: str, expected: str, got: str, hint: str = "") -> None:
        self.argument, self.expected, self.got, self.hint = argument, expected, got, hint
        super().__init__(f"{argument}: expected {expected}, got {got}" + (f"; {hint}" if hint else ""))


class BackendUnavailableError(KernelError):
    """The requested backend cannot run on this machine, or does not implement the operation.

    Args:
        backend: its name.
        reason: why it cannot be used, and how to make it usable.
    """

    def __init__(self, backend: str, reason: str) -> None:
        self.backend, self.reason = backend, reason
        super().__init__(f"backend {backend!r} cannot be used: {reason}")
