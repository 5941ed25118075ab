"""Weights are packed as they are loaded, with progress."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from musicgen_kernels.cpu_step import CpuStep
from musicgen_kernels.weight_memory import is_gathered

from musicgen import MusicGen
from musicgen.config import CacheConfig, EngineConfig, WeightDtype
from musicgen.engine import runner
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


@pytest.mark.parametrize("weights", ["float32", "int4"])
def test_the_step_takes_packed_weights_as_they_are(
    weights: WeightDtype, models: dict[str, Model], folders: dict[str, Path], tmp_path: Path
) -> None:
    """A copy would double the memory of a start."""
    packed = pack_decoder(models["text"].lm.decoder, weights, 64)
    loaded = MusicGen.get_pretrained(str(folders["text"])).save_packed(tmp_path, weights)
    for given in (packed, MusicGen.get_pretrained(str(loaded)).model.packed):
        assert given is not None
        assert is_gathered(given)
        assert CpuStep(given).weights is given


def test_a_start_holds_the_weights_once() -> None:
    """In a process of its own, whose memory nobody else gives back meanwhile; 200 MB of weights in 16 layers."""
    code = """
import psutil, torch
from musicgen.config import DecoderConfig
from musicgen.engine.packing import pack_decoder
from musicgen.models.transformer import Decoder
from musicgen_kernels.cpu_step import CpuStep
held = lambda: psutil.Process().memory_info().rss
decoder = Decoder(DecoderConfig(16, 512, 8, 2048, 4, 64, cross_attention=False)).requires_grad_(False)
pack_decoder(Decoder(DecoderConfig(1, 64, 1, 64, 4, 64, cross_attention=False)), "float32", 16)  # loads libraries
peaks = [before := held()]
step = CpuStep(pack_decoder(decoder, "float32", 16, release=True, on_layer=lambda *_: peaks.append(held())))
matrices = [matrix for block in step.weights.blocks for matrix in (block.qkv, block.out, block.fc1, block.fc2)]
print(before, max(peaks), held(), sum(matrix.data.nbytes for matrix in matrices))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, peak, after, size = map(int, run.stdout.split())
    assert peak - before < 0.3 * size
    assert after - before < 0.1 * size


def test_freed_memory_is_returned_before_pages_are_counted(
    models: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    num_pages = runner.num_pages
    monkeypatch.setattr(runner, "return_freed_memory", lambda: told.append("returned"))
    monkeypatch.setattr(runner, "num_pages", lambda *given: told.append("counted") or num_pages(*given))
    runner.ModelRunner(models["text"].lm, EngineConfig(cache=CacheConfig(memory_bytes=2**20)))
    assert told == ["returned", "counted"]
