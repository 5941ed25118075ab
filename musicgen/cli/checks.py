"""Input validation of `musicgen generate`: numbers before any import of torch, recordings before the model is loaded,
the rest before generation.

The limits are the API's; this module applies them early.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from musicgen.cli.options import DEFAULT_LOUDNESS_LUFS, GenerateOptions
from musicgen.errors import InvalidRequestError, MissingDependencyError
from musicgen.types import GenerationParams, SamplingParams
from musicgen.weights.registry import find

if TYPE_CHECKING:
    from torch import Tensor

    from musicgen.api import MusicGen

MAX_THREADS = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """A decoded audio file."""

    wav: Tensor
    """`[C, N]` float32."""
    sample_rate: int

    @property
    def duration_s(self) -> float:
        return float(self.wav.shape[-1] / self.sample_rate)


@dataclass(frozen=True, slots=True, eq=False)
class Recordings:
    """The audio files of a command, each read once even if several pieces use it."""

    melodies: dict[Path, Recording]
    prompts: dict[Path, Recording]


def check_loudness(options: GenerateOptions) -> float:
    """The target in LUFS."""
    if options.loudness is None:
        return DEFAULT_LOUDNESS_LUFS
    if options.strategy != "loudness":
        raise InvalidRequestError(
            "--strategy loudness", f"--strategy {options.strategy}", "omit one of the two options", param="loudness"
        )
    if not -70.0 <= options.loudness <= 0.0:
        raise InvalidRequestError(
            "LUFS in [-70, 0]", f"{options.loudness:g}", "a common value is -14", param="loudness"
        )
    return options.loudness


def sampling_params(options: GenerateOptions) -> SamplingParams:
    """Raises: InvalidRequestError: a value is out of range."""
    return SamplingParams(
        greedy=options.greedy,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        guidance_scale=options.guidance,
        melody_guidance=options.melody_guidance,
    )


def check_options(options: GenerateOptions) -> None:
    """Check everything that needs neither a file nor the model. Does not import torch."""
    GenerationParams(sampling_params(options), options.duration, options.extend_stride)
    if options.threads is not None and not 1 <= options.threads <= MAX_THREADS:
        raise InvalidRequestError(f"an integer in [1, {MAX_THREADS}]", str(options.threads), param="threads")
    card = find(options.model)
    if card is not None and not card.melody and (options.melody or options.melody_guidance is not None):
        raise _no_melody(card.name)
    if options.melody_guidance is not None and not options.melody:
        raise InvalidRequestError("--melody to be given as well", "", param="melody-guidance")
    _check_stems(options)


def _no_melody(model: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"no melody for model {model!r}", "", "choose a melody model: see `musicgen models`", param="melody"
    )


def _check_stems(options: GenerateOptions) -> None:
    if options.stems and not options.melody:
        raise InvalidRequestError("--melody to be given as well", "", param="stems")
    if options.stems and importlib.util.find_spec("demucs") is None:
        raise MissingDependencyError(
            "stems: expected the package demucs to be installed; run: pip install 'musicgen-serve[stems]'"
        )


def read_recordings(options: GenerateOptions) -> Recordings:
    """The audio files, decoded and checked."""
    read: dict[Path, Recording] = {}
    recordings = Recordings(
        _read(options.melody, "melody", read),
        _read(options.prompt_audio, "prompt-audio", read),
    )
    for path, prompt in recordings.prompts.items():
        _check_prompt_audio(path, prompt, options.duration)
    return recordings


def _read(paths: Iterable[Path], option: str, read: dict[Path, Recording]) -> dict[Path, Recording]:
    """The recordings of one option; adds to `read`, those of all options."""
    from musicgen.audio import load_audio

    for path in paths:
        try:
            read[path] = read.get(path) or Recording(*load_audio(path))
        except InvalidRequestError as error:
            raise InvalidRequestError(error.expected, error.got, error.hint, param=option) from error
    return {path: read[path] for path in paths}


def _check_prompt_audio(path: Path, recording: Recording, duration_s: float, shortest_rest_s: float = 0.0) -> None:
    """Require the recording to leave more than 0 s, and at least about `shortest_rest_s`, to generate."""
    if recording.duration_s >= duration_s - shortest_rest_s:
        raise InvalidRequestError(
            f"a recording shorter than the duration ({duration_s:g} s)",
            f"{path} of {recording.duration_s:.2f} s",
            "increase --duration (it includes the recording) or shorten the recording",
            param="prompt-audio",
        )


def check_with_model(options: GenerateOptions, recordings: Recordings, model: MusicGen) -> None:
    """Check everything that depends on the model; sets its generation parameters (mutated)."""
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
        raise _no_melody(model.name)
    for path, prompt in recordings.prompts.items():
        _check_prompt_audio(path, prompt, options.duration, shortest_rest_s=1 / model.frame_rate)
    for text in options.prompts:
        model.model.text_encoder.encode(text)  # raises for a prompt that is too long
