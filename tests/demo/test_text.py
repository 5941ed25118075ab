"""The demo tokenizer takes any text and always gives eight tokens."""

import random

import pytest

from musicgen.demo.score import compose, describe
from musicgen.demo.text import TEXT_LEN, build_tokenizer, vocabulary


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Happy ROCK!", ["happy", "rock"]),
        ("an energetic EDM track, with weird rocky 8-bit sounds", ["energetic", "edm", "8-bit"]),
        ("日本語 sad", ["sad"]),
        (" ", []),
        ("rocket jazzy unhappy", []),
        ("line\nbreak jazz", ["jazz"]),
        ("happy " * 20, ["happy"] * 7),
    ],
)
def test_known_words_then_filler(text: str, words: list[str]) -> None:
    tokens = build_tokenizer().encode(text).tokens
    assert tokens == [*words, *["_"] * (TEXT_LEN - 1 - len(words)), "</s>"]


def test_every_label_is_spoken_in_known_words() -> None:
    rng = random.Random(3)
    tokenizer = build_tokenizer()
    for _ in range(50):
        text = describe(compose(rng).label, rng)
        assert [token for token in tokenizer.encode(text).tokens if token not in ("_", "</s>")] == text.lower().split()


def test_vocabulary_has_no_unknown_id() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.get_vocab_size() == len(vocabulary()) + 4
    assert "<unk>" not in tokenizer.encode("anything at all 123 _ - -- happy-ish").tokens
