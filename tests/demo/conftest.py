"""A small codec and cached clips of random codes, shared by the demo tests."""

import json
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import EncodecModel

from musicgen.demo.score import compose
from musicgen.demo.train_codec import codec_config


@pytest.fixture(scope="session")
def codec() -> EncodecModel:
    torch.manual_seed(0)
    model = EncodecModel(codec_config()).eval()
    for layer in model.quantizer.layers:
        layer.codebook.embed.normal_(std=0.2)
    return model


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """A folder with one cached shard of six clips, whose first codebook's code is 50 times the melody's pitch class."""
    generator = np.random.default_rng(0)
    chroma = generator.integers(0, 12, (6, 235)).astype(np.int8)
    codes = generator.integers(0, 1024, (6, 4, 1500)).astype(np.int16)
    codes[:, 0] = 50 * chroma.astype(np.int16)[:, (np.arange(1500) * 10) // 64]
    np.savez(tmp_path / "train_0000.npz", codes=codes, chroma=chroma, chroma_decoded=chroma)
    labels = [asdict(compose(random.Random(seed)).label) for seed in range(6)]
    (tmp_path / "train_0000.json").write_text(json.dumps(labels))
    return tmp_path
