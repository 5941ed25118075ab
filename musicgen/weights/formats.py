"""What to do about weights in files that are not read. Names only; nothing is opened here."""

from __future__ import annotations

import re
from collections.abc import Iterable

_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx)$")
_PICKLED = re.compile(r"\.(bin|pt|pth|ckpt)$")
_VARIANT = re.compile(r"^model\.(?P<variant>[\w-]+?)(-\d+-of-\d+)?\.safetensors$")
_MAX_NAMES = 8


def found_instead(names: Iterable[str]) -> str:
    """The end of an error message about missing weights: those among the files `names`, and what to do.

    Variants are those of transformers' `save_pretrained(variant=)`, such as `model.fp16.safetensors`.
    """
    weights = sorted(name for name in names if _WEIGHTS.search(name))
    if not weights:
        return "got no weights; check the name, or download it again"
    more = f" and {len(weights) - _MAX_NAMES} more" if len(weights) > _MAX_NAMES else ""
    listed = ", ".join(weights[:_MAX_NAMES]) + more
    if variants := {match["variant"] for name in weights if (match := _VARIANT.match(name))}:
        variant = min(variants)
        todo = f"variants are not read: load it with transformers, variant={variant!r}, and save it without"
    elif any(_PICKLED.search(name) for name in weights):
        todo = (
            "pickled weights can execute code and are not read: if you trust them, load and save them with transformers"
        )
    else:
        todo = "download it again"
    return f"got {listed}; {todo}"
