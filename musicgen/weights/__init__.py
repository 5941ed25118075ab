"""Checkpoints: names, files, and a name map for each layout. `load_model` is the only door."""

from musicgen.weights.load import load_model

__all__ = ["load_model"]
