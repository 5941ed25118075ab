"""The training pass computes what transformers computes, and the fitted heads look where they should."""

from pathlib import Path

import pytest
import torch
from transformers import EncodecModel

from musicgen.demo import align
from musicgen.demo.dataset import Batch, held_out_batch, load_clips
from musicgen.demo.forward import PREFIX_LEN, codebook_losses, hidden_states, sinusoidal_positions, text_separation
from musicgen.demo.model import CHROMA_LEN, build_model
from musicgen.demo.text import build_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")


def their_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    rows, num_codebooks, num_steps = batch.inputs.shape
    text = model.text_encoder(input_ids=batch.text_ids).last_hidden_state
    text = model.enc_to_dec_proj(text) * batch.text_mask[:, None, None]
    chroma = model.audio_enc_to_dec_proj(torch.nn.functional.one_hot(batch.chroma, 12).float())
    out = model.decoder(
        input_ids=batch.inputs.reshape(rows * num_codebooks, num_steps),
        encoder_hidden_states=torch.cat([chroma, text], dim=1),
    )
    return out.logits.view(rows, num_codebooks, -1, 1024)[:, :, -num_steps:]


def test_agrees_with_transformers(codec: EncodecModel, cached: Path) -> None:
    model = build_model(codec, seed=1).eval()
    for table in model.decoder.model.decoder.embed_tokens:
        torch.nn.init.normal_(table.weight)
    batch = held_out_batch(load_clips(cached), build_tokenizer(), [0, 1], 24)
    with torch.no_grad():
        states = hidden_states(model, batch, torch.float32)
        ours = torch.stack([head(states) for head in model.decoder.lm_heads], dim=1)
        wanted = their_logits(model, batch)
        assert torch.allclose(ours, wanted, atol=2e-5)
        expected = torch.nn.functional.cross_entropy(wanted[:, 0].flatten(0, 1), batch.targets[:, 0].flatten())
        losses = codebook_losses(model, batch, torch.float32)
    assert losses[0].item() == pytest.approx(expected.item(), abs=1e-4)


def test_a_crop_takes_the_positions_of_its_place(codec: EncodecModel, cached: Path) -> None:
    # With attention switched off a state depends on its own code and position only, so a crop's states must be those
    # of the whole sequence.
    model = build_model(codec, seed=1).eval()
    for layer in model.decoder.model.decoder.layers:
        torch.nn.init.zeros_(layer.self_attn.out_proj.weight)
    batch = held_out_batch(load_clips(cached), build_tokenizer(), [0], 64)
    crop = Batch(batch.inputs[:, :, 32:], batch.targets[:, :, 32:], batch.chroma, batch.text_ids, batch.text_mask, 32)
    with torch.no_grad():
        whole, part = (hidden_states(model, each, torch.float32) for each in (batch, crop))
    assert torch.allclose(whole[:, 32:], part, atol=1e-6)
    assert not torch.allclose(whole[:, :32], part, atol=1e-3)


def test_targets_point_at_the_same_time() -> None:
    targets = align.chroma_targets(64, PREFIX_LEN, CHROMA_LEN, 0.0, 0.5)
    assert torch.allclose(targets.sum(dim=1), torch.ones(64))
    # Frame 63 is centred at 1.27 s, chroma frame 10 at 1.28 s.
    assert targets[63].argmax().item() == 10
    assert align.text_targets(4, 10, 2)[:, 8:10].tolist() == [[0.5, 0.5]] * 4
    recent = align.recent_targets(64, PREFIX_LEN, 1.0, 0.5)
    assert recent[40].argmax().item() == PREFIX_LEN + 39


def test_a_fitted_head_looks_there() -> None:
    positions = sinusoidal_positions(20 + 96, 64)
    targets = align.chroma_targets(96, 20, 16, 0.0, 0.5)
    query, key, loss = align.fit_head(positions, targets, 16, seed=0, num_steps=200)
    normed = torch.nn.functional.layer_norm(positions, (64,))
    scores = (normed[20:] @ query.t()) @ (normed @ key.t()).t() / 4
    found = scores.masked_fill(torch.ones(96, 116).triu(21).bool(), -torch.inf).argmax(dim=1)
    assert (found - targets.argmax(dim=1)).abs().float().mean() < 0.7
    assert loss < 2.5


def test_words_that_are_alike_to_the_decoder_are_noticed(codec: EncodecModel) -> None:
    model = build_model(codec, seed=1).eval()
    fresh = text_separation(model)
    assert fresh > 0.1
    with torch.no_grad():
        # A large common part, as the projection's bias, hides the words; the size of everything together does not.
        model.enc_to_dec_proj.weight.mul_(3)
        model.enc_to_dec_proj.bias.mul_(3)
        assert text_separation(model) == pytest.approx(fresh, rel=1e-4)
        model.enc_to_dec_proj.bias.fill_(10 * model.enc_to_dec_proj.weight.abs().max() * 128**0.5)
        assert text_separation(model) < 0.1 * fresh
        words = build_tokenizer()
        rock, jazz = words.token_to_id("rock"), words.token_to_id("jazz")
        model.text_encoder.shared.weight[rock] = model.text_encoder.shared.weight[jazz]
        assert text_separation(model) == pytest.approx(0.0, abs=1e-6)
