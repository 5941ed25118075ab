"""A checkpoint folder of `small`'s real size with random weights: its timing is realistic, its music is not.

The decoder is created packed; T5 and EnCodec have the sizes of the published model. The tokenizer is that of the demo
model, so a prompt has about the same number of tokens.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from benchmarks.engine_models import codec_decoder, fill, model_config, packed_weights
from musicgen.config import WeightDtype
from musicgen.engine.memory import max_row_len
from musicgen.engine.packing import KINDS
from musicgen.model import Model
from musicgen.models.encodec_encoder import EncodecEncoder
from musicgen.models.language_model import LanguageModel
from musicgen.models.t5 import TextEncoder
from musicgen.weights import load_model, packed

T5_BASE = {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}


def random_folder(size: str, weights: WeightDtype, parent: Path) -> Path:
    """Write the checkpoint unless it exists; returns its folder, `parent/random-SIZE-WEIGHTS`."""
    folder = parent / f"random-{size}-{weights}"
    if not (folder / packed.CONFIG_FILE).exists():
        torch.manual_seed(0)
        config = model_config(size)
        lm = _projections(config)
        decoder = packed_weights(config, KINDS[weights], max_row_len(config))
        # Left empty: a random encoder would be useless, and nothing here encodes recordings.
        model = Model(config, lm, _text_encoder(), None, codec_decoder(), EncodecEncoder(config.codec, {}), decoder)
        packed.save(model, decoder, folder)
    return folder


def _projections(config: object) -> LanguageModel:
    with torch.device("meta"):
        lm = LanguageModel(config)  # type: ignore[arg-type]
    for module in (lm.text_proj, lm.chroma_proj):
        if isinstance(module, nn.Module):
            fill(module.to_empty(device="cpu"))
    return lm


def _text_encoder() -> TextEncoder:
    from transformers import T5Config, T5EncoderModel

    model = fill(T5EncoderModel(T5Config(**T5_BASE)))
    return TextEncoder(model, load_model("demo", "cpu").text_encoder.tokenizer)  # type: ignore[arg-type]
