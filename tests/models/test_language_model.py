"""The language model against transformers: logits of the prefill and of every step, for every kind of model."""

from __future__ import annotations

import itertools

import pytest
import tiny
import torch
from tiny import KINDS, tune

from musicgen.model import Model
from musicgen.models.language_model import null_chroma
from musicgen.models.transformer import sinusoidal_positions
from musicgen.types import Conditioning, SamplingParams

PROMPTS = ["rock", "happy rock with a very long and winding description of guitars, drums and bass", "a b c d e"]
NUM_PREFILL, NUM_STEPS = 9, 12


def _peer_logits(
    peer: tiny.PreTrainedModel, tokens: list[int], chroma: torch.Tensor | None, codes: torch.Tensor
) -> torch.Tensor:
    """transformers' logits `[S, K, V]` for one conditional row, without a cache."""
    ids = torch.tensor([tokens])
    extra = {} if chroma is None else {"input_features": chroma[None]}
    with torch.no_grad():
        out = peer(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=codes, **extra)
    return out.logits[:, -codes.shape[-1] :].transpose(0, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits_equal_transformers(
    kind: str, prompt: str, models: dict[str, Model], peers: dict[str, tiny.PreTrainedModel]
) -> None:
    model, peer = models[kind], peers[kind]
    num_codebooks = model.config.decoder.num_codebooks
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, tiny.CODEBOOK_SIZE + 1, (num_codebooks, NUM_PREFILL + NUM_STEPS), generator=generator)
    chroma = None
    if model.chroma is not None:
        (chroma,) = model.chroma([(tune(3.0), 32000)])
    expected = _peer_logits(peer, model.text_encoder.tokenizer.encode(prompt), chroma, codes)

    conditioning = Conditioning(model.text_encoder.encode(prompt), chroma)
    rows = model.lm.guidance_rows(conditioning, SamplingParams(guidance_scale=1.0))
    assert rows.num_rows == 1
    with torch.no_grad():
        state = model.lm.decoder.start(1, rows.prefix_len + codes.shape[-1], rows.text)
        logits = [model.lm.decoder(codes[None, :, :NUM_PREFILL], state, rows.prefix)[0]]
        for step in range(NUM_PREFILL, codes.shape[-1]):
            logits.append(model.lm.decoder(codes[None, :, step : step + 1], state)[0])
    torch.testing.assert_close(torch.cat(logits), expected, atol=1e-4, rtol=0)


def test_the_oracle_reacts(peers: dict[str, tiny.PreTrainedModel], models: dict[str, Model]) -> None:
    """transformers' melody model ignored its conditions in some releases; then it would prove nothing."""
    codes = torch.zeros(4, 3, dtype=torch.long)
    encode = models["melody"].text_encoder.tokenizer.encode
    chroma = null_chroma(235, 12)
    other = chroma.roll(5, dims=-1)
    base = _peer_logits(peers["melody"], encode("rock"), chroma, codes)
    assert (base - _peer_logits(peers["melody"], encode("jazz"), chroma, codes)).abs().max() > 1e-2
    assert (base - _peer_logits(peers["melody"], encode("rock"), other, codes)).abs().max() > 1e-2


def test_prefill_in_chunks_equals_at_once(models: dict[str, Model]) -> None:
    model = models["melody"]
    rows = model.lm.guidance_rows(Conditioning(model.text_encoder.encode("rock"), None), SamplingParams())
    codes = torch.randint(0, tiny.CODEBOOK_SIZE, (1, 4, 10)).expand(rows.num_rows, -1, -1)
    with torch.no_grad():
        whole = model.lm.decoder(codes, model.lm.decoder.start(rows.num_rows, 300, None), rows.prefix)
        state = model.lm.decoder.start(rows.num_rows, 300, None)
        parts = [model.lm.decoder(codes[:, :, :4], state, rows.prefix), model.lm.decoder(codes[:, :, 4:], state)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=0)


