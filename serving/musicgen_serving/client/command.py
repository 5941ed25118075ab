"""`musicgen generate --server URL`: the same files as the local command, made elsewhere.

Owns what is asked of the service, several pieces at a time. Names, levels, formats and reports are the local command's.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from musicgen.cli.checks import check_loudness
from musicgen.cli.generate import read_back, write_piece
from musicgen.cli.options import GenerateOptions
from musicgen.cli.plan import Piece, make_folder, plan_pieces
from musicgen.cli.report import Bar, Report
from musicgen.cli.timing import Stopwatch
from musicgen.errors import InvalidRequestError, RequestCancelledError
from musicgen_serving.client import Client, Generated, connect
from musicgen_serving.errors import NotFoundError

if TYPE_CHECKING:
    from musicgen.api import MusicGen

_PERIOD_S = 0.1
"""Between two looks at the progress."""


@dataclass(frozen=True, slots=True)
class _Config:
    name: str
    license: str


@dataclass(frozen=True, slots=True)
class _Parts:
    config: _Config


@dataclass(frozen=True, slots=True)
class _RemoteModel:
    """What the report and the files of the local command say of their model, for one that is elsewhere."""

    model: _Parts
    sample_rate: int
    device: str


def generate_remote(options: GenerateOptions, url: str, api_key: str | None) -> int:
    """Make the pieces with the service at `url` (see `connect`). Returns the exit code.

    Raises:
        MusicGenError: bad input, or what the service says.
    """
    _check_options(options)
    pieces = plan_pieces(options)
    loudness_lufs = check_loudness(options)
    make_folder(options.out)
    watch = Stopwatch()
    with watch.measure("inputs"):
        files = {path: _content(path) for path in dict.fromkeys([*options.melody, *options.prompt_audio])}
    with connect(url, api_key) as client:
        with watch.measure("load"):
            found = _find(client, options.model, url)
        model, options = cast("MusicGen", found), replace(options, model=found.model.config.name)
        report = Report(options, model, len(pieces))
        report.start(pieces[0].seed)
        with Bar(len(pieces), options.duration) as bar:
            for start in range(0, len(pieces), options.batch):
                batch = pieces[start : start + options.batch]
                bar.begin([piece.title for piece in batch])
                with watch.measure("codes"):
                    made = _Batch(client, options, files).make(batch, bar)
                for piece, generated in zip(batch, made, strict=True):
                    with watch.measure("write"):
                        wav = torch.from_numpy(generated.samples.copy())
                        path = write_piece(options, piece, wav, model, loudness_lufs)
                        written = read_back(path, piece, plot=options.plot)
                    bar.say(report.line(written))
        report.finish(watch.seconds)
    return 0


class _Batch:
    """Pieces made at the same time, one stream each."""

    def __init__(self, client: Client, options: GenerateOptions, files: dict[Path, bytes]) -> None:
        self._client, self._options, self._files = client, options, files
        self._stopped = threading.Event()
        self._done: list[float] = []

    def make(self, pieces: Sequence[Piece], bar: Bar) -> list[Generated]:
        """All of them, in order. Raises: the first error; the others are cancelled."""
        self._done = [0.0] * len(pieces)
        with ThreadPoolExecutor(len(pieces), thread_name_prefix="piece") as pool:
            try:
                futures: list[Future[Generated]] = [
                    pool.submit(self._one, index, piece) for index, piece in enumerate(pieces)
                ]
                waiting = set(futures)
                while waiting:
                    finished, waiting = wait(waiting, _PERIOD_S, return_when=FIRST_EXCEPTION)
                    for future in finished:
                        future.result()
                    bar.frames(round(1000 * sum(self._done)), 1000 * len(pieces))
                return [future.result() for future in futures]
            except BaseException:  # also an interruption: nobody wants the rest any more
                self._stopped.set()
                self._client.close()
                raise

    def _one(self, index: int, piece: Piece) -> Generated:
        options = self._options
        with self._client.stream(
            piece.text,
            model=options.model,
            melody=None if piece.melody is None else self._files[piece.melody],
            prompt_audio=None if piece.prompt_audio is None else self._files[piece.prompt_audio],
            stems=options.stems and piece.melody is not None,
            duration_s=options.duration,
            seed=piece.seed,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            greedy=options.greedy,
            guidance_scale=options.guidance,
            melody_guidance=options.melody_guidance,
            extend_stride_s=options.extend_stride,
        ) as stream:
            return stream.read(lambda done: self._progress(index, done))

    def _progress(self, index: int, done: float) -> None:
        self._done[index] = done
        if self._stopped.is_set():
            raise RequestCancelledError("another piece failed, or the command was interrupted")


def _check_options(options: GenerateOptions) -> None:
    for name in ("device", "dtype", "threads"):
        value = getattr(options, name)
        if value is not None:
            raise InvalidRequestError(f"no --{name} with --server", str(value), "the service decides it", param=name)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InvalidRequestError("an audio file", f"{path} ({reason})", param="audio") from error


def _find(client: Client, name: str, url: str) -> _RemoteModel:
    """The model of that name; the first, if there is none."""
    models = client.models()
    for info in models:
        if name in ("", info.name):
            return _RemoteModel(_Parts(_Config(info.name, info.license)), info.sample_rate, url)
    names = ", ".join(info.name for info in models) or "none"
    raise NotFoundError(f"model: expected one that the service has ({names}), got {name or 'none'!r}")
