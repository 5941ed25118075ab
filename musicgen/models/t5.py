"""The text encoder: one prompt → T5 states, using transformers.

Prompts are encoded one at a time: padding would become part of the melody models' prefix. Independent of guidance.
transformers is imported only when an encoder is created: it takes seconds, and few processes encode text.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from musicgen.errors import InvalidRequestError, WeightsError

if TYPE_CHECKING:
    from transformers import T5EncoderModel

MAX_TEXT_TOKENS = 512
"""Maximum prompt length, the length T5 was trained with."""


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    def encode(self, text: str) -> list[int]: ...

    def get_vocab(self) -> dict[str, int]: ...

    def save_pretrained(self, save_directory: Path) -> object: ...


class TextEncoder:
    """T5 with its tokenizer.

    Args:
        model: a transformers `T5EncoderModel`, in fp32.
        tokenizer: its tokenizer, which appends `</s>` to every prompt.
    """

    def __init__(self, model: T5EncoderModel, tokenizer: Tokenizer) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, name_or_path: str) -> TextEncoder:
        """Load a T5 checkpoint such as `t5-base`, which audiocraft checkpoints reference but do not contain."""
        from transformers import T5EncoderModel

        try:
            model = T5EncoderModel.from_pretrained(name_or_path, dtype=torch.float32)
        except OSError as error:
            raise WeightsError(
                f"text encoder {name_or_path!r}: expected it in the local cache or on the Hugging Face hub, got "
                f"neither; check the network, or HF_HOME and HF_HUB_OFFLINE"
            ) from error
        return cls(model, load_tokenizer(name_or_path))

    @property
    def dim(self) -> int:
        """Width of the states."""
        return int(self.model.config.d_model)

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files to `folder`."""
        self.tokenizer.save_pretrained(folder)

    def to(self, device: torch.device) -> None:
        self.model.to(device)

    @torch.inference_mode()
    def encode(self, prompt: str | None) -> Tensor | None:
        """States `[L, text_dim]` in fp32, or None for no prompt.

        As in audiocraft, None and the empty string mean no prompt, but whitespace is a prompt.

        Raises:
            InvalidRequestError: the prompt is longer than `MAX_TEXT_TOKENS` tokens, or not valid Unicode.
        """
        if not prompt:
            return None
        tokens = self.tokenize(prompt)
        device = next(self.model.parameters()).device
        ids = torch.tensor([tokens], device=device)
        states: Tensor = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        return states[0].float()

    def tokenize(self, prompt: str) -> list[int]:
        """The tokens of a prompt. Raises: InvalidRequestError: more than `MAX_TEXT_TOKENS`, or not valid Unicode."""
        _check_text(prompt)
        tokens = self.tokenizer.encode(prompt)
        if len(tokens) > MAX_TEXT_TOKENS:
            raise InvalidRequestError(
                f"a prompt of at most {MAX_TEXT_TOKENS} tokens", f"{len(tokens)}", "shorten the text", param="prompt"
            )
        return tokens


def _check_text(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        got = f"a lone surrogate at character {error.start}"
        raise InvalidRequestError("valid Unicode text", got, "encode it as UTF-8", param="prompt") from error


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint.

    transformers (5.23) also reads the checkpoint's configuration and warns about MusicGen's padding token, which lies
    outside the codebooks by design; the warning is suppressed.

    Raises:
        WeightsError: the checkpoint has no tokenizer that can be loaded.
    """
    from transformers import AutoTokenizer

    try:
        with _only_errors(logging.getLogger("transformers.configuration_utils")):
            tokenizer: Tokenizer = AutoTokenizer.from_pretrained(str(name_or_path))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{name_or_path}: expected a tokenizer (tokenizer.json or spiece.model), got an error: {error}"
        ) from error
    if all(token.startswith("<") or not token.strip("▁") for token in tokenizer.get_vocab()):
        # Without its files transformers builds a tokenizer of special tokens only, to which every word is unknown.
        raise WeightsError(f"{name_or_path}: expected a tokenizer (tokenizer.json or spiece.model), got none")
    return tokenizer


@contextmanager
def _only_errors(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
