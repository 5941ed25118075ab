"""Checkpoints: names, files, and a name map for each layout. `load_model` is the only door.

It is imported on first use: names and licences are listed without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from musicgen.weights.load import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    if name == "load_model":
        from musicgen.weights.load import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
