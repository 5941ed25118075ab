"""Subcommands of other packages, such as `musicgen serve`, discovered through entry points.

This keeps the command independent of the service and its dependencies.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, Protocol

from musicgen.errors import MissingDependencyError

COMMANDS, REMOTE = "musicgen.commands", "musicgen.remote"
INSTALL = "pip install 'musicgen-serve[serve]'"


class Command(Protocol):
    """A subcommand. Building its parser must not import anything heavy."""

    name: str
    help: str
    description: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, values: dict[str, Any]) -> int:
        """Run with the parsed options. Returns the exit code."""


def commands() -> dict[str, Command]:
    """The installed subcommands, by name, without those that fail to import."""
    found: dict[str, Command] = {}
    for entry in sorted(entry_points(group=COMMANDS), key=lambda entry: entry.name):
        try:
            command = entry.load()()
        except ImportError:
            continue
        found[command.name] = command
    return found


def generate_remote() -> Callable[..., int]:
    """The function behind `musicgen generate --server`.

    Raises:
        MissingDependencyError: the service's client is not installed.
    """
    for entry in entry_points(group=REMOTE):
        try:
            run: Callable[..., int] = entry.load()
        except ImportError as error:
            raise MissingDependencyError(
                f"--server: expected the service's client, got an import error ({error}); run: {INSTALL}"
            ) from error
        return run
    raise MissingDependencyError(f"--server: expected the service's client to be installed; run: {INSTALL}")