def test_guidance_rows(models: dict[str, Model]) -> None:
    model = models["melody"]
    text = model.text_encoder.encode("rock")
    chroma = null_chroma(235, 12).roll(3, dims=-1)

    def num_rows(conditioning: Conditioning, **options: float) -> int:
        return model.lm.guidance_rows(conditioning, SamplingParams(**options)).num_rows

    assert num_rows(Conditioning(text, chroma)) == 2
    assert num_rows(Conditioning(text, chroma), guidance_scale=1.0) == 1
    assert num_rows(Conditioning(text, chroma), melody_guidance=5.0) == 3
    assert num_rows(Conditioning(None, None)) == 1
    rows = model.lm.guidance_rows(Conditioning(text, chroma), SamplingParams(melody_guidance=5.0)).prefix
    assert rows is not None
    assert torch.equal(rows[0, :235], rows[1, :235])  # conditional and melody-only share the melody
    assert not rows[1:, 235:].any()  # the text of the others is exactly zero
    assert torch.equal(rows[2, 0], model.lm.chroma_proj(null_chroma(1, 12))[0])


@pytest.mark.parametrize("kind", ["text", "melody"])
def test_planned_rows_are_those_that_are_made(kind: str, models: dict[str, Model]) -> None:
    model = models[kind]
    texts = [None, model.text_encoder.encode("rock"), model.text_encoder.encode("a long piece of sad jazz")]
    melodies = [None] if kind == "text" else [None, null_chroma(235, 12).roll(3, dims=-1)]
    doubles = [None] if kind == "text" else [None, 5.0]
    for text, chroma, scale, double in itertools.product(texts, melodies, (1.0, 3.0), doubles):
        request = Conditioning(text, chroma), SamplingParams(guidance_scale=scale, melody_guidance=double)
        planned, rows = model.lm.plan_rows(*request), model.lm.guidance_rows(*request)
        assert (planned.num_rows, planned.prefix_len) == (rows.num_rows, rows.prefix_len)
        made = planned.make()
        assert made.num_rows == rows.num_rows
        for ours, theirs in ((made.prefix, rows.prefix), (made.text, rows.text)):
            assert ours is theirs is None or torch.equal(ours, theirs)


def test_empty_prompt_is_no_prompt(models: dict[str, Model]) -> None:
    encoder = models["text"].text_encoder
    assert encoder.encode("") is None
    assert encoder.encode(None) is None
    assert encoder.encode(" ") is not None


def test_text_states_equal_transformers_masked(
    models: dict[str, Model], peers: dict[str, tiny.PreTrainedModel]
) -> None:
    """A prompt alone gives what the peer gives for it in a padded batch with a mask."""
    encoder = models["text"].text_encoder
    rows = [encoder.tokenizer.encode(prompt) for prompt in PROMPTS]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with torch.no_grad():
        states = peers["text"].text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    for prompt, row, expected in zip(PROMPTS, rows, states, strict=True):
        got = encoder.encode(prompt)
        assert got is not None
        torch.testing.assert_close(got, expected[: len(row)], atol=1e-5, rtol=0)


def test_positions_keep_their_precision() -> None:
    table = sinusoidal_positions(1990, 10, 64, torch.device("cpu")).double()
    i = torch.arange(32, dtype=torch.float64)
    angle = torch.arange(1990, 2000, dtype=torch.float64)[:, None] / 10000 ** (i / 31)
    torch.testing.assert_close(table, torch.cat([angle.cos(), angle.sin()], -1), atol=5e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_stay_close(dtype: torch.dtype, folders: dict[str, tiny.Path]) -> None:
    from musicgen.weights import load_model

    exact, rounded = load_model(str(folders["text"])), load_model(str(folders["text"]), dtype=dtype)
    codes = torch.randint(0, tiny.CODEBOOK_SIZE, (1, 4, 6), generator=torch.Generator().manual_seed(0))
    logits = []
    for model in (exact, rounded):
        rows = model.lm.guidance_rows(
            Conditioning(model.text_encoder.encode("rock"), None), SamplingParams(guidance_scale=1.0)
        )
        with torch.no_grad():
            logits.append(model.lm.decoder(codes, model.lm.decoder.start(1, 6, rows.text)))
    assert logits[1].dtype == torch.float32
    error = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert 1e-6 < error < 0.05
