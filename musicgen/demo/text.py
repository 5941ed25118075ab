"""The demo model's tokenizer: the words of its scores, one token each, always eight tokens a prompt.

Owns the vocabulary and the normalisation.  Any text is accepted: words outside the vocabulary are dropped, the first
seven that are left are kept, and the rest is filled up with ``_``.  So every prompt has the same length, which keeps
the audio's absolute positions (they count the text) the same for every request.
"""

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from musicgen.demo.score import ENERGY_WORDS, INSTRUMENTS, MOOD_WORDS, STYLES

NUM_WORDS = 7
TEXT_LEN = NUM_WORDS + 1
"""Tokens of every prompt that is not empty: the words and the end mark."""
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
            # A whole word that is not one of ours.
            normalizers.Replace(Regex(rf"(?<!{letters})(?!(?:{known})(?!{letters})){letters}+"), " "),
            normalizers.Replace(Regex(r"\z"), f" {FILLER}" * NUM_WORDS),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Replace(Regex(r"\A "), ""),
            # \K: only what follows the first seven words is matched, and removed.
            normalizers.Replace(Regex(rf"\A(?:[^ ]+ ){{{NUM_WORDS - 1}}}[^ ]+\K.*"), ""),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return tokenizer
