"""One loaded model: its parts, on one device. Filled in by `weights`, used by the API; owns no algorithm."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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

    def to(self, device: torch.device, dtype: torch.dtype) -> Model:
        """Move all parts (mutated) to `device`; the decoder's matrices to `dtype`. Returns self."""
        self.lm.to(device)
        self.lm.decoder.set_compute_dtype(dtype)
        self.text_encoder.to(device)
        self.codec.to(device)
        self.codec_encoder.to(device)
        return self
