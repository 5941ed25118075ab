"""Plans the pieces to generate and their file names. Opens no files."""

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
"""Per source. File systems limit bytes: three sources, a seed and a suffix must fit in 255."""
DRAWN_SEEDS = 2**31
"""Random seeds stay below this, so that they are short enough to type."""
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece to generate and write to one file."""

    text: str | None
    melody: Path | None
    prompt_audio: Path | None
    seed: int

    @property
    def title(self) -> str:
        """Short description of the inputs."""
        melody = f"melody {self.melody.stem}" if self.melody else None
        begin = f"after {self.prompt_audio.stem}" if self.prompt_audio else None
        title = ", ".join(filter(None, (self.text, melody, begin))) or "unconditional"
        return shown(title)

    @property
    def file_stem(self) -> str:
        """The file name without its suffix: the inputs and the seed."""
        sources = [self.text, *(path.stem for path in (self.melody, self.prompt_audio) if path)]
        slugs = [slug(source) for source in sources if source] or ["unconditional"]
        return "_".join([*slugs, f"seed{self.seed}"])


def plan_pieces(options: GenerateOptions) -> list[Piece]:
    """One piece per prompt and sample, each with its seed.

    Raises:
        InvalidRequestError: nothing to generate, too many pieces, or counts that do not match.
    """
    texts = _texts(options)
    melodies = _one_each(options.melody, len(texts), "melody")
    beginnings = _one_each(options.prompt_audio, len(texts), "prompt-audio")
    for name, value in (("num-samples", options.num_samples), ("batch", options.batch)):
        if value < 1:
            raise InvalidRequestError("an integer ≥ 1", str(value), param=name)
    num_pieces = len(texts) * options.num_samples
    if num_pieces > MAX_PIECES:
        raise InvalidRequestError(
            f"at most {MAX_PIECES} pieces per run", f"{num_pieces}", "split them over several runs"
        )
    seed = secrets.randbelow(DRAWN_SEEDS) if options.seed is None else options.seed
    if not 0 <= seed <= MAX_SEED - num_pieces:
        raise InvalidRequestError("an integer in [0, 2^63)", str(seed), param="seed")
    sources = [source for source in zip(texts, melodies, beginnings, strict=True) for _ in range(options.num_samples)]
    return [Piece(*source, seed + index) for index, source in enumerate(sources)]


def _texts(options: GenerateOptions) -> Sequence[str | None]:
    """One text per piece, None for a piece without a prompt."""
    num_recordings = max(len(options.melody), len(options.prompt_audio))
    if options.unconditional is not None:
        if options.prompts or num_recordings:
            raise InvalidRequestError(
                "no prompts or recordings",
                "some",
                "omit either these or --unconditional",
                param="unconditional",
            )
        if options.unconditional < 1:
            raise InvalidRequestError("an integer ≥ 1", str(options.unconditional), param="unconditional")
        return [None] * options.unconditional
    if any(not text.strip() for text in options.prompts):
        raise InvalidRequestError(
            "non-empty prompts",
            "an empty one",
            "omit the prompt when using --melody, or use --unconditional 1",
            param="prompt",
        )
    if not options.prompts and not num_recordings:
        raise InvalidRequestError(
            "a prompt, --melody, --prompt-audio or --unconditional",
            "none of these",
            'example: musicgen generate "happy rock"',
        )
    return options.prompts or [None] * num_recordings


def _one_each(files: Sequence[Path], num_texts: int, option: str) -> Sequence[Path | None]:
    if len(files) in (0, 1):
        return [*files, None][:1] * num_texts
    if len(files) != num_texts:
        raise InvalidRequestError(
            f"one file for all prompts, or one per prompt ({num_texts})", f"{len(files)}", param=option
        )
    return files


def shown(text: str) -> str:
    """`text` with question marks for the undecodable bytes that file names can contain."""
    return text.encode(errors="replace").decode()


def slug(text: str) -> str:
    """`text` as part of a file name: letters and digits of any script, joined by hyphens."""
    words = re.sub(r"[^\w]+|_", "-", text.lower()).strip("-")
    cut = words[:MAX_SLUG_LEN].encode(errors="ignore")[:MAX_SLUG_BYTES].decode(errors="ignore")
    return cut.rstrip("-") or "piece"
