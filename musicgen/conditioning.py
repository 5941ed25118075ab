"""Computes the language model's conditioning from a prompt and a melody, per window.

Each request is processed separately, so that the result does not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from musicgen.config import ModelConfig
from musicgen.errors import InvalidRequestError
from musicgen.model import Model
from musicgen.models.chroma import ChromaExtractor
from musicgen.types import Conditioning, Window


@dataclass(frozen=True, slots=True, eq=False)
class Melody:
    """A melody as supplied by the caller."""

    wav: Tensor
    """`[C, N]` floats."""
    sample_rate: int


def condition(
    model: Model, prompt: str | None, melody: Melody | None, windows: list[Window]
) -> tuple[tuple[Window, Conditioning], ...]:
    """The conditioning of each window of one request.

    In pieces longer than one window, each window sees the melody from the window's own start on, wrapping around at the
    melody's end; so does a single window after a prompt longer than a window. In a piece that fits in one window the
    chroma frames repeat instead. Source: audiocraft `MusicGen._generate_tokens`.

    Raises:
        InvalidRequestError: the model does not support melodies, or the prompt is too long.
    """
    if melody is not None and model.chroma is None:
        raise InvalidRequestError(
            f"no melody for model {model.config.name!r}",
            "",
            "choose a melody model: melody, melody-large or demo",
            param="melody",
        )
    text = model.text_encoder.encode(prompt)
    chroma: list[Tensor] | list[None] = [None] * len(windows)
    if melody is not None:
        assert model.chroma is not None
        chroma = window_chroma(model.chroma, melody, windows, model.config)
    return tuple((w, Conditioning(text, c)) for w, c in zip(windows, chroma, strict=True))


def window_chroma(
    extractor: ChromaExtractor, melody: Melody, windows: Sequence[Window], config: ModelConfig
) -> list[Tensor]:
    """The chroma `[num_frames, num_chroma]` of each window; see `condition`."""
    if len(windows) == 1 and windows[0].start == 0:
        return extractor.forward([(melody.wav, melody.sample_rate)])
    parts = [_from_offset(melody, window.start, config) for window in windows]
    return extractor.forward([(part.wav, part.sample_rate) for part in parts])


def _from_offset(melody: Melody, start_frame: int, config: ModelConfig) -> Melody:
    """One window's length of the melody from `start_frame` on, wrapping around at its end."""
    first = int(start_frame / config.frame_rate_hz * melody.sample_rate)
    num_samples = int(config.max_duration_s * melody.sample_rate)
    positions = torch.arange(first, first + num_samples) % melody.wav.shape[-1]
    return Melody(melody.wav[..., positions], melody.sample_rate)
