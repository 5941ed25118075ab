"""Scores are determined by their seed and stay within what the recipe promises; the MIDI file says the same."""

import json
import random
import shutil
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from musicgen.demo import render, score


def test_a_seed_names_a_score() -> None:
    assert score.compose(random.Random("1/2")) == score.compose(random.Random("1/2"))
    assert score.compose(random.Random("1/2")) != score.compose(random.Random("1/3"))


def test_leads_stay_in_range_and_are_one_voice() -> None:
    rng = random.Random(0)
    for _ in range(40):
        made = score.compose(rng)
        lead = [note for note in made.notes if note.channel == score.LEAD_CHANNEL]
        low, high = score.LEAD_RANGE
        assert all(low <= note.pitch <= high for note in lead)
        assert all(a.end_s <= b.start_s for a, b in pairwise(lead))
        assert all(note.end_s - note.start_s > score.MIN_NOTE_S - 0.02 for note in lead)
        # No hole: the lead sounds until the clip ends.
        assert lead[-1].end_s > score.CLIP_S - 0.1
        assert (len({note.channel for note in made.notes}) == 1) == (made.label.arrangement == "solo")


def test_scales_follow_the_mood() -> None:
    rng = random.Random(1)
    for _ in range(30):
        made = score.compose(rng)
        bar_s = 240 / made.label.bpm
        section_s = max(2, round(10 / bar_s)) * bar_s
        first = {n.pitch % 12 for n in made.notes if n.channel == score.LEAD_CHANNEL and n.end_s < section_s}
        scale = score.MAJOR if made.label.mood == "happy" else score.MINOR
        assert any(first <= {(tonic + step) % 12 for step in scale} for tonic in range(12))


def test_one_melody_in_every_style() -> None:
    rng = random.Random(2)
    for number in range(6):
        made = score.compose_in_every_style(rng, f"group-{number}")
        assert [one.label.style for one in made] == list(score.STYLES)
        leads = [[(n.pitch, n.start_s, n.end_s) for n in one.notes if n.channel == score.LEAD_CHANNEL] for one in made]
        assert all(lead == leads[0] for lead in leads)
        assert len({(one.label.mood, one.label.bpm, one.label.arrangement, one.label.group) for one in made}) == 1
        assert all(one.label.lead in score.STYLES[one.label.style].leads for one in made)
        # Where there is an accompaniment it is the style's own.
        others = {tuple((n.channel, n.pitch, n.start_s) for n in one.notes if n.channel) for one in made}
        assert len(others) == 1 if made[0].label.arrangement == "solo" else len(others) >= 5


def test_midi_file_holds_every_note() -> None:
    scores = [score.compose(random.Random(seed)) for seed in (1, 2)]
    data = render.midi_file(scores)
    assert data[:4] == b"MThd"
    assert struct.unpack(">IHHH", data[4:14]) == (6, 0, 1, render.TICKS_A_SECOND)
    assert struct.unpack(">I", data[18:22])[0] == len(data) - 22
    at, tick, ons = 22, 0, []
    while at < len(data):
        delta = 0
        while True:
            byte = data[at]
            at += 1
            delta = delta << 7 | byte & 127
            if byte < 128:
                break
        tick += delta
        kind = data[at] & 0xF0
        if data[at] == 0xFF:
            at += 3 + data[at + 2]
        elif kind == 0xC0:
            at += 2
        else:
            if kind == 0x90:
                ons.append((tick, data[at] & 15, data[at + 1]))
            at += 3
    expected = sorted(
        (
            round((index * (score.CLIP_S + render.GAP_S) + note.start_s) * render.TICKS_A_SECOND),
            note.channel,
            note.pitch,
        )
        for index, made in enumerate(scores)
        for note in made.notes
    )
    assert sorted(ons) == expected


def test_a_shard_holds_whole_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "render", lambda scores: np.zeros((len(scores), 4), np.int16))
    path = render.render_shard(1, 3, tmp_path, "pair", grouped=True)
    labels = json.loads(path.with_suffix(".json").read_text())
    assert len(np.load(path)) == len(labels) == 14
    assert [label["style"] for label in labels] == 2 * list(score.STYLES)
    assert [label["group"] for label in labels] == 7 * ["1/3/0"] + 7 * ["1/3/1"]
    single = render.render_shard(1, 3, tmp_path, "train", num_clips=2)
    assert [label["group"] for label in json.loads(single.with_suffix(".json").read_text())] == [None, None]


@pytest.mark.skipif(shutil.which("fluidsynth") is None, reason="needs fluidsynth and fluid-soundfont-gm")
def test_rendered_melody_is_the_score() -> None:
    import torch

    from musicgen.metrics import chromagram

    rng = random.Random(5)
    made = next(s for s in iter(lambda: score.compose(rng), None) if s.label.arrangement == "solo")
    clip = render.render([made])
    assert clip.dtype == np.int16
    assert clip.shape == (1, render.CLIP_SAMPLES)
    classes = chromagram(torch.from_numpy(clip / 32767.0).float())[0].argmax(dim=-1)
    right = 0
    for frame in range(len(classes)):
        at_s = frame * 0.128
        right += any(n.start_s <= at_s < n.end_s and n.pitch % 12 == classes[frame] for n in made.notes)
    assert right / len(classes) > 0.7
