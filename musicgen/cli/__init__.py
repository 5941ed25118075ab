"""Entry point of the `musicgen` command: parses arguments, runs a subcommand, maps errors to one line and an exit code.

Subcommand modules are imported lazily, which keeps `--help` fast.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence

from musicgen.cli import plugins
from musicgen.cli.interrupt import Terminated
from musicgen.cli.parser import parse
from musicgen.errors import InvalidRequestError, MusicGenError

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143
DEBUG = "MUSICGEN_DEBUG"
"""Environment variable: 1 shows the traceback of errors."""
MAX_LINE_LEN = 2000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the arguments after `musicgen`; None: `sys.argv[1:]`.
    Returns:
        The exit code: 0 success, 1 failure, 2 bad input, 130 interrupted, 143 terminated.
    Raises:
        SystemExit: after `--help` and `--version` (0), and for invalid arguments (2).
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # for text that the terminal cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    namespace = parse(sys.argv[1:] if arguments is None else arguments)
    if namespace.command is None:
        return 0
    try:
        code = _run(vars(namespace))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as interrupt:
        terminated = isinstance(interrupt, Terminated)
        notes = ["terminated" if terminated else "interrupted", *getattr(interrupt, "__notes__", [])]
        print(f"\nmusicgen: {'; '.join(notes)}", file=sys.stderr)
        return EXIT_TERMINATED if terminated else EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has exited
        _discard_stdout()
        return EXIT_FAILED
    except Exception as error:
        if os.environ.get(DEBUG) == "1":
            raise
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            _discard_stdout()
            error = MusicGenError(f"cannot write to stdout: {error.strerror}")
        print(f"musicgen: error: {_one_line(error)}", file=sys.stderr)
        return EXIT_BAD_INPUT if isinstance(error, InvalidRequestError) else EXIT_FAILED


def _discard_stdout() -> None:
    """Keep Python from failing again when it flushes stdout at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(error: Exception) -> str:
    """The error as one line. Unexpected errors are prefixed with their type, with a hint how to get the traceback."""
    message = " ".join(str(error).split())
    if isinstance(error, MusicGenError):
        return message
    told = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return f"{told[:MAX_LINE_LEN]} (unexpected error; set {DEBUG}=1 for a traceback)"


def _run(values: dict[str, object]) -> int:
    command = values.pop("command")
    if command == "generate":
        from musicgen.cli import generate

        return generate.run(values)
    if command == "models":
        from musicgen.cli import models

        return models.run(**values)  # type: ignore[arg-type]
    if (plugin := plugins.commands().get(str(command))) is not None:
        return plugin.run(values)
    from musicgen.cli import doctor

    return doctor.run(**values)  # type: ignore[arg-type]


__all__ = ["main"]
