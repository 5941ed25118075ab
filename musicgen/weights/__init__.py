"""Checkpoints: names, files, and a name map for each layout.

The doors are `load_model`, for all of a model, and `open_checkpoint`, for parts of one.

They are imported on first use: names and licences are listed without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from musicgen.weights.load import Checkpoint, load_model, open_checkpoint

__all__ = ["Checkpoint", "load_model", "open_checkpoint"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from musicgen.weights import load

        return getattr(load, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
