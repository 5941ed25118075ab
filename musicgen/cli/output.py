"""Destination of the audio: a folder, one file (`-o song.flac`) or stdout (`-o -`). Checked first, without a trace."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from musicgen.cli.checks import sampling_params
from musicgen.cli.options import DEFAULT_EXTEND_STRIDE_S, DEFAULT_FORMAT, FORMATS, GenerateOptions
from musicgen.cli.plan import MAX_PIECES, Piece, shown
from musicgen.cli.report import ModelFacts, Written
from musicgen.errors import InvalidRequestError
from musicgen.types import MAX_DURATION_S

if TYPE_CHECKING:
    from torch import Tensor


class Output:
    """Writes the pieces of a command.

    Args:
        loudness_lufs: target of `--strategy loudness`.

    Raises:
        InvalidRequestError: options that contradict each other, an existing file, or a place that is not writable.
    """

    def __init__(self, options: GenerateOptions, pieces: Sequence[Piece], loudness_lufs: float) -> None:
        self._options, self._loudness_lufs = options, loudness_lufs
        self._single_file = _single_file(options)
        if options.to_stdout:
            _check_stdout(options, len(pieces))
        self._format = _format(options, self._single_file)
        self._suffixes = [f".{self._format}", *([".png"] if options.plot else [])]
        if self._single_file is not None:
            self._check_single_file(self._single_file, len(pieces))
        elif not options.to_stdout:
            longest = max(
                len(f"{piece.file_stem}-{MAX_PIECES}{max(self._suffixes, key=len)}".encode()) for piece in pieces
            )
            _check_writable(options.out, longest)

    def write(self, piece: Piece, wav: Tensor, model: ModelFacts) -> Written:
        """Write one piece, `[C, N]`, and its plot."""
        if not self._options.to_stdout:
            path = self._single_file or self._free_path(piece)
            return self._write(path, piece, wav, model)
        with TemporaryDirectory(prefix="musicgen-") as folder:
            written = self._write(Path(folder, piece.file_stem), piece, wav, model)
            sys.stdout.buffer.write(written.path.read_bytes())
            sys.stdout.buffer.flush()
        return replace(written, path=Path("/dev/stdout"))

    def _write(self, path: Path, piece: Piece, wav: Tensor, model: ModelFacts) -> Written:
        from musicgen.audio import audio_write
        from musicgen.audio_encode import generation_metadata

        options = self._options
        tags = generation_metadata(
            model.name,
            piece.seed,
            settings=_settings(options, piece, model),
            license=model.license,
            prompt=piece.text or "",
        )
        audio_write(
            path,
            wav,
            model.sample_rate,
            format=self._format,
            strategy=options.strategy,
            loudness_headroom_db=-self._loudness_lufs,
            loudness_compressor=options.compressor,
            add_suffix=False,
            metadata={"title": piece.title, **tags},
        )
        return _read_back(path, piece, plot=options.plot)

    def _free_path(self, piece: Piece) -> Path:
        """The file of a piece, with the first free number if it exists."""
        stem = self._options.out / piece.file_stem
        path, number = stem, 1
        while not self._options.overwrite and any(_with(path, suffix).exists() for suffix in self._suffixes):
            number += 1
            path = _with(stem, f"-{number}")
        return _with(path, self._suffixes[0])

    def _check_single_file(self, file: Path, num_pieces: int) -> None:
        if num_pieces > 1:
            raise InvalidRequestError(f"a folder for {num_pieces} pieces", f"the file {file}", param="out")
        _check_writable(file.parent, len(file.name.encode()))
        for path in (file, *([file.with_suffix(".png")] if self._options.plot else [])):
            if path.exists() and not self._options.overwrite:
                raise InvalidRequestError(
                    "a new file", f"{path}, which exists", "replace it with --overwrite", param="out"
                )


def _settings(options: GenerateOptions, piece: Piece, model: ModelFacts) -> dict[str, object]:
    """What reproduces the piece, besides its seed and prompt. Paths are not revealed, and defaults are left out."""
    from musicgen.audio_encode import changed_sampling

    settings: dict[str, object] = {"weights": model.weights, "duration": f"{options.duration:g} s"}
    settings |= changed_sampling(sampling_params(options))
    if options.extend_stride != DEFAULT_EXTEND_STRIDE_S:
        settings["extend_stride"] = f"{options.extend_stride:g} s"
    if piece.melody:
        settings["melody"] = f"{shown(piece.melody.name)}{' without drums and bass' if options.stems else ''}"
    if piece.prompt_audio:
        settings["prompt_audio"] = shown(piece.prompt_audio.name)
    return settings


def _with(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.name}{ending}")


def _single_file(options: GenerateOptions) -> Path | None:
    """`--out`, if it is the name of an audio file. An existing folder of such a name stays a folder."""
    return options.out if _suffix(options.out) in FORMATS and not options.out.is_dir() else None


def _suffix(path: Path) -> str:
    return path.suffix[1:].lower()


def _format(options: GenerateOptions, file: Path | None) -> str:
    suffix = None if file is None else _suffix(file)
    if suffix and options.format not in (None, suffix):
        raise InvalidRequestError(f"--format {suffix} or none for {file}", f"{options.format}", param="format")
    return suffix or options.format or DEFAULT_FORMAT


def _check_stdout(options: GenerateOptions, num_pieces: int) -> None:
    if num_pieces > 1:
        raise InvalidRequestError(f"a folder for {num_pieces} pieces", "stdout", param="out")
    for name in ("json", "plot"):
        if getattr(options, name):
            raise InvalidRequestError(f"no --{name} with -o -", "", "write to a file instead", param=name)
    if sys.stdout.isatty():
        raise InvalidRequestError("stdout to be a pipe or a file", "a terminal", "or write to a file", param="out")


def _check_writable(folder: Path, name_bytes: int) -> None:
    """Require that a file with a name of this length can be written to `folder`, which need not exist yet."""
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
        probe = existing / f".musicgen-{secrets.token_hex(4)}".ljust(name_bytes, "_")
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InvalidRequestError("a writable folder", f"{folder} ({reason})", param="out") from error


def _read_back(path: Path, piece: Piece, *, plot: bool) -> Written:
    """Measure and plot the written file rather than the samples: lossy formats change the peak."""
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
