"""One loaded model: its parts, on one device. Filled in by `weights`, used by the API; owns no algorithm."""

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
    """The parts of a MusicGen model. Each part knows nothing of the others."""

    config: ModelConfig
    lm: LanguageModel
    text_encoder: TextEncoder
    chroma: ChromaExtractor | None
    """None for a model that takes no melody."""
    codec: EncodecDecoder
    codec_encoder: EncodecEncoder
    packed: DecoderWeights | None = None
    """The decoder as the kernels' step takes it, for checkpoints that hold only that; `lm.decoder` is empty then."""
