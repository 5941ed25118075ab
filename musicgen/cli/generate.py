"""`musicgen generate`: validates inputs, loads the model, generates in batches.

Only orchestrates: sampling and the codec belong to the API, files to `output`, what is said to `report`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from musicgen.cli import plugins
from musicgen.cli.checks import (
    Recording,
    Recordings,
    check_loudness,
    check_options,
    check_with_model,
    read_recordings,
)
from musicgen.cli.interrupt import sigterm_interrupts
from musicgen.cli.options import STDIN, GenerateOptions, by_option
from musicgen.cli.output import Output
from musicgen.cli.plan import Piece, plan_pieces
from musicgen.cli.quiet import quiet_libraries, torch_threads
from musicgen.cli.report import Bar, ModelFacts, Report
from musicgen.cli.timing import Stopwatch
from musicgen.errors import InvalidRequestError
from musicgen.weights.registry import DEMO_MODEL

API_KEY = "MUSICGEN_API_KEY"
"""Environment variable: the API key for `--server`. Not an option, because other users can see command lines."""

if TYPE_CHECKING:
    from torch import Tensor

    from musicgen.api import MusicGen


def run(values: dict[str, Any]) -> int:
    """Run the command with the values of `GenerateOptions`. Returns the exit code.

    Raises:
        MusicGenError: bad input (before any generation), or a model that cannot be loaded.
    """
    options = GenerateOptions(**values)
    try:
        with sigterm_interrupts():
            return _run(dataclasses.replace(options, prompts=_prompts(options.prompts)))
    except InvalidRequestError as error:
        raise by_option(error) from error


def _prompts(given: list[str]) -> list[str]:
    """The prompts, with `-` replaced by the lines of stdin."""
    if STDIN not in given:
        return given
    try:
        lines = [line.strip() for line in sys.stdin if line.strip()]
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"text in {sys.stdin.encoding} on stdin", "other bytes", param="prompt") from error
    if not lines:
        raise InvalidRequestError("prompts on stdin, one per line", "none", param="prompt")
    return [line for prompt in given for line in (lines if prompt == STDIN else [prompt])]


def _run(options: GenerateOptions) -> int:
    if options.server is not None:
        return plugins.generate_remote()(options, options.server, os.environ.get(API_KEY))
    options = dataclasses.replace(options, model=options.model or DEMO_MODEL)
    check_options(options)
    pieces = plan_pieces(options)
    output = Output(options, pieces, check_loudness(options))
    watch = Stopwatch()
    with ExitStack() as stack:
        with watch.measure("load"):
            stack.enter_context(quiet_libraries())
            stack.enter_context(torch_threads(options))
            import musicgen.api  # noqa: F401 - to count its import time here, not under inputs
        with watch.measure("inputs"):
            recordings = read_recordings(options)
        with watch.measure("load"):
            model = _load(options)
        check_with_model(options, recordings, model)
        if options.stems:
            with watch.measure("inputs"):
                recordings = _separated(recordings, model)
        return _make(options, pieces, recordings, model, watch, output)


def _load(options: GenerateOptions) -> MusicGen:
    from musicgen.api import MusicGen

    model = MusicGen.get_pretrained(options.model, options.device, options.weights)
    model.start()
    return model


def _separated(recordings: Recordings, model: MusicGen) -> Recordings:
    """The recordings, with drums and bass removed from the melodies."""
    from musicgen.stems import MelodyStems

    stems = MelodyStems(model.sample_rate, device=model.device)
    melodies = {
        path: Recording(stems(melody.wav, melody.sample_rate), stems.sample_rate)
        for path, melody in recordings.melodies.items()
    }
    return dataclasses.replace(recordings, melodies=melodies)


def _make(
    options: GenerateOptions,
    pieces: list[Piece],
    recordings: Recordings,
    model: MusicGen,
    watch: Stopwatch,
    output: Output,
) -> int:
    """Generate, write and report the pieces batch by batch, so that an interrupt loses at most one batch."""
    _watch_parts(model, watch)
    facts = _facts(model, options)
    with Report(options, facts, pieces) as report, Bar(len(pieces), options) as bar:
        report.start()
        model.set_custom_progress_callback(bar.frames)
        for start in range(0, len(pieces), options.batch):
            batch = pieces[start : start + options.batch]
            bar.begin([piece.title for piece in batch])
            with watch.measure("codes"):
                wavs = _generate(model, batch, recordings)
            for piece, wav in zip(batch, wavs, strict=True):
                with watch.measure("write"):
                    written = output.write(piece, wav, facts)
                report.add(written)
        bar.close()
        report.finish(watch.seconds)
    return 0


def _facts(model: MusicGen, options: GenerateOptions) -> ModelFacts:
    from musicgen.config import EngineConfig
    from musicgen.engine.packing import kind_of

    config, packed = model.model.config, model.model.packed
    engine = EngineConfig(weights=options.weights if packed is None else kind_of(packed))
    weights = engine.resolved(model.device.type).weights
    return ModelFacts(config.name, config.license, str(weights), str(model.device), model.sample_rate)


def _watch_parts(model: MusicGen, watch: Stopwatch) -> None:
    """Time the model's components (replaces them in `model`); the remainder of a call counts as codes."""
    import torch

    if model.device.type == "cuda":
        watch.synchronize = functools.partial(torch.cuda.synchronize, model.device)
    parts = model.model
    model.model = dataclasses.replace(
        parts,
        text_encoder=watch.watch("inputs", parts.text_encoder, "encode"),
        chroma=None if parts.chroma is None else watch.watch("inputs", parts.chroma),
        codec_encoder=watch.watch("inputs", parts.codec_encoder, "encode"),
        codec=watch.watch("decode", parts.codec, "decode"),
    )


def _generate(model: MusicGen, pieces: list[Piece], recordings: Recordings) -> Tensor:
    """The samples `[B, C, N]` of pieces that all have the same kinds of inputs."""
    texts = [piece.text for piece in pieces]
    seeds = [piece.seed for piece in pieces]
    melodies = [recordings.melodies[piece.melody] for piece in pieces if piece.melody is not None]
    prompts = [recordings.prompts[piece.prompt_audio] for piece in pieces if piece.prompt_audio is not None]
    melody_wavs, melody_rate = _at_one_rate(melodies, model.sample_rate)
    if prompts:
        prompt_wavs, prompt_rate = _at_one_rate(prompts, model.sample_rate)
        wavs = model.generate_continuation(
            prompt_wavs,
            prompt_rate,
            texts,
            progress=True,
            melody_wavs=melody_wavs or None,
            melody_sample_rate=melody_rate,
            seed=seeds,
        )
    elif melodies:
        wavs = model.generate_with_chroma(texts, melody_wavs, melody_rate, progress=True, seed=seeds)
    else:
        wavs = model.generate(texts, progress=True, seed=seeds)
    assert not isinstance(wavs, tuple)  # no tokens were asked for
    return wavs


def _at_one_rate(recordings: list[Recording], model_rate: int) -> tuple[list[Tensor], int]:
    """The recordings unchanged if their sample rates are equal, else resampled to the model's."""
    from musicgen.waveform import resample

    rates = {recording.sample_rate for recording in recordings}
    if len(rates) == 1:
        return [recording.wav for recording in recordings], rates.pop()
    return [resample(recording.wav, recording.sample_rate, model_rate) for recording in recordings], model_rate
