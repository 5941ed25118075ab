"""Which pieces to make and what their files are called. Knows paths and counts; opens nothing but the output folder."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from musicgen.cli.options import GenerateOptions
from musicgen.errors import InvalidRequestError

MAX_PIECES = 1000
MAX_SLUG_LEN, MAX_SLUG_BYTES = 48, 64
"""Of each source. File systems count bytes, and three sources, a seed and a suffix must fit in 255."""
DRAWN_SEEDS = 2**31
"""Seeds are drawn below this, so that they are short enough to type."""
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece to make, one file to write. Set by `plan_pieces`."""

    text: str | None
    melody: Path | None
    prompt_audio: Path | None
    seed: int

    @property
    def title(self) -> str:
        """What it is made from, in a few words."""
        melody = f"melody {self.melody.stem}" if self.melody else None
        begin = f"after {self.prompt_audio.stem}" if self.prompt_audio else None
        title = ", ".join(filter(None, (self.text, melody, begin))) or "unconditional"
        return title.encode(errors="replace").decode()  # the name of a file can hold bytes that are no text

    @property
    def file_stem(self) -> str:
        """The file's name without its suffix: what it is made from, and the seed."""
        sources = [self.text, *(path.stem for path in (self.melody, self.prompt_audio) if path)]
        slugs = [slug(source) for source in sources if source] or ["unconditional"]
        return "_".join([*slugs, f"seed{self.seed}"])


def plan_pieces(options: GenerateOptions) -> list[Piece]:
    """One piece for each prompt and sample, with its seed.

    Raises:
        InvalidRequestError: nothing to make, too much, or counts that do not match.
    """
    texts = _texts(options)
    melodies = _one_each(options.melody, len(texts), "melody")
    beginnings = _one_each(options.prompt_audio, len(texts), "prompt-audio")
    for name, value in (("num-samples", options.num_samples), ("batch", options.batch)):
        if value < 1:
            raise InvalidRequestError("an integer ≥ 1", str(value), param=name)
    num_pieces = len(texts) * options.num_samples
    if num_pieces > MAX_PIECES:
        raise InvalidRequestError(f"at most {MAX_PIECES} pieces at a time", f"{num_pieces}", "run several commands")
    seed = secrets.randbelow(DRAWN_SEEDS) if options.seed is None else options.seed
    if not 0 <= seed <= MAX_SEED - num_pieces:
        raise InvalidRequestError("an integer in [0, 2^63)", str(seed), param="seed")
    sources = [source for source in zip(texts, melodies, beginnings, strict=True) for _ in range(options.num_samples)]
    return [Piece(*source, seed + index) for index, source in enumerate(sources)]


def _texts(options: GenerateOptions) -> Sequence[str | None]:
    """One text a piece, None for a piece without words."""
    num_recordings = max(len(options.melody), len(options.prompt_audio))
    if options.unconditional is not None:
        if options.prompts or num_recordings:
            raise InvalidRequestError(
                "nothing to go by",
                "a prompt or a recording",
                "leave out either these or --unconditional",
                param="unconditional",
            )
        if options.unconditional < 1:
            raise InvalidRequestError("an integer ≥ 1", str(options.unconditional), param="unconditional")
        return [None] * options.unconditional
    if any(not text.strip() for text in options.prompts):
        raise InvalidRequestError(
            "prompts with words",
            "an empty one",
            "leave it out with --melody, or use --unconditional 1 for music without a prompt",
            param="prompt",
        )
    if not options.prompts and not num_recordings:
        raise InvalidRequestError(
            "a prompt, --melody, --prompt-audio or --unconditional",
            "none of them",
            'for example: musicgen generate "happy rock"',
        )
    return options.prompts or [None] * num_recordings


def _one_each(files: Sequence[Path], num_texts: int, option: str) -> Sequence[Path | None]:
    if len(files) in (0, 1):
        return [*files, None][:1] * num_texts
    if len(files) != num_texts:
        raise InvalidRequestError(
            f"one file for all, or one a prompt ({num_texts})", f"{len(files)} files", param=option
        )
    return files


def slug(text: str) -> str:
    """`text` as a part of a file name: letters and digits of any script, joined by hyphens."""
    words = re.sub(r"[^\w]+|_", "-", text.lower()).strip("-")
    cut = words[:MAX_SLUG_LEN].encode(errors="ignore")[:MAX_SLUG_BYTES].decode(errors="ignore")
    return cut.rstrip("-") or "piece"


def longest_name(pieces: Sequence[Piece], options: GenerateOptions) -> int:
    """Bytes of the longest file name that the pieces need, the number of a repetition included."""
    suffix = max(f".{options.format}", ".png" if options.plot else "", key=len)
    return max(len(f"{piece.file_stem}-{MAX_PIECES}{suffix}".encode()) for piece in pieces)


def make_folder(folder: Path, name_bytes: int = 0) -> None:
    """Make the output folder, so that a bad one is known before the work.

    Args:
        name_bytes: how long the names of files in it may become.
    Raises:
        InvalidRequestError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".musicgen-{secrets.token_hex(4)}".ljust(name_bytes, "_")
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InvalidRequestError("a folder to write to", f"{folder} ({reason})", param="out") from error


def free_stem(folder: Path, stem: str, suffixes: Sequence[str], *, overwrite: bool) -> Path:
    """Where to write, without the suffix: `stem`, or the first of `stem-2`, `stem-3` … that is free."""
    path, number = folder / stem, 1
    while not overwrite and any(path.with_name(f"{path.name}{suffix}").exists() for suffix in suffixes):
        number += 1
        path = folder / f"{stem}-{number}"
    return path
