"""The text encoder: what it refuses. That its states are transformers' own, the language model's tests say."""

from __future__ import annotations

import pytest

from musicgen.errors import InvalidRequestError
from musicgen.model import Model


@pytest.mark.parametrize("prompt", ["\ud83c", "rock \udcff and roll", "\udfb8\ud83c"])
def test_a_text_that_is_no_unicode_is_refused(prompt: str, models: dict[str, Model]) -> None:
    with pytest.raises(InvalidRequestError, match="Unicode") as caught:
        models["text"].text_encoder.encode(prompt)
    assert caught.value.param == "prompt"
    assert str(caught.value).isascii()  # so that it can be shown and sent


@pytest.mark.parametrize("prompt", ["\N{GUITAR}", "\0", "\u202e", "音楽"])
def test_every_other_text_is_taken(prompt: str, models: dict[str, Model]) -> None:
    states = models["text"].text_encoder.encode(prompt)
    assert states is not None
    assert states.isfinite().all()
