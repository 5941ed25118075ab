"""Reports of `musicgen generate`: progress bar on stderr, one line per file, summary, JSON."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from musicgen.cli.options import GenerateOptions
from musicgen.cli.plan import Piece
from musicgen.cli.timing import PARTS, PartName
from musicgen.weights.registry import DEMO_MODEL

DEMO_NOTE = "bundled demo model (small; not Meta's weights)"
MAX_TITLE_LEN = 32
SETTINGS = (
    *("temperature", "top_k", "top_p", "greedy", "guidance", "melody_guidance"),
    *("duration", "extend_stride", "stems"),
)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What reports and files say about a model, local or remote."""

    name: str
    license: str
    weights: str
    device: str
    """Or the URL of the service."""
    sample_rate: int


@dataclass(frozen=True, slots=True)
class Written:
    """A finished file, as read back from disk."""

    path: Path
    piece: Piece
    duration_s: float
    sample_rate: int
    channels: int
    peak: float
    """Largest absolute sample; 1 is full scale."""
    loudness_lufs: float | None
    """None if the audio is too short or too quiet to measure."""
    picture: Path | None


class Bar:
    """Progress over all pieces, in seconds of music; hidden if stderr is not a terminal, and with --quiet."""

    def __init__(self, num_pieces: int, options: GenerateOptions) -> None:
        self._duration_s = options.duration
        self._num_before = self._num_in_batch = 0
        self._bar = tqdm(
            total=round(num_pieces * options.duration, 2),
            disable=options.quiet or None,
            bar_format="{desc} {percentage:3.0f} %|{bar}| {n:.1f}/{total:g} s of music [{elapsed}<{remaining}]",
        )

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._bar.close()

    def begin(self, titles: list[str]) -> None:
        """Start the next batch."""
        self._num_before += self._num_in_batch
        self._num_in_batch = len(titles)
        more = f" and {len(titles) - 1} more" if len(titles) > 1 else ""
        title = titles[0] if len(titles[0]) <= MAX_TITLE_LEN else f"{titles[0][: MAX_TITLE_LEN - 1]}…"
        self._bar.set_description_str(f"{title}{more}")

    def frames(self, generated: int, total: int) -> None:
        """Report that `generated` of `total` frames of this batch are done."""
        done_s = (self._num_before + self._num_in_batch * generated / total) * self._duration_s
        self._bar.update(done_s - self._bar.n)


class Report:
    """The report of one run, in order: `start`, `add` for each file, `finish`. On stderr if stdout gets the audio."""

    def __init__(self, options: GenerateOptions, model: ModelFacts, pieces: Sequence[Piece]) -> None:
        self._options, self._model, self._pieces = options, model, pieces
        self._stream = sys.stderr if options.to_stdout else sys.stdout
        self._written: list[Written] = []
        self._started = False

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt) and self._written:
            error.add_note("the files listed above are complete")

    def start(self) -> None:
        """The first lines; printed only once, and not with --quiet."""
        if self._started or self._options.quiet:
            return
        self._started = True
        model, seed, num_pieces = self._model, self._pieces[0].seed, len(self._pieces)
        what = DEMO_NOTE if self._options.model == DEMO_MODEL else f"model {model.name}"
        self._print(f"{what}; licence of the weights: {model.license}; on {model.device}")
        drawn = " (random; pass --seed to reproduce)" if self._options.seed is None else ""
        last = f" to {seed + num_pieces - 1}" if num_pieces > 1 else ""
        self._print(f"seed {seed}{last}{drawn}")

    def add(self, written: Written) -> None:
        """Report a finished file."""
        self._written.append(written)
        parts = [
            str(written.path),
            f"{written.duration_s:.2f} s",
            f"seed {written.piece.seed}",
            f"peak {_decibels(written.peak)}",
            "no loudness (too short or too quiet)"
            if written.loudness_lufs is None
            else f"{written.loudness_lufs:.1f} LUFS",
        ]
        picture = f"\n{written.picture}" if written.picture else ""
        self._print("  ".join(parts) + picture)

    def finish(self, seconds: Mapping[PartName, float]) -> None:
        """The summary, unless --quiet; with --json, JSON as the last line.

        Args:
            seconds: time spent in each part of the work.
        """
        audio_s = sum(written.duration_s for written in self._written)
        work_s = sum(spent for part, spent in seconds.items() if part != "load")
        if not self._options.quiet:
            speed = audio_s / work_s
            self._print(f"{audio_s:.1f} s of music in {work_s:.1f} s, excluding loading: {speed:.2f} × real time")
            self._print("; ".join(f"{label} {seconds[part]:.2f} s" for part, label in PARTS.items()))
        if self._options.json:
            self._print_json(audio_s, work_s, seconds)

    def _print(self, line: str) -> None:
        """Print above the bar."""
        tqdm.write(line, file=self._stream)
        self._stream.flush()

    def _print_json(self, audio_s: float, work_s: float, seconds: Mapping[PartName, float]) -> None:
        summary = {
            "model": self._model.name,
            "license": self._model.license,
            "weights": self._model.weights,
            "device": self._model.device,
            "settings": {name: getattr(self._options, name) for name in SETTINGS},
            "files": [_as_dict(written) for written in self._written],
            "audio_s": round(audio_s, 3),
            "work_s": round(work_s, 3),
            "real_time_factor": round(work_s / audio_s, 3),
            "parts_s": {part: round(spent, 3) for part, spent in seconds.items()},
        }
        self._print(json.dumps(summary, ensure_ascii=False))


def _as_dict(written: Written) -> dict[str, Any]:
    piece = written.piece
    return {
        "path": str(written.path),
        "picture": str(written.picture) if written.picture else None,
        "prompt": piece.text,
        "melody": str(piece.melody) if piece.melody else None,
        "prompt_audio": str(piece.prompt_audio) if piece.prompt_audio else None,
        "seed": piece.seed,
        "duration_s": round(written.duration_s, 3),
        "sample_rate": written.sample_rate,
        "channels": written.channels,
        "peak": round(written.peak, 4),
        "loudness_lufs": None if written.loudness_lufs is None else round(written.loudness_lufs, 2),
    }


def _decibels(peak: float) -> str:
    return f"{20 * math.log10(peak):.1f} dBFS" if peak > 0 else "-inf dBFS (silence)"
