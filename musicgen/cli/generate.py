"""`musicgen generate`: validates inputs, loads the model, generates in batches, writes and reports each file.

Only orchestrates: sampling and the codec belong to the API, file formats to `audio`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musicgen.cli import plugins
from musicgen.cli.checks import Recording, Recordings, check_inputs, check_loudness, check_with_model
from musicgen.cli.options import GenerateOptions
from musicgen.cli.plan import Piece, free_stem, longest_name, make_folder, plan_pieces
from musicgen.cli.quiet import quiet_libraries, torch_threads
from musicgen.cli.report import Bar, Report, Written
from musicgen.cli.timing import Stopwatch
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
    if options.server is not None:
        return plugins.generate_remote()(options, options.server, os.environ.get(API_KEY))
    options = dataclasses.replace(options, model=options.model or DEMO_MODEL)
    pieces = plan_pieces(options)
    loudness_lufs = check_loudness(options)
    make_folder(options.out, longest_name(pieces, options))
    watch = Stopwatch()
    with ExitStack() as stack:
        with watch.measure("load"):
            stack.enter_context(quiet_libraries())
            stack.enter_context(torch_threads(options))
            import musicgen.api  # noqa: F401 - to count its import time here, not under inputs
        with watch.measure("inputs"):
            recordings = check_inputs(options)
        with watch.measure("load"):
            model = _load(options)
        check_with_model(options, recordings, model)
        if options.stems:
            with watch.measure("inputs"):
                recordings = _separated(recordings, model)
        return _make(options, pieces, recordings, model, watch, loudness_lufs)


def _load(options: GenerateOptions) -> MusicGen:
    from musicgen.api import MusicGen

    model = MusicGen.get_pretrained(options.model, options.device, options.dtype)
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
    loudness_lufs: float,
) -> int:
    """Generate, write and report the pieces batch by batch, so that an interrupt loses at most one batch."""
    _watch_parts(model, watch)
    report = Report(options, model, len(pieces))
    report.start(pieces[0].seed)
    with Bar(len(pieces), options.duration) as bar:
        model.set_custom_progress_callback(bar.frames)
        for start in range(0, len(pieces), options.batch):
            batch = pieces[start : start + options.batch]
            bar.begin([piece.title for piece in batch])
            with watch.measure("codes"):
                wavs = _generate(model, batch, recordings)
            for piece, wav in zip(batch, wavs, strict=True):
                with watch.measure("write"):
                    path = write_piece(options, piece, wav, model, loudness_lufs)
                    written = read_back(path, piece, plot=options.plot)
                bar.say(report.line(written))
    report.finish(watch.seconds)
    return 0


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


def write_piece(options: GenerateOptions, piece: Piece, wav: Tensor, model: MusicGen, loudness_lufs: float) -> Path:
    """Write one piece. Returns the path."""
    from musicgen.audio import audio_write, generation_metadata

    config = model.model.config
    tags = generation_metadata(config.name, piece.seed, license=config.license, prompt=piece.text or "")
    suffixes = [f".{options.format}", *([".png"] if options.plot else [])]
    return audio_write(
        free_stem(options.out, piece.file_stem, suffixes, overwrite=options.overwrite),
        wav,
        model.sample_rate,
        format=options.format,
        strategy=options.strategy,
        loudness_headroom_db=-loudness_lufs,
        metadata={"title": piece.title, **tags},
    )


def read_back(path: Path, piece: Piece, *, plot: bool) -> Written:
    """Measure and plot the written file rather than the samples: lossy formats change the peak."""
    from musicgen.api import MAX_DURATION_S
    from musicgen.audio import load_audio
    from musicgen.loudness import measure_loudness
    from musicgen.plots import plot_audio

    wav, sample_rate = load_audio(path, max_duration_s=2 * MAX_DURATION_S)
    return Written(
        path=path,
        piece=piece,
        duration_s=wav.shape[-1] / sample_rate,
        sample_rate=sample_rate,
        channels=wav.shape[0],
        peak=float(wav.abs().max()),
        loudness_lufs=measure_loudness(wav, sample_rate),
        picture=plot_audio(wav, sample_rate, path.with_suffix(".png"), title=piece.title) if plot else None,
    )
