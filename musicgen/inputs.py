"""Validation of API arguments, before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import cast, get_args

import numpy as np
import torch
from torch import Tensor

from musicgen.arguments import checked_list
from musicgen.conditioning import Melody
from musicgen.config import ModelConfig, WeightDtype
from musicgen.errors import InvalidRequestError
from musicgen.types import MAX_SEED, checked_seed
from musicgen.waveform import (
    LOAD_IT_FIRST,
    Array,
    Waveform,
    check_sample_rate,
    convert_audio,
    to_tensor,
    validate_waveform,
)

Waveforms = Tensor | Array | Sequence[Waveform | None]
"""`[B, C, N]`, `[C, N]` for a single waveform, or a list of `[C, N]`."""


def checked_descriptions(descriptions: Sequence[str | None]) -> list[str | None]:
    if isinstance(descriptions, str):
        raise InvalidRequestError("a list of strings", "a string", f"pass [{descriptions!r}]", param="descriptions")
    texts = checked_list(descriptions, "a list of strings", param="descriptions")
    if not texts:
        raise InvalidRequestError("at least one description", "an empty list", param="descriptions")
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise InvalidRequestError("strings or None", type(text).__name__, param="descriptions")
    return texts


def as_list(wavs: Waveforms, param: str) -> list[Waveform | None]:
    """A list with one waveform for `[C, N]`, otherwise with all of them."""
    if isinstance(wavs, Tensor | np.ndarray):
        tensor: Tensor = to_tensor(wavs, param)
        if tensor.dim() not in (2, 3):
            raise InvalidRequestError("a tensor [B, C, N] or [C, N]", f"shape {list(tensor.shape)}", param=param)
        wavs = list(tensor[None] if tensor.dim() == 2 else tensor)
    expected = "a tensor or array [B, C, N] or [C, N], or a list of [C, N]"
    listed = checked_list(wavs, expected, LOAD_IT_FIRST, param=param)
    if not listed:
        raise InvalidRequestError("at least one waveform", "none", param=param)
    return listed


def checked_melodies(wavs: Waveforms, sample_rate: int | None, num_items: int) -> list[Melody | None]:
    if sample_rate is None:
        raise InvalidRequestError("the melodies' sample rate in Hz", "none", param="melody_sample_rate")
    rate = check_sample_rate(sample_rate, "melody_sample_rate")
    listed = as_list(wavs, "melody_wavs")
    if len(listed) != num_items:
        raise InvalidRequestError(
            f"as many melodies as descriptions ({num_items})",
            f"{len(listed)}",
            "use None for pieces without a melody",
            param="melody_wavs",
        )
    return [None if wav is None else Melody(validate_waveform(wav, "melody_wavs"), rate) for wav in listed]


def checked_prompt(wav: Waveform | None, sample_rate: int | None, config: ModelConfig, duration_s: float) -> Tensor:
    """An audio prompt, converted to the codec's rate and channels: `[C, N]`, shorter than the piece.

    Raises:
        InvalidRequestError: no audio, or the prompt is not shorter than the piece.
    """
    samples = validate_waveform(wav, "prompt")
    if sample_rate is None:
        raise InvalidRequestError("the prompt's sample rate in Hz", "none", param="prompt_sample_rate")
    rate = check_sample_rate(sample_rate, "prompt_sample_rate")
    check_prompt_length(samples.shape[-1] / rate, config, duration_s)
    return convert_audio(samples, rate, config.sample_rate, config.audio_channels)


def check_prompt_length(prompt_s: float, config: ModelConfig, duration_s: float) -> None:
    """Raises: InvalidRequestError: a prompt of `prompt_s` seconds leaves nothing to generate."""
    if prompt_s >= duration_s - 1 / config.frame_rate_hz:
        raise InvalidRequestError(
            f"a prompt shorter than the duration ({duration_s:g} s)",
            f"{prompt_s:.2f} s",
            "increase the duration (it includes the prompt) or shorten the prompt",
            param="prompt",
        )


def checked_weights(weights: object) -> WeightDtype:
    """A weight type, given by name or as a torch dtype."""
    name = str(weights).removeprefix("torch.")
    kinds = get_args(WeightDtype)
    if name not in kinds:
        raise InvalidRequestError(f"one of {', '.join(kinds)}", repr(weights), param="weights")
    return cast(WeightDtype, name)


def resolve_seeds(seed: int | Sequence[int] | None, num_pieces: int) -> list[int]:
    """One seed per piece; without a seed, drawn from torch's global generator, which respects `torch.manual_seed`."""
    if seed is None:
        return [int(s) for s in torch.randint(0, MAX_SEED, (num_pieces,))]
    if isinstance(seed, int | Integral):
        first = checked_seed(seed)
        return [(first + i) % (MAX_SEED + 1) for i in range(num_pieces)]
    seeds = checked_list(seed, "an integer, a list of integers or None", param="seed")
    if len(seeds) != num_pieces:
        raise InvalidRequestError(f"one seed, or one per piece ({num_pieces})", f"{len(seeds)}", param="seed")
    return [checked_seed(value) for value in seeds]
