"""Codes against the peers: transformers' generate, audiocraft's own goldens; batches; windows; draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from tiny import KINDS, tune

from musicgen.conditioning import Melody, condition
from musicgen.generation import generate_codes, plan_windows
from musicgen.model import Model
from musicgen.types import CodesRequest, SamplingParams, Window
from musicgen.weights import load_model

AUDIOCRAFT = tiny.GOLDEN / "audiocraft" / "text"
GREEDY = SamplingParams(greedy=True)


def request(
    model: Model,
    prompt: str | None,
    num_frames: int,
    sampling: SamplingParams = GREEDY,
    *,
    melody: torch.Tensor | None = None,
    prompt_codes: torch.Tensor | None = None,
    max_frames: int = 1500,
    stride: int = 900,
) -> CodesRequest:
    num_prompt = 0 if prompt_codes is None else prompt_codes.shape[-1]
    windows = plan_windows(num_frames, num_prompt, max_frames, stride)
    recording = None if melody is None else Melody(melody, 32000)
    return CodesRequest(condition(model, prompt, recording, windows), sampling, prompt_codes)


def _peer_codes(
    peer: tiny.PreTrainedModel, monkeypatch: pytest.MonkeyPatch, num_frames: int, **inputs: object
) -> torch.Tensor:
    """What transformers generates greedily with guidance 3: `[K, T]`, from what it passes to its codec."""
    decoded = []
    decode = peer.audio_encoder.decode

    def spy(audio_codes: torch.Tensor, *args: object, **kwargs: object) -> object:
        decoded.append(audio_codes[0, 0])
        return decode(audio_codes, *args, **kwargs)

    monkeypatch.setattr(peer.audio_encoder, "decode", spy)
    with torch.no_grad():
        peer.generate(**inputs, do_sample=False, guidance_scale=3.0, max_new_tokens=num_frames + 3)
    return torch.stack(decoded, 1).flatten(0, 1)  # stereo: left and right interleaved


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["rock", "sad jazz with a slow piano, a double bass and brushes on a snare"])
def test_greedy_codes_equal_transformers(
    kind: str,
    prompt: str,
    models: dict[str, Model],
    peers: dict[str, tiny.PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, num_frames = models[kind], 80
    ids = torch.tensor([model.text_encoder.tokenizer.encode(prompt)])
    inputs: dict[str, object] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    melody = None
    if model.chroma is not None:
        melody = tune(4.0)
        inputs["input_features"] = model.chroma([(melody, 32000)])[0][None]
    expected = _peer_codes(peers[kind], monkeypatch, num_frames, **inputs)
    got = generate_codes(model.lm, request(model, prompt, num_frames, melody=melody))
    assert expected.shape == (model.config.decoder.num_codebooks, num_frames)
    assert torch.equal(got, expected.int())
    assert len(got.unique()) > 10  # a model stuck on one code would prove little


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(AUDIOCRAFT / "golden.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def audiocraft_model() -> Model:
    return load_model(str(AUDIOCRAFT))


@pytest.mark.parametrize(
    ("name", "prompt", "seconds", "guidance"),
    [
        ("text0", "80s pop track with bassy drums and synth", 2, 3.0),
        ("text1", "sad jazz", 2, 3.0),
        ("cfg1.5", "80s pop track with bassy drums and synth", 1, 1.5),
        ("uncond", None, 1, 3.0),
    ],
)
def test_equal_to_audiocraft(
    name: str,
    prompt: str | None,
    seconds: int,
    guidance: float,
    audiocraft_model: Model,
    golden: dict[str, np.ndarray],
) -> None:
    sampling = SamplingParams(greedy=True, guidance_scale=guidance)
    codes = generate_codes(audiocraft_model.lm, request(audiocraft_model, prompt, seconds * 50, sampling))
    assert torch.equal(codes, torch.from_numpy(golden[f"{name}_tokens"][0]).int())
    wav = audiocraft_model.codec.decode_whole(codes[None])
    torch.testing.assert_close(wav, torch.from_numpy(golden[f"{name}_wav"][0]), atol=1e-4, rtol=0)


def test_continuation_equal_to_audiocraft(audiocraft_model: Model, golden: dict[str, np.ndarray]) -> None:
    prompt_codes = audiocraft_model.codec_encoder.encode(torch.from_numpy(golden["prompt_wav"][0]))
    assert torch.equal(prompt_codes, torch.from_numpy(golden["cont_tokens"][0, :, :50]))
    codes = generate_codes(audiocraft_model.lm, request(audiocraft_model, "sad jazz", 100, prompt_codes=prompt_codes))
    assert torch.equal(codes, torch.from_numpy(golden["cont_tokens"][0]).int())


@pytest.mark.parametrize("kind", ["text", "melody"])
def test_a_draw_depends_on_its_own_request_alone(kind: str, models: dict[str, Model]) -> None:
    model = models[kind]
    prompts = ["rock", "a much longer prompt with many more words in it", None]
    alone = [generate_codes(model.lm, request(model, p, 20, SamplingParams(seed=i))) for i, p in enumerate(prompts)]
    for order in ([2, 0, 1], [1, 2, 0]):
        again = {i: generate_codes(model.lm, request(model, prompts[i], 20, SamplingParams(seed=i))) for i in order}
        assert all(torch.equal(again[i], alone[i]) for i in order)


def test_seeds_differ(models: dict[str, Model]) -> None:
    model = models["text"]
    codes = [generate_codes(model.lm, request(model, "rock", 20, SamplingParams(seed=seed))) for seed in (0, 1, 2**62)]
    assert not torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


def test_frames_do_not_depend_on_the_duration(models: dict[str, Model]) -> None:
    """A longer piece begins as the shorter one does, but for the last frames, which the end's special tokens reach."""
    model = models["text"]
    short = generate_codes(model.lm, request(model, "rock", 15, SamplingParams(seed=3)))
    long = generate_codes(model.lm, request(model, "rock", 30, SamplingParams(seed=3)))
    assert torch.equal(long[:, :12], short[:, :12])


