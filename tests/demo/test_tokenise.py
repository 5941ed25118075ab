"""Coding in pieces equals coding at once; the cache holds what it says."""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import EncodecModel

from musicgen.demo import tokenise
from musicgen.metrics import chromagram


def test_pieces_equal_one_pass(codec: EncodecModel, monkeypatch: object) -> None:
    torch.manual_seed(0)
    wav = 0.1 * torch.randn(2, 640 * 250)
    codes = tokenise.encode(codec, wav)
    with torch.no_grad():
        at_once = codec.quantizer.encode(codec.encoder(wav[:, None]), 2.0).transpose(0, 1)
        decoded = codec.decoder(codec.quantizer.decode(codes.transpose(0, 1)))[:, 0]
    assert codes.shape == (2, 4, 250)
    assert torch.equal(codes, at_once)
    assert torch.allclose(tokenise.decode(codec, codes), decoded, atol=1e-5)


def test_cache_of_a_shard(codec: EncodecModel, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    clips = (3000 * generator.standard_normal((2, 640 * 60))).astype(np.int16)
    np.save(tmp_path / "a_0000.npy", clips)
    (tmp_path / "a_0000.json").write_text(json.dumps([]))
    path = tokenise.tokenise_shard(codec, tmp_path / "a_0000.npy")
    with np.load(path) as cache:
        wav = torch.from_numpy(clips / 32767.0).float()
        assert cache["codes"].dtype == np.int16
        assert cache["codes"].shape == (2, 4, 60)
        assert (cache["chroma"] == chromagram(wav).argmax(-1).numpy()).all()
        decoded = tokenise.decode(codec, torch.from_numpy(cache["codes"]).long())
        assert (cache["chroma_decoded"] == chromagram(decoded).argmax(-1).numpy()).all()
    written = path.stat().st_mtime_ns
    assert tokenise.tokenise_shard(codec, tmp_path / "a_0000.npy").stat().st_mtime_ns == written
