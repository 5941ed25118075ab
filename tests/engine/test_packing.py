"""Weights are packed as they are loaded, with progress."""

from __future__ import annotations

import pytest
import torch

from musicgen.config import WeightDtype
from musicgen.engine.packing import KINDS, kind_of, pack_decoder
from musicgen.errors import InvalidRequestError
from musicgen.model import Model


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_every_kind_is_packed_and_told_layer_by_layer(weights: WeightDtype, models: dict[str, Model]) -> None:
    told: list[tuple[int, int]] = []
    decoder = models["text"].lm.decoder
    packed = pack_decoder(decoder, weights, 64, on_layer=lambda done, total: told.append((done, total)))
    num_layers = decoder.config.num_layers
    assert told == [(i + 1, num_layers) for i in range(num_layers)]
    assert kind_of(packed) == weights
    assert packed.heads.kind == KINDS[weights]
    assert packed.embeddings.dtype == torch.float32


def test_a_kind_without_a_kernel_is_refused(models: dict[str, Model]) -> None:
    with pytest.raises(InvalidRequestError, match="weights"):
        pack_decoder(models["text"].lm.decoder, "int2", 64)  # type: ignore[arg-type]
