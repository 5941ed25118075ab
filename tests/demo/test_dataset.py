"""Batches: delay pattern, crops, conditions."""

import json
import random
from pathlib import Path

import pytest
import torch

from musicgen.demo.dataset import (
    SPECIAL,
    _foreign_clip,
    delay,
    disturb_past,
    held_out_batch,
    load_clips,
    repeat_melody,
    sample_batch,
)
from musicgen.demo.evaluate import undelay
from musicgen.demo.text import TEXT_LEN, build_tokenizer


def test_delay_layout_and_its_inverse() -> None:
    codes = torch.arange(24).view(1, 4, 6)
    delayed = delay(codes)
    assert delayed.shape == (1, 4, 10)
    assert delayed[0, 2].tolist() == [SPECIAL] * 3 + codes[0, 2].tolist() + [SPECIAL]
    assert (delayed[:, :, 0] == SPECIAL).all()
    assert torch.equal(undelay(delayed), codes)


def test_missing_cache_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="tokenise"):
        load_clips(tmp_path)


def test_a_melody_is_repeated_cyclically() -> None:
    assert repeat_melody(torch.arange(7), 3).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_training_batches(cached: Path) -> None:
    clips, tokenizer = load_clips(cached), build_tokenizer()
    for offset in (0, 160):
        batch = sample_batch(clips, tokenizer, random.Random(1), 64, 40, offset)
        assert batch.inputs.shape == batch.targets.shape == (64, 4, 40)
        same = (batch.inputs[:, :, 1:] == batch.targets[:, :, :-1]).all(dim=1)
        hidden = (batch.inputs[:, :, 1:] == SPECIAL).all(dim=1)
        # A row's past is true, hidden in part, or another clip's in part; all three occur.
        assert 8 < same.all(dim=1).sum() < 36
        assert 8 < hidden[:, 8:].any(dim=1).sum() < 36
        assert 8 < (~same & ~hidden).any(dim=1).sum() < 44
        assert not ((~same & ~hidden).any(dim=1) & hidden[:, 8:].any(dim=1)).any()
        assert batch.text_ids.shape == (64, TEXT_LEN)
        assert batch.chroma.shape == (64, 235)
        first = (batch.inputs[:, :, 0] == SPECIAL).all(dim=1)
        assert first.all() == (offset == 0)
        # Both kinds of dropping occur, and neither always.
        assert 0 < (batch.text_mask == 0).sum() < 32
        assert 0 < (batch.chroma == 0).all(dim=1).sum() < 32
    # The melody of a crop is right wherever it is kept, also when it was repeated.
    codes = batch.targets[:, 0] // 50
    kept = (batch.chroma != 0).any(dim=1)
    frames = (torch.arange(40) + 160) * 10 // 64
    assert torch.equal(batch.chroma[kept][:, frames], codes[kept])


def test_a_foreign_past_plays_the_same_melody_in_another_style(cached: Path) -> None:
    labels = cached / "train_0000.json"
    fields = json.loads(labels.read_text())
    for index, one in enumerate(fields):
        one["style"], one["group"] = ("rock", "edm", "jazz")[index % 3], f"1/0/{index // 3}"
    labels.write_text(json.dumps(fields))
    clips = load_clips(cached)
    assert clips.groups == {"1/0/0": [0, 1, 2], "1/0/1": [3, 4, 5]}
    chosen = [0, 4] * 40
    inputs = clips.sequences[chosen, :, 300:500].long()
    disturbed = disturb_past(clips, chosen, inputs, 300, random.Random(0))
    assert torch.equal(inputs, clips.sequences[chosen, :, 300:500].long())
    donors = set()
    for row, index in enumerate(chosen):
        changed = (disturbed[row] != inputs[row]).any(dim=0) & (disturbed[row] != SPECIAL).any(dim=0)
        columns = changed.nonzero().flatten()
        if len(columns) == 0:
            continue
        partners = [other for other in clips.groups[clips.labels[index].group or ""] if other != index]
        partners = [
            o for o in partners if torch.equal(clips.sequences[o, :, 300 + columns].long(), disturbed[row][:, columns])
        ]
        assert len(partners) == 1
        donors.add((index, partners[0]))
    assert donors == {(0, 1), (0, 2), (4, 3), (4, 5)}
    rng = random.Random(1)
    assert {_foreign_clip(clips, 4, rng) for _ in range(60)} == {3, 5}
    for one in fields:
        one["group"] = None
    labels.write_text(json.dumps(fields))
    assert {_foreign_clip(load_clips(cached), 4, rng) for _ in range(60)} == {0, 2, 3, 5}


def test_held_out_conditions(cached: Path) -> None:
    clips, tokenizer = load_clips(cached), build_tokenizer()
    right = held_out_batch(clips, tokenizer, [0, 1], 20)
    wrong = held_out_batch(clips, tokenizer, [0, 1], 20, melody="wrong", text="wrong")
    none = held_out_batch(clips, tokenizer, [0, 1], 20, melody="none", text="none")
    assert torch.equal(wrong.chroma[0], right.chroma[1])
    assert torch.equal(wrong.text_ids[0], right.text_ids[1])
    assert not torch.equal(wrong.text_ids[1], right.text_ids[1])
    assert torch.equal(wrong.targets, right.targets)
    assert none.text_mask.sum() == none.chroma.sum() == 0
    assert right.text_mask.sum() == 2
