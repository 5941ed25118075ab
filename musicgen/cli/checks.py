"""The checks of `musicgen generate`: all that can be known before the model is loaded, then the rest, before any work.

The limits themselves are the API's; this module asks for their check early, and names the option at fault.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from musicgen.cli.options import DEFAULT_LOUDNESS_LUFS, GenerateOptions
from musicgen.errors import InvalidRequestError, MissingDependencyError

if TYPE_CHECKING:
    from torch import Tensor

    from musicgen.api import MusicGen


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """An audio file that was read. Set by `check_inputs`."""

    wav: Tensor
    """`[C, N]` float32."""
    sample_rate: int

    @property
    def duration_s(self) -> float:
        return float(self.wav.shape[-1] / self.sample_rate)


@dataclass(frozen=True, slots=True, eq=False)
class Recordings:
    """The audio files of a command, each read once, however many pieces use it. Set by `check_inputs`."""

    melodies: dict[Path, Recording]
    prompts: dict[Path, Recording]


def check_loudness(options: GenerateOptions) -> float:
    """The target in LUFS."""
    if options.loudness is None:
        return DEFAULT_LOUDNESS_LUFS
    if options.strategy != "loudness":
        raise InvalidRequestError(
            "no loudness", f"{options.loudness:g} with --strategy {options.strategy}", "leave one out", param="loudness"
        )
    if not -70.0 <= options.loudness <= 0.0:
        raise InvalidRequestError("LUFS in [-70, 0]", f"{options.loudness:g}", "-14 is usual", param="loudness")
    return options.loudness


def check_inputs(options: GenerateOptions) -> Recordings:
    """All that can be known without the model. Returns the recordings, read and found to be audio."""
    from musicgen.api import GenerationParams
    from musicgen.types import SamplingParams
    from musicgen.weights.registry import find

    sampling = SamplingParams(
        greedy=options.greedy,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        guidance_scale=options.guidance,
        melody_guidance=options.melody_guidance,
    )
    GenerationParams(sampling, options.duration, options.extend_stride)
    card = find(options.model)
    if card is not None and not card.melody and (options.melody or options.melody_guidance is not None):
        raise InvalidRequestError(
            f"no melody for model {card.name!r}", "one", "choose a melody model: see `musicgen models`", param="melody"
        )
    if options.melody_guidance is not None and not options.melody:
        raise InvalidRequestError("a --melody with it", "none", param="melody-guidance")
    _check_stems(options)
    recordings = _read_recordings(options)
    for path, prompt in recordings.prompts.items():
        _check_prompt_audio(path, prompt, options.duration)
    return recordings


def _check_stems(options: GenerateOptions) -> None:
    if options.stems and not options.melody:
        raise InvalidRequestError("a --melody with it", "none", param="stems")
    if options.stems and importlib.util.find_spec("demucs") is None:
        raise MissingDependencyError(
            "stems: expected the package demucs, which is not installed; install it with: "
            "pip install 'musicgen-serve[stems]'"
        )


def _read_recordings(options: GenerateOptions) -> Recordings:
    from musicgen.audio import load_audio

    read = {path: Recording(*load_audio(path)) for path in dict.fromkeys([*options.melody, *options.prompt_audio])}
    return Recordings(
        {path: read[path] for path in options.melody}, {path: read[path] for path in options.prompt_audio}
    )


def _check_prompt_audio(path: Path, recording: Recording, duration_s: float, shortest_rest_s: float = 0.0) -> None:
    """Something new of `shortest_rest_s`, and more than nothing, must be left to make."""
    if recording.duration_s >= duration_s - shortest_rest_s:
        raise InvalidRequestError(
            f"a recording shorter than the duration ({duration_s:g} s)",
            f"{path} of {recording.duration_s:.2f} s",
            "raise --duration, which includes it, or cut the recording",
            param="prompt-audio",
        )


def check_with_model(options: GenerateOptions, recordings: Recordings, model: MusicGen) -> None:
    """What depends on the model; sets its parameters (mutated)."""
    model.set_generation_params(
        use_sampling=not options.greedy,
        top_k=options.top_k,
        top_p=options.top_p,
        temperature=options.temperature,
        duration=options.duration,
        cfg_coef=options.guidance,
        cfg_coef_beta=options.melody_guidance,
        extend_stride=options.extend_stride,
    )
    if options.melody and model.model.chroma is None:
        raise InvalidRequestError(
            f"no melody for model {model.name!r}", "one", "choose a melody model: see `musicgen models`", param="melody"
        )
    for path, prompt in recordings.prompts.items():
        _check_prompt_audio(path, prompt, options.duration, shortest_rest_s=1 / model.frame_rate)
    for text in options.prompts:
        model.model.text_encoder.encode(text)  # refuses a text that is too long
