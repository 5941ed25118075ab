"""MusicGen: music generation from text and melodies.

    from musicgen import MusicGen, audio_write

    model = MusicGen.get_pretrained("demo")
    model.set_generation_params(duration=8)
    wav = model.generate(["happy rock"], progress=True)
    audio_write("rock", wav[0], model.sample_rate, strategy="loudness")

The names follow audiocraft. They are imported on first use, so that `musicgen --help` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from musicgen.api import MusicGen
    from musicgen.audio import audio_write
    from musicgen.types import GenerationParams, SamplingParams

__version__ = "0.1.0"
__all__ = ["GenerationParams", "MusicGen", "SamplingParams", "__version__", "audio_write"]

_MODULES = {
    "GenerationParams": "musicgen.types",
    "MusicGen": "musicgen.api",
    "SamplingParams": "musicgen.types",
    "audio_write": "musicgen.audio",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
