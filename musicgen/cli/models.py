"""`musicgen models`: the models with a short name, their licences, and whether they are cached."""

from __future__ import annotations

import json as json_format
from collections.abc import Sequence

from musicgen.cli.quiet import quiet_libraries
from musicgen.weights.hub import is_cached
from musicgen.weights.registry import DEMO_MODEL, MODELS, ModelCard

COLUMNS = ("name", "parameters", "channels", "melody", "licence", "cached", "repository")


def run(*, json: bool) -> int:
    """Print the table. Returns the exit code."""
    with quiet_libraries():
        cards = [(card, _whereabouts(card)) for card in MODELS.values()]
    if json:
        print(json_format.dumps([_as_dict(card, where) for card, where in cards]))
        return 0
    print(_table([COLUMNS, *(_row(card, where) for card, where in cards)]))
    print(
        "\nParameter counts are for the language model. CC-BY-NC-4.0: non-commercial use only. Weights that are not\n"
        "cached are downloaded on first use. --model also accepts any other Hugging Face repository or local folder\n"
        "of a MusicGen model; check its licence."
    )
    return 0


def _whereabouts(card: ModelCard) -> str:
    if card.name == DEMO_MODEL:
        return "bundled"
    return "yes" if is_cached(card.repo_id) else "no"


def _row(card: ModelCard, where: str) -> tuple[str, ...]:
    return (
        card.name,
        short_number(card.num_lm_parameters),
        "stereo" if card.audio_channels == 2 else "mono",
        "yes" if card.melody else "no",
        card.license,
        where,
        card.repo_id or "-",
    )


def _as_dict(card: ModelCard, where: str) -> dict[str, object]:
    return {
        "name": card.name,
        "num_lm_parameters": int(card.num_lm_parameters),
        "audio_channels": card.audio_channels,
        "melody": card.melody,
        "license": card.license,
        "is_local": where != "no",
        "repo_id": card.repo_id or None,
    }


def short_number(value: float) -> str:
    """7000000 → `7 M`, 1380000000 → `1.38 B`."""
    return f"{value / 1e9:.2f} B" if value >= 1e8 else f"{value / 1e6:.0f} M"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
