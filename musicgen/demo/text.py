"""The demo model's tokenizer: one token per word of its scores, always eight tokens per prompt.

Accepts any text: words outside the vocabulary are dropped, the first seven remaining ones are kept, and shorter prompts
are padded with ``_``. All prompts thus have the same length, which keeps the absolute positions of the audio (they
follow the text) the same for all requests.
"""

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from musicgen.demo.score import ENERGY_WORDS, INSTRUMENTS, MOOD_WORDS, STYLES

NUM_WORDS = 7
TEXT_LEN = NUM_WORDS + 1
"""Tokens of every non-empty prompt: the words and the end marker."""
PAD, END, UNKNOWN, FILLER = "<pad>", "</s>", "<unk>", "_"


def vocabulary() -> list[str]:
    """Every word of the training texts, sorted."""
    texts = [name for style in STYLES.values() for name in style.names]
    texts += [word for words in (*MOOD_WORDS.values(), *ENERGY_WORDS.values()) for word in words]
    texts += [*INSTRUMENTS.values(), "solo"]
    return sorted({word.lower() for text in texts for word in text.split()})


def build_tokenizer() -> Tokenizer:
    """The tokenizer; ids 0, 1, 2, 3 are padding, end, unknown (never produced) and filler."""
    words = vocabulary()
    letters = r"[a-z0-9\-]"
    known = "|".join(words)
    tokenizer = Tokenizer(
        models.WordLevel(
            {word: index for index, word in enumerate([PAD, END, UNKNOWN, FILLER, *words])}, unk_token=UNKNOWN
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(rf"(?!{letters})."), " "),
            # A whole word outside the vocabulary.
            normalizers.Replace(Regex(rf"(?<!{letters})(?!(?:{known})(?!{letters})){letters}+"), " "),
            normalizers.Replace(Regex(r"\z"), f" {FILLER}" * NUM_WORDS),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Replace(Regex(r"\A "), ""),
            # \K: matches, and removes, only what follows the first seven words.
            normalizers.Replace(Regex(rf"\A(?:[^ ]+ ){{{NUM_WORDS - 1}}}[^ ]+\K.*"), ""),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return tokenizer
