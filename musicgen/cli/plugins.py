"""Subcommands that other packages bring, such as `musicgen serve`: found by the entry points of what is installed.

So the command knows nothing of the service, and the service's libraries are needed only where it runs.
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
    """A subcommand. Making its parser must import nothing large."""

    name: str
    help: str
    description: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, values: dict[str, Any]) -> int:
        """Run with what was parsed. Returns the exit code."""


def commands() -> dict[str, Command]:
    """The subcommands that are installed, by name; those whose package cannot be imported are left out."""
    found: dict[str, Command] = {}
    for entry in sorted(entry_points(group=COMMANDS), key=lambda entry: entry.name):
        try:
            command = entry.load()()
        except ImportError:
            continue
        found[command.name] = command
    return found


def generate_remote() -> Callable[..., int]:
    """What `musicgen generate --server` runs.

    Raises:
        MissingDependencyError: the service's client is not installed.
    """
    for entry in entry_points(group=REMOTE):
        try:
            run: Callable[..., int] = entry.load()
        except ImportError as error:
            raise MissingDependencyError(f"--server: expected the service's client, got {error}; {INSTALL}") from error
        return run
    raise MissingDependencyError(f"--server: expected the service's client, got none; {INSTALL}")
