"""The model served by a service benchmark: command-line options, and the resulting settings."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.serving_random import random_folder


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """`--model`, or random weights instead."""
    add = parser.add_argument
    add("--model", default="demo", help="short name or folder")
    add("--random", choices=("small",), help="random weights of this model's real size, instead of --model")
    add("--weights", choices=("int8", "int4"), default="int4", help="weight data type of --random")
    add("--folder", type=Path, default=Path("build"), help="where --random writes its checkpoint")


def model_name(args: argparse.Namespace) -> str:
    """Name under which the model is served."""
    return f"random-{args.random}" if args.random else args.model.rstrip("/").rpartition("/")[2]


def model_settings(args: argparse.Namespace, **others: Any) -> dict[str, Any]:
    """The model's settings. Random weights are written first, unless they exist.

    Args:
        others: additional model settings.
    """
    if args.random:
        folder = random_folder(args.random, args.weights, args.folder).absolute()
        return {"name": model_name(args), "source": str(folder), "kv_dtype": "int8", **others}
    return {"name": model_name(args), "source": args.model, **others}
