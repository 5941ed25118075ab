"""From a prompt and a melody to what the language model is conditioned on, window by window.

Each item is computed on its own, so that nothing depends on its batch mates.
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
    """A melody as the caller gave it."""

    wav: Tensor
    """`[C, N]` floats."""
    sample_rate: int


def condition(
    model: Model, prompt: str | None, melody: Melody | None, windows: list[Window]
) -> tuple[tuple[Window, Conditioning], ...]:
    """The conditioning of each window of one request.

    In a piece longer than a window each one sees the melody from its own beginning on, and the melody starts again
    when it is over; so does the only window after a prompt that fills more than one. In a piece that fits in one window
    the chroma repeats instead. Source: audiocraft `MusicGen._generate_tokens`.

    Raises:
        InvalidRequestError: a melody for a model that takes none, or a prompt that is too long.
    """
    if melody is not None and model.chroma is None:
        raise InvalidRequestError(
            f"no melody for model {model.config.name!r}",
            "a melody",
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
    """The chroma `[num_frames, num_chroma]` that each window sees; see `condition`."""
    if len(windows) == 1 and windows[0].start == 0:
        return extractor.forward([(melody.wav, melody.sample_rate)])
    parts = [_from_offset(melody, window.start, config) for window in windows]
    return extractor.forward([(part.wav, part.sample_rate) for part in parts])


def _from_offset(melody: Melody, start_frame: int, config: ModelConfig) -> Melody:
    """One window's length of the melody from `start_frame` on, starting again at its end."""
    first = int(start_frame / config.frame_rate_hz * melody.sample_rate)
    num_samples = int(config.max_duration_s * melody.sample_rate)
    positions = torch.arange(first, first + num_samples) % melody.wav.shape[-1]
    return Melody(melody.wav[..., positions], melody.sample_rate)
