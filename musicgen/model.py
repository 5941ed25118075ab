"""A loaded model: its components, on one device. Created by `weights`, used by the API."""

from __future__ import annotations

from dataclasses import dataclass

from musicgen_kernels.step import DecoderWeights

from musicgen.config import ModelConfig
from musicgen.models.chroma import ChromaExtractor
from musicgen.models.encodec import EncodecDecoder
from musicgen.models.encodec_encoder import EncodecEncoder
from musicgen.models.language_model import LanguageModel
from musicgen.models.t5 import TextEncoder


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """The components of a MusicGen model, which are independent of each other."""

    config: ModelConfig
    lm: LanguageModel
    text_encoder: TextEncoder
    chroma: ChromaExtractor | None
    """None for models without melody conditioning."""
    codec: EncodecDecoder
    codec_encoder: EncodecEncoder
    packed: DecoderWeights | None = None
    """The packed decoder, for checkpoints that hold only that; `lm.decoder` is empty then."""