def test_continuing_own_codes_gives_the_same_piece(models: dict[str, Model]) -> None:
    """Resuming from any frame leads to the codes of the undisturbed run, as draws are keyed by step.

    Holds as long as no two candidates are within the rounding of one prefill against many steps.
    """
    model = models["melody"]
    sampling = SamplingParams(seed=5)
    whole = generate_codes(model.lm, request(model, "rock", 24, sampling))
    for num_prompt in (1, 2, 3, 4, 11, 23):
        resumed = generate_codes(model.lm, request(model, "rock", 24, sampling, prompt_codes=whole[:, :num_prompt]))
        assert torch.equal(resumed, whole)


def test_unconditional_ignores_guidance(models: dict[str, Model]) -> None:
    model = models["melody"]
    codes = [
        generate_codes(model.lm, request(model, None, 12, SamplingParams(seed=1, guidance_scale=scale)))
        for scale in (1.0, 3.0)
    ]
    assert torch.equal(codes[0], codes[1])


def test_melody_guidance_of_one_is_plain_guidance(models: dict[str, Model]) -> None:
    model, melody = models["melody"], tune(2.0)
    plain = generate_codes(model.lm, request(model, "rock", 20, GREEDY, melody=melody))
    double = SamplingParams(greedy=True, melody_guidance=1.0)
    strong = SamplingParams(greedy=True, melody_guidance=6.0)
    assert torch.equal(generate_codes(model.lm, request(model, "rock", 20, double, melody=melody)), plain)
    assert not torch.equal(generate_codes(model.lm, request(model, "rock", 20, strong, melody=melody)), plain)


@pytest.mark.parametrize(
    ("num_frames", "num_prompt", "expected"),
    [
        (1500, 0, [(0, 1500)]),
        (1501, 0, [(0, 1500), (900, 1501)]),
        (3000, 0, [(0, 1500), (900, 2400), (1800, 3000)]),
        (2400, 700, [(0, 1500), (900, 2400)]),
        (2400, 1500, [(900, 2400)]),
        (3000, 1600, [(1000, 2500), (1900, 3000)]),
    ],
)
def test_windows(num_frames: int, num_prompt: int, expected: list[tuple[int, int]]) -> None:
    assert plan_windows(num_frames, num_prompt, 1500, 900) == [Window(*window) for window in expected]


@pytest.mark.parametrize("stride", [0, -1, 1500])
def test_windows_move_on(stride: int) -> None:
    with pytest.raises(AssertionError):
        plan_windows(1501, 0, 1500, stride)


def test_long_form_equals_windows_by_hand(models: dict[str, Model]) -> None:
    """Greedy long form is: generate a window, keep its tail as the prompt of the next, as audiocraft does."""
    model, max_frames, stride = models["text"], 30, 18
    long = generate_codes(model.lm, request(model, "rock", 60, max_frames=max_frames, stride=stride))
    piece = generate_codes(model.lm, request(model, "rock", 30))
    by_hand = piece
    while by_hand.shape[-1] < 60:
        piece = piece[:, stride:]
        length = min(30, 60 - by_hand.shape[-1] + piece.shape[-1])
        kept = piece.shape[-1]
        piece = generate_codes(model.lm, request(model, "rock", length, prompt_codes=piece))
        by_hand = torch.cat([by_hand, piece[:, kept:]], -1)
    assert torch.equal(long, by_hand)


def test_windows_repeat_no_draw(models: dict[str, Model]) -> None:
    """With a prompt that the model cannot see, equal windows would give equal codes if draws were reused."""
    model = models["text"]
    long = generate_codes(model.lm, request(model, "rock", 60, SamplingParams(seed=1), max_frames=30, stride=29))
    assert not torch.equal(long[:, 1:30], long[:, 30:59])


def test_melody_of_a_later_window_starts_at_its_time(models: dict[str, Model]) -> None:
    model = models["melody"]
    assert model.chroma is not None
    melody = tune(50.0)
    windows = plan_windows(2400, 0, 1500, 900)
    conditioned = condition(model, None, Melody(melody, 32000), windows)
    second = conditioned[1][1].chroma
    shifted = torch.cat([melody, melody], -1)[:, 18 * 32000 : 48 * 32000]
    assert second is not None
    assert torch.equal(second, model.chroma([(shifted, 32000)])[0])


def test_melody_of_the_only_window_starts_at_its_time(models: dict[str, Model]) -> None:
    """A prompt that fills more than a window may leave one window, which begins late."""
    model = models["melody"]
    assert model.chroma is not None
    melody = tune(50.0)
    windows = plan_windows(2400, 1600, 1500, 900)
    assert windows == [Window(1000, 2400)]
    ((_, conditioning),) = condition(model, None, Melody(melody, 32000), windows)
    assert conditioning.chroma is not None
    assert torch.equal(conditioning.chroma, model.chroma([(melody[:, 20 * 32000 :], 32000)])[0])


def test_progress_counts_every_frame(models: dict[str, Model]) -> None:
    model = models["text"]
    seen: list[int] = []
    generate_codes(model.lm, request(model, "rock", 40, max_frames=20, stride=12), seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 40


def test_checkpoints_stay_on_disk(folders: dict[str, Path]) -> None:
    assert (folders["text-stereo"] / "model.safetensors.index.json").is_file()
