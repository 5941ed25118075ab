"""Training learns, resumes exactly, and its checkpoint is one that transformers loads."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, EncodecModel, MusicgenMelodyForConditionalGeneration

from musicgen.demo import train_codec, train_lm
from musicgen.demo.dataset import load_clips
from musicgen.demo.forward import MAX_STEPS, initialise
from musicgen.demo.model import save_checkpoint
from musicgen.demo.muon import Muon, orthogonalised

LIKE_ADAMW = {"adjust_lr_fn": "match_rms_adamw"}
pytestmark = pytest.mark.filterwarnings("ignore")


def settings(num_steps: int = 1000) -> train_lm.Settings:
    return train_lm.Settings(
        num_steps=num_steps, seed=3, crop=(2, 48), long_crop=(1, 96), long_from=0.9, muon_rate=3e-3, adam_rate=2e-3
    )


@pytest.fixture(autouse=True)
def _quick_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_lm, "initialise", lambda model, seed: initialise(model, seed, num_fit_steps=2))


@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (32, 96)])
def test_matrices_are_updated_as_by_torch(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    options = {"lr": 0.02, "weight_decay": 0.1}
    pair = [(ours, Muon([ours], **options)), (theirs, torch.optim.Muon([theirs], **options, **LIKE_ADAMW))]
    for _ in range(3):
        gradient = torch.randn(shape, generator=generator)
        for matrix, optimiser in pair:
            matrix.grad = gradient.clone()
            optimiser.step()
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)  # theirs multiplies in bfloat16; updates are some 0.02
    values = torch.linalg.svdvals(orthogonalised(torch.randn(shape, generator=generator)))
    assert values.max() < 1.3
    assert values.median() > 0.6  # a square matrix may have one near zero, which stays small


def test_loss_falls_and_a_restart_changes_nothing(codec: EncodecModel, cached: Path, tmp_path: Path) -> None:
    clips = load_clips(cached)
    (tmp_path / "a").mkdir()
    whole = train_lm.Trainer(settings(), codec, tmp_path / "a")
    losses = [whole.train_step(clips)[0].item() for _ in range(12)]
    assert losses[-1] < losses[0] - 0.3

    (tmp_path / "b").mkdir()
    first = train_lm.Trainer(settings(), codec, tmp_path / "b")
    for _ in range(6):
        first.train_step(clips)
    first.save()
    second = train_lm.Trainer(settings(), codec, tmp_path / "b")
    assert second.step == 6
    assert [second.train_step(clips)[0].item() for _ in range(6)] == losses[6:]


def test_text_is_trained_slower_than_the_rest(codec: EncodecModel, cached: Path, tmp_path: Path) -> None:
    trainer = train_lm.Trainer(settings(), codec, tmp_path)
    trainer.step = train_lm.WARM_UP_STEPS
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train_step(load_clips(cached))

    def largest_change(prefix: str) -> float:
        after = trainer.model.named_parameters()
        return max((p - before[name]).abs().max().item() for name, p in after if name.startswith(prefix))

    # Adam's first update is the rate itself, wherever there is a gradient; weight decay adds a little.
    assert largest_change("audio_enc_to_dec_proj.") == pytest.approx(2e-3, rel=0.1)
    assert largest_change("enc_to_dec_proj.") == pytest.approx(train_lm.TEXT_RATE * 2e-3, rel=0.1)
    assert 0 < largest_change("text_encoder.") < 2 * train_lm.TEXT_RATE * 2e-3
    assert largest_change("audio_encoder.") == 0


def test_evaluation_tells_conditions_apart(codec: EncodecModel, cached: Path, tmp_path: Path) -> None:
    trainer = train_lm.Trainer(settings(), codec, tmp_path)
    # Fresh weights are too small for the conditions to show in four decimals.
    torch.nn.init.normal_(trainer.model.enc_to_dec_proj.weight)
    for layer in trainer.model.decoder.model.decoder.layers:
        for name in ("v_proj", "out_proj"):
            torch.nn.init.normal_(getattr(layer.self_attn, name).weight, std=0.3)
    result = train_lm.evaluate(trainer.model, load_clips(cached), 4)
    assert set(result) == {name for name, _ in train_lm.CONDITIONS}
    assert all(len(losses) == 4 for losses in result.values())
    assert len({losses[0] for losses in result.values()}) == len(result)


def test_schedule_and_crops() -> None:
    assert train_lm.learning_rate_factor(0, 0.0) == pytest.approx(1 / train_lm.WARM_UP_STEPS)
    assert train_lm.learning_rate_factor(1000, 0.3) == 1.0
    assert train_lm.learning_rate_factor(1000, 1.0) == 0.02
    middle = (1 + train_lm.DECAY_FROM) / 2
    assert train_lm.learning_rate_factor(1000, middle) == pytest.approx(0.5)
    import random

    rng = random.Random(0)
    crops = [train_lm.choose_crop(settings(), 0.0, rng) for _ in range(200)]
    assert 60 < sum(offset == 0 for *_, offset in crops) < 140
    assert all(offset + 48 < MAX_STEPS for *_, offset in crops)
    assert train_lm.choose_crop(settings(), 0.95, rng)[:2] == (1, 96)


def test_training_runs_its_steps_and_no_more(codec: EncodecModel, cached: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    trainer = train_lm.Trainer(settings(num_steps=3), codec, run)
    train_lm.train(trainer, cached, load_clips(cached), save_every_s=0.2, eval_every_s=1e9)
    assert trainer.step == 3
    assert trainer.progress == 1.0
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert "held_out" in lines[-1]
    assert (run / "state.pt").exists()


def test_checkpoint_loads_with_transformers(codec: EncodecModel, cached: Path, tmp_path: Path) -> None:
    trainer = train_lm.Trainer(settings(), codec, tmp_path)
    trainer.train_step(load_clips(cached))
    save_checkpoint(trainer.model, tmp_path / "out")
    loaded = MusicgenMelodyForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32)
    wanted = {name: tensor.half().float() for name, tensor in trainer.model.state_dict().items()}
    found = loaded.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items() if name in found)
    assert set(found) == set(wanted)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")("sad jazz").input_ids
        == trainer.tokenizer.encode("sad jazz").ids
    )


def test_codec_learns_and_resumes(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    time = np.arange(2 * train_codec.CROP_SAMPLES) / 32000
    tones = np.stack([np.sin(2 * np.pi * hz * time) for hz in generator.uniform(200, 900, 4)])
    shards = [(20000 * tones).astype(np.int16)]

    def steps(trainer: train_codec.CodecTrainer, num_steps: int) -> list[float]:
        return [trainer.train_step(shards, 2) for _ in range(num_steps)]

    (tmp_path / "a").mkdir()
    whole = train_codec.CodecTrainer(tmp_path / "a", 1000, warm_up_steps=4)
    losses = steps(whole, 10)
    assert losses[-1] < losses[0]
    (tmp_path / "b").mkdir()
    first = train_codec.CodecTrainer(tmp_path / "b", 1000, warm_up_steps=4)
    steps(first, 6)
    first.save()
    second = train_codec.CodecTrainer(tmp_path / "b", 1000, warm_up_steps=4)
    assert steps(second, 4) == losses[6:]
    saved = EncodecModel.from_pretrained(tmp_path / "b" / "codec").eval()
    wav = torch.from_numpy(shards[0][:1].astype(np.float32) / 32767)[:, None]
    codes = saved.encode(wav, bandwidth=2.0).audio_codes
    assert codes.shape[-2] == 4
    assert codes[0, 0, 0].unique().numel() > 1
