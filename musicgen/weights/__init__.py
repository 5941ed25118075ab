"""Checkpoint loading: model names, files, and a name map for each layout.

Entry points: `load_model` for a whole model, `open_checkpoint` for individual components.

Both are imported on first use, so that listing names and licences does not import torch.
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
