"""The embedded demo model: its checkpoint as package data, and the recipe that made it.

Owns the path of the shipped checkpoint.  The recipe's steps are modules of their own (``render``, ``tokenise``,
``train_codec``, ``train_lm``, ``evaluate``) and are imported only by whoever runs them: they need extra packages.
"""

from pathlib import Path


def checkpoint_path() -> Path:
    """Folder of the shipped checkpoint in Hugging Face layout (``config.json``, ``model.safetensors``, tokenizer)."""
    return Path(__file__).resolve().parent / "checkpoint"


__all__ = ["checkpoint_path"]
