"""The models with short names, and their licences. Static data; nothing is downloaded here."""

from __future__ import annotations

from dataclasses import dataclass

DEMO_MODEL = "demo"
NON_COMMERCIAL = "CC-BY-NC-4.0"


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Key facts about a model, available without loading it."""

    name: str
    repo_id: str
    """Hugging Face repository; empty for the bundled demo model."""
    num_lm_parameters: float
    melody: bool
    audio_channels: int
    license: str


def _meta(name: str, billions: float, *, melody: bool = False) -> list[ModelCard]:
    """The mono model and its stereo variant."""
    return [
        ModelCard(name, f"facebook/musicgen-{name}", billions * 1e9, melody, 1, NON_COMMERCIAL),
        ModelCard(f"stereo-{name}", f"facebook/musicgen-stereo-{name}", billions * 1e9, melody, 2, NON_COMMERCIAL),
    ]


MODELS: dict[str, ModelCard] = {
    card.name: card
    for card in [
        ModelCard(DEMO_MODEL, "", 5.6e6, True, 1, "MIT"),
        *_meta("small", 0.42),
        *_meta("medium", 1.84),
        *_meta("melody", 1.38, melody=True),
        *_meta("large", 3.26),
        *_meta("melody-large", 2.45, melody=True),
    ]
}


UNSUPPORTED = {"facebook/musicgen-style": "its style conditioner is not supported"}
"""Repositories that look like supported ones, and why they are not. They are refused before a download."""


def find(name: str) -> ModelCard | None:
    """The card of a short name (`melody`) or a repository id (`facebook/musicgen-melody`), or None.

    A revision after the name (`melody@main`) is ignored.
    """
    name = name.partition("@")[0]
    for card in MODELS.values():
        if name == card.name or (card.repo_id and name == card.repo_id):
            return card
    return None
