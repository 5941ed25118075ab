"""The bundled demo model: its checkpoint as package data, and the training recipe.

The recipe's steps are separate modules (``render``, ``tokenise``, ``train_codec``, ``train_lm``, ``evaluate``), which
need extra packages and are imported only to run them.
"""

from pathlib import Path


def checkpoint_path() -> Path:
    """Folder of the bundled checkpoint in Hugging Face layout (``config.json``, ``model.safetensors``, tokenizer)."""
    return Path(__file__).resolve().parent / "checkpoint"


__all__ = ["checkpoint_path"]
