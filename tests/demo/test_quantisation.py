"""The comparison of kinds of weights measures the model itself: unquantised it agrees with the training-time pass."""

from pathlib import Path

import pytest
import torch
from musicgen_kernels.cpu_step import CpuStep
from transformers import MusicgenMelodyForConditionalGeneration

from musicgen.config import WeightDtype
from musicgen.demo import checkpoint_path, quantisation
from musicgen.demo.dataset import held_out_batch, load_clips
from musicgen.demo.forward import codebook_losses
from musicgen.demo.generate import generate
from musicgen.demo.text import build_tokenizer
from musicgen.engine.packing import pack_decoder
from musicgen.model import Model
from musicgen.weights import load_model

pytestmark = pytest.mark.filterwarnings("ignore")
NUM_CLIPS, NUM_STEPS = 3, 20


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(str(checkpoint_path()), "cpu")


def step_of(model: Model, weights: WeightDtype) -> CpuStep:
    return CpuStep(pack_decoder(model.lm.decoder, weights, 300))


def test_losses_through_the_engines_step(model: Model, cached: Path) -> None:
    clips = load_clips(cached)
    held = quantisation.prepare(model, clips, NUM_CLIPS, NUM_STEPS)
    peer = MusicgenMelodyForConditionalGeneration.from_pretrained(checkpoint_path(), dtype=torch.float32).eval()
    batch = held_out_batch(clips, build_tokenizer(), list(range(NUM_CLIPS)), NUM_STEPS)
    with torch.no_grad():
        wanted = codebook_losses(peer, batch, torch.float32).double()

    exact = step_of(model, "float32")
    losses = quantisation.teacher_forced_losses(exact, held, "float32", 1)
    torch.testing.assert_close(losses, wanted, atol=2e-4, rtol=0)
    cache = quantisation.teacher_forced_losses(exact, held, "int8", 1)
    coarse = quantisation.teacher_forced_losses(step_of(model, "int4"), held, "float32", 1)
    # Each kind is really used: eight-bit keys change little, four-bit weights more.
    assert 1e-5 < (cache - wanted).abs().max() < 0.3
    assert 1e-3 < (coarse - wanted).abs().max() < 1.0


def test_pieces_have_the_melodys_length(model: Model) -> None:
    melodies = 0.3 * torch.sin(torch.arange(16000) * 0.09)[None].repeat(2, 1)
    exact = generate(model, ["sad jazz", "happy rock"], melodies)
    assert exact.shape == melodies.shape
    assert torch.equal(exact[:1], generate(model, ["sad jazz"], melodies[:1]))
    coarse = generate(model, ["sad jazz", "happy rock"], melodies, weights="int4", kv="int8")
    assert not torch.equal(exact, coarse)


def test_table_shows_differences_from_the_first_row() -> None:
    rows = [
        {"weights": "float32", "kv": "float32", "perplexity": [8.0], "perplexity_of_mean": 100.0, "right": 0.7},
        {"weights": "int4", "kv": "int8", "perplexity": [9.0], "perplexity_of_mean": 105.0, "right": 0.65},
    ]
    lines = quantisation.as_table(rows).splitlines()
    assert lines[2] == "| float32 | float32 | 8.000 | 100.00 | +0.00 % | 0.700 | +0.000 |"
    assert lines[3] == "| int4 | int8 | 9.000 | 105.00 | +5.00 % | 0.650 | -0.050 |"
