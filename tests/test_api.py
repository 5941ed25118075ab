"""The API that audiocraft's users know: the model card's example, arguments, seeds, errors before any work."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from musicgen_kernels.errors import KernelArgumentError
from tiny import tune

from musicgen import GenerationParams, MusicGen, SamplingParams
from musicgen.config import WeightDtype
from musicgen.engine.packing import kind_of
from musicgen.engine.runner import ModelRunner
from musicgen.engine.thread import get_stats
from musicgen.errors import EngineDeadError, InternalError, InvalidRequestError
from musicgen.model import Model
from musicgen.types import ChunkPolicy


@pytest.fixture
def text(models: dict[str, Model]) -> MusicGen:
    return _short(MusicGen(models["text"]))


@pytest.fixture
def melody(models: dict[str, Model]) -> MusicGen:
    return _short(MusicGen(models["melody"]))


def _short(model: MusicGen) -> MusicGen:
    model.set_generation_params(duration=0.4)
    return model


def _wav(result: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    assert isinstance(result, torch.Tensor)
    return result


def _both(result: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    assert isinstance(result, tuple)
    return result


def test_the_model_cards_example(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As printed on the card, but for imports, the model's name, the recording and the duration."""
    monkeypatch.chdir(tmp_path)
    soundfile.write("bach.mp3", tune(3.0, 44100)[0].numpy(), 44100)

    import torchaudio.functional  # noqa: F401 - the card imports torchaudio

    from musicgen import MusicGen, audio_write
    from musicgen.audio import load_audio

    model = MusicGen.get_pretrained(str(folders["melody"]))
    model.set_generation_params(duration=0.5)

    descriptions = ["happy rock", "energetic EDM", "sad jazz"]

    melody, sr = load_audio("bach.mp3")
    # generates using the melody from the given audio and the provided descriptions.
    wav = model.generate_with_chroma(descriptions, melody[None].expand(3, -1, -1), sr)

    for idx, one_wav in enumerate(wav):
        # Will save under {idx}.wav, with loudness normalization at -14 db LUFS.
        audio_write(f"{idx}", one_wav.cpu(), model.sample_rate, strategy="loudness")

    for idx in range(3):
        samples, rate = soundfile.read(f"{idx}.wav")
        assert rate == 32000
        assert samples.shape == (16000,)


def test_attributes_and_defaults(models: dict[str, Model]) -> None:
    model = MusicGen(models["text-stereo"])
    assert (model.frame_rate, model.sample_rate, model.audio_channels) == (50, 32000, 2)
    assert (model.max_duration, model.duration) == (30.0, 15.0)
    model.set_generation_params()
    assert model.duration == 30.0


def test_shapes_and_tokens(models: dict[str, Model]) -> None:
    for kind, channels in (("text", 1), ("text-stereo", 2), ("melody-stereo", 2)):
        wav, tokens = _both(_short(MusicGen(models[kind])).generate(["rock", None], return_tokens=True))
        assert wav.shape == (2, channels, 12800)
        assert tokens.shape == (2, 4 * channels, 20)
        assert wav.isfinite().all()
        assert wav.std() > 0


def test_an_item_of_a_batch_is_what_it_is_alone(melody: MusicGen) -> None:
    prompts = ["rock", "a longer prompt than the others have", None]
    melodies = [tune(1.0), None, tune(2.0, first_note=3)]
    wav, tokens = _both(melody.generate_with_chroma(prompts, melodies, 32000, return_tokens=True, seed=[5, 6, 7]))
    for i, (prompt, tune_) in enumerate(zip(prompts, melodies, strict=True)):
        alone, alone_tokens = _both(
            melody.generate_with_chroma([prompt], [tune_], 32000, return_tokens=True, seed=5 + i)
        )
        assert torch.equal(alone_tokens[0], tokens[i])
        torch.testing.assert_close(alone[0], wav[i], atol=1e-5, rtol=0)


def test_seeds(text: MusicGen) -> None:
    first = _wav(text.generate(["rock"], seed=0))
    assert torch.equal(_wav(text.generate(["rock"], seed=0)), first)
    assert not torch.equal(_wav(text.generate(["rock"], seed=1)), first)
    assert not torch.equal(_wav(text.generate(["rock"])), _wav(text.generate(["rock"])))
    torch.manual_seed(3)
    drawn = _wav(text.generate(["rock"]))
    torch.manual_seed(3)
    assert torch.equal(_wav(text.generate(["rock"])), drawn)


def test_num_samples(text: MusicGen) -> None:
    _, tokens = _both(text.generate(["rock", "jazz"], return_tokens=True, seed=10, num_samples=3))
    assert tokens.shape[0] == 6
    _, alone = _both(text.generate(["jazz"], return_tokens=True, seed=14))
    assert torch.equal(tokens[4], alone[0])
    assert len({tuple(t.flatten().tolist()) for t in tokens}) == 6
    assert _wav(text.generate_unconditional(2)).shape[0] == 2


def test_melody_changes_the_music(melody: MusicGen) -> None:
    melody.set_generation_params(duration=0.4, use_sampling=False)
    pieces = [
        _wav(melody.generate_with_chroma(["rock"], wavs, 32000))
        for wavs in (tune(2.0), tune(2.0, first_note=4)[None], [None])
    ]
    assert not torch.equal(pieces[0], pieces[1])
    assert not torch.equal(pieces[0], pieces[2])
    assert torch.equal(pieces[2], _wav(melody.generate(["rock"])))


def test_continuation_starts_with_the_prompt(melody: MusicGen) -> None:
    prompt = tune(0.2)
    melody.set_generation_params(duration=0.5)
    _, tokens = _both(melody.generate_continuation(prompt, 32000, ["rock"], return_tokens=True, seed=1))
    assert torch.equal(tokens[0, :, :10], melody.model.codec_encoder.encode(prompt))
    assert tokens.shape[-1] == 25


def test_continuation_with_a_melody(melody: MusicGen) -> None:
    melody.set_generation_params(duration=0.6, use_sampling=False)
    prompts = [tune(0.2), tune(0.3, 16000)]
    plain = _wav(melody.generate_continuation(prompts, 32000))
    both = _wav(melody.generate_continuation(prompts, 32000, melody_wavs=[tune(2.0), None], melody_sample_rate=32000))
    assert not torch.equal(plain[0], both[0])
    assert torch.equal(plain[1], both[1])


def test_stereo_continuation_from_a_mono_prompt(models: dict[str, Model]) -> None:
    model = MusicGen(models["text-stereo"])
    model.set_generation_params(duration=0.4)
    wav, tokens = _both(model.generate_continuation(tune(0.2), 32000, return_tokens=True))
    assert wav.shape == (1, 2, 12800)
    assert torch.equal(tokens[0, ::2, :10], tokens[0, 1::2, :10])


def test_params_of_one_call(melody: MusicGen) -> None:
    own = GenerationParams(SamplingParams(greedy=True), duration_s=0.3)
    before = melody.generation_params
    calls: list[Callable[[GenerationParams | None], torch.Tensor | tuple[torch.Tensor, torch.Tensor]]] = [
        lambda p: melody.generate(["rock"], params=p, seed=1),
        lambda p: melody.generate_unconditional(1, params=p, seed=1),
        lambda p: melody.generate_with_chroma(["rock"], tune(1.0), 32000, params=p, seed=1),
        lambda p: melody.generate_continuation(tune(0.1), 32000, params=p, seed=1),
        lambda p: torch.cat([piece.samples for piece in melody.stream("rock", params=p, seed=1)], -1)[None],
    ]
    got = [_wav(call(own)) for call in calls]
    assert melody.generation_params is before
    melody.set_generation_params(use_sampling=False, duration=0.3)
    for call, wav in zip(calls, got, strict=True):
        assert wav.shape[-1] == 9600
        assert torch.equal(_wav(call(None)), wav)


def test_longer_than_the_model_sees(models: dict[str, Model]) -> None:
    model = MusicGen(models["text"])
    model.set_generation_params(duration=31.0, extend_stride=18)
    seen: list[tuple[int, int]] = []
    model.set_custom_progress_callback(lambda done, total: seen.append((done, total)))
    wav = _wav(model.generate(["rock"], seed=0))
    assert wav.shape[-1] == 31 * 32000
    done = [d for d, _ in seen]
    assert done == sorted(set(done))
    assert seen[-1] == (1550, 1550)


def test_progress_over_a_batch(text: MusicGen, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, int]] = []
    text.set_custom_progress_callback(lambda done, total: seen.append((done, total)))
    text.generate(["rock", "jazz"])
    assert [d for d, _ in seen] == list(range(1, 41))
    assert {total for _, total in seen} == {40}
    text.set_custom_progress_callback(None)
    text.generate(["rock"], progress=True)
    assert "20/20" in capsys.readouterr().err


def test_threads_do_not_disturb_each_other(text: MusicGen) -> None:
    expected = [_wav(text.generate(["rock"], seed=i)) for i in range(4)]
    got: dict[int, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i: got.update({i: _wav(text.generate(["rock"], seed=i))})) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[i], expected[i]) for i in range(4))


BAD_PARAMS: dict[str, list[object]] = {
    "duration": [0, -1, float("nan"), 1e9, 0.001, "8", None, True, torch.tensor(8.0), 10**400],
    "top_k": [-1, 2.5, True, "50", None],
    "top_p": [-0.1, 1.1, float("nan"), None],
    "temperature": [-1.0, float("nan"), float("inf"), 1e-300, 9e-5, "hot"],
    "cfg_coef": [float("nan"), float("inf"), "3", None],
    "cfg_coef_beta": ["5"],
    "extend_stride": [0, 0.01, 30, -2, float("nan"), "x", None],
    "use_sampling": ["no", None, 1],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD_PARAMS.items() for v in values])
def test_bad_params_are_refused_and_change_nothing(text: MusicGen, name: str, value: object) -> None:
    with pytest.raises(InvalidRequestError, match=r"expected .*, got "):
        text.set_generation_params(**{name: value})  # type: ignore[arg-type]
    assert text.duration == 0.4


def test_numbers_of_numpy_are_plain_numbers(text: MusicGen) -> None:
    text.set_generation_params(duration=np.float32(0.5), top_k=np.int64(50), cfg_coef=np.float64(2.0))  # type: ignore[arg-type]
    params = text.generation_params
    assert (params.duration_s, params.sampling.top_k, params.sampling.guidance_scale) == (0.5, 50, 2.0)
    assert {type(params.duration_s), type(params.sampling.guidance_scale)} == {float}
    assert type(params.sampling.top_k) is int
    wav = _wav(text.generate(["rock"], seed=np.int64(3), num_samples=np.int64(2)))  # type: ignore[arg-type]
    assert torch.equal(wav, _wav(text.generate(["rock"], seed=[3, 4], num_samples=2)))
    assert torch.equal(wav, _wav(text.generate(["rock"], seed=np.array([3, 4]), num_samples=2)))  # type: ignore[arg-type]


def test_arrays_of_numpy_are_waveforms(melody: MusicGen) -> None:
    wav, prompt = tune(1.0), tune(0.1)
    expected = _wav(melody.generate_with_chroma(["rock"], wav, 32000, seed=0))
    for given in (wav.numpy(), wav[None].numpy(), [wav.numpy()], np.asfortranarray(wav.double().numpy())):
        assert torch.equal(_wav(melody.generate_with_chroma(["rock"], given, 32000, seed=0)), expected)
    expected = _wav(melody.generate_continuation(prompt, 32000, seed=0))
    assert torch.equal(_wav(melody.generate_continuation(prompt.numpy(), 32000, seed=0)), expected)
    pieces = [p.samples for p in melody.stream(prompt=prompt.numpy(), prompt_sample_rate=32000, seed=0)]
    torch.testing.assert_close(torch.cat(pieces, -1), expected[0], atol=1e-5, rtol=0)


NAN = torch.full((1, 3200), float("nan"))
BAD_CALLS: dict[str, Callable[[MusicGen], object]] = {
    "empty batch": lambda m: m.generate([]),
    "a text for a list": lambda m: m.generate("rock"),
    "not a text": lambda m: m.generate([3]),  # type: ignore[list-item]
    "no samples": lambda m: m.generate(["rock"], num_samples=0),
    "none to make": lambda m: m.generate_unconditional(0),
    "negative seed": lambda m: m.generate(["rock"], seed=-1),
    "too few seeds": lambda m: m.generate(["rock", "jazz"], seed=[1]),
    "seed not a number": lambda m: m.generate(["rock"], seed=[1.5]),  # type: ignore[list-item]
    "one seed not a number": lambda m: m.generate(["rock"], seed=1.5),  # type: ignore[arg-type]
    "seed not of a kind": lambda m: m.generate(["rock"], seed=torch.Generator()),  # type: ignore[arg-type]
    "no list": lambda m: m.generate(None),  # type: ignore[arg-type]
    "a number for a list": lambda m: m.generate(3),  # type: ignore[arg-type]
    "a path for a melody": lambda m: m.generate_with_chroma(["rock"], "tune.wav", 32000),  # type: ignore[arg-type]
    "a list of paths": lambda m: m.generate_with_chroma(["rock"], [Path("tune.wav")], 32000),  # type: ignore[list-item]
    "no melodies": lambda m: m.generate_with_chroma(["rock"], None, 32000),  # type: ignore[arg-type]
    "an array of texts": lambda m: m.generate_with_chroma(["rock"], np.array([["a"]]), 32000),
    "chunks not a policy": lambda m: m.stream("rock", chunks=5),  # type: ignore[arg-type]
    "chunks of no size": lambda m: ChunkPolicy("a"),  # type: ignore[arg-type]
    "params not of the kind": lambda m: m.generate(["rock"], params={}),  # type: ignore[arg-type]
    "params that the model has not": lambda m: m.generate(["rock"], params=GenerationParams(extend_stride_s=30)),
    "sampling not of the kind": lambda m: GenerationParams({}),  # type: ignore[arg-type]
    "half a surrogate pair": lambda m: m.generate(["rock \ud83c"]),
    "too long a text": lambda m: m.generate(["rock " * 600]),
    "too few melodies": lambda m: m.generate_with_chroma(["rock", "jazz"], [tune(1.0)], 32000),
    "empty melody": lambda m: m.generate_with_chroma(["rock"], [torch.zeros(1, 0)], 32000),
    "melody with NaN": lambda m: m.generate_with_chroma(["rock"], [NAN], 32000),
    "melody of one axis": lambda m: m.generate_with_chroma(["rock"], torch.zeros(100), 32000),
    "no rate": lambda m: m.generate_with_chroma(["rock"], [tune(1.0)], 0),
    "no prompts": lambda m: m.generate_continuation([], 32000),
    "no prompt": lambda m: m.generate_continuation([None], 32000),
    "empty prompt": lambda m: m.generate_continuation(torch.zeros(1, 0), 32000),
    "prompt too long": lambda m: m.generate_continuation(tune(0.4), 32000),
    "counts that do not match": lambda m: m.generate_continuation(tune(0.1), 32000, ["rock", "jazz"]),
    "melody without a rate": lambda m: m.generate_continuation(tune(0.1), 32000, melody_wavs=[tune(1.0)]),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_refused_before_any_work(melody: MusicGen, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_work(*_: object, **__: object) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr("musicgen.local_engine.LocalEngine.generate", no_work)
    with pytest.raises(InvalidRequestError, match=r"expected .*, got "):
        BAD_CALLS[case](melody)


def test_a_file_for_a_melody_is_answered_with_how_to_read_it(melody: MusicGen) -> None:
    for given in ("tune.wav", ["tune.wav"], Path("tune.wav")):
        with pytest.raises(InvalidRequestError, match="load_audio"):
            melody.generate_with_chroma(["rock"], given, 32000)  # type: ignore[arg-type]


def test_text_models_take_no_melody(text: MusicGen) -> None:
    with pytest.raises(InvalidRequestError, match="no melody"):
        text.generate_with_chroma(["rock"], [tune(1.0)], 32000)
    with pytest.raises(InvalidRequestError, match="no melody"):
        text.generate_continuation(tune(0.1), 32000, melody_wavs=tune(1.0), melody_sample_rate=32000)
    with pytest.raises(InvalidRequestError, match="double guidance"):
        text.set_generation_params(cfg_coef_beta=3.0)
    assert _wav(text.generate_with_chroma(["rock"], [None], 32000)).shape[-1] == 12800


@pytest.mark.parametrize("chunks", [None, ChunkPolicy(1, 1), ChunkPolicy(3, 7)])
def test_stream_is_the_whole_piece(melody: MusicGen, chunks: ChunkPolicy | None) -> None:
    melody.set_generation_params(duration=0.6)
    whole = _wav(melody.generate_with_chroma(["rock"], [tune(1.0)], 32000, seed=4))[0]
    pieces = list(melody.stream("rock", melody_wav=tune(1.0), melody_sample_rate=32000, seed=4, chunks=chunks))
    assert len(pieces) > 1
    offset = 0
    for piece in pieces:
        assert piece.sample_offset == offset
        offset += piece.samples.shape[-1]
    torch.testing.assert_close(torch.cat([p.samples for p in pieces], -1), whole, atol=1e-5, rtol=0)


def test_stream_of_a_continuation_starts_with_the_prompt(models: dict[str, Model]) -> None:
    model = MusicGen(models["text-stereo"])
    model.set_generation_params(duration=0.6)
    whole = _wav(model.generate_continuation(tune(0.3), 32000, ["rock"], seed=2))[0]
    pieces = model.stream("rock", prompt=tune(0.3), prompt_sample_rate=32000, seed=2)
    torch.testing.assert_close(torch.cat([p.samples for p in pieces], -1), whole, atol=1e-5, rtol=0)


def test_leaving_a_stream_cancels_it(melody: MusicGen) -> None:
    melody.set_generation_params(duration=25.0)
    stream = melody.stream("rock", seed=0)
    next(stream)
    stream.close()
    melody.set_generation_params(duration=0.4)
    assert _wav(melody.generate(["rock"])).shape[-1] == 12800


def test_asyncio_streams_side_by_side_and_the_loop_goes_on(melody: MusicGen) -> None:
    params = replace(melody.generation_params, duration_s=0.6)

    async def collect(seed: int) -> torch.Tensor:
        return torch.cat([chunk.samples async for chunk in melody.astream("rock", seed=seed, params=params)], -1)

    async def main() -> tuple[list[torch.Tensor], int]:
        streams = asyncio.gather(collect(1), collect(2))
        num_turns = 0
        while not streams.done():
            await asyncio.sleep(0)
            num_turns += 1
        return await streams, num_turns

    streamed, num_turns = asyncio.run(main())
    assert num_turns > 100
    for seed, samples in zip((1, 2), streamed, strict=True):
        blocking = torch.cat([chunk.samples for chunk in melody.stream("rock", seed=seed, params=params)], -1)
        assert torch.equal(samples, blocking)


@pytest.mark.parametrize("is_running", [False, True], ids=["between chunks", "within a chunk"])
def test_leaving_an_asyncio_stream_cancels_it(melody: MusicGen, is_running: bool) -> None:
    params = replace(melody.generation_params, duration_s=25.0)

    async def main() -> None:
        stream = melody.astream("rock", seed=0, params=params)
        await anext(stream)
        if is_running:
            task = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await stream.aclose()

    asyncio.run(main())
    engine = melody._engine._started()
    assert get_stats(engine).num_running == 0


def test_errors_of_an_asyncio_stream_come_with_its_first_chunk(melody: MusicGen) -> None:
    async def main() -> None:
        stream = melody.astream("rock", seed=-1)
        with pytest.raises(InvalidRequestError, match="seed"):
            await anext(stream)

    asyncio.run(main())


def test_a_request_that_cannot_be_computed_fails_alone(
    models: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise KernelArgumentError("top_k", "an argument that can be", "one that cannot")

    model = _short(MusicGen(models["text"]))
    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "run", refuse)
        with pytest.raises(InternalError, match="kernels"):
            model.generate(["rock"])
    model.generate(["rock"])  # the engine goes on
    model.close()


def test_a_closed_model_refuses(models: dict[str, Model]) -> None:
    model = _short(MusicGen(models["text"]))
    model.generate(["rock"])
    model.close()
    with pytest.raises(EngineDeadError, match="closed"):
        model.generate(["rock"])


def test_as_a_context_manager(folders: dict[str, Path]) -> None:
    with MusicGen.get_pretrained(folders["text"], "cpu", "int8") as model:
        assert repr(model) == "MusicGen(name='text', device='cpu', weights='int8')"
        _short(model).generate(["rock"])
    with pytest.raises(EngineDeadError, match="closed"):
        model.generate(["rock"])


@pytest.mark.parametrize("name", [None, 3, Path("/absent"), "a\0b"])
def test_names_that_are_none(name: object) -> None:
    with pytest.raises(InvalidRequestError, match=r"model: expected a short name.*got"):
        MusicGen.get_pretrained(name)  # type: ignore[arg-type]


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4", torch.bfloat16])
def test_kinds_of_weights(folders: dict[str, Path], weights: WeightDtype) -> None:
    model = _short(MusicGen.get_pretrained(str(folders["text"]), weights=weights))
    assert _wav(model.generate(["rock"], seed=0)).isfinite().all()
    # What runs is what was asked for; how exact each kind is, the kernels' tests say.
    runner = model._engine._started()._core.runner
    assert kind_of(runner.weights) == str(weights).removeprefix("torch.")


def test_unknown_weights(folders: dict[str, Path]) -> None:
    with pytest.raises(InvalidRequestError, match="int4"):
        MusicGen.get_pretrained(str(folders["text"]), weights="int3")  # type: ignore[arg-type]


def test_the_engine_has_ended_before_the_interpreter_does(folders: dict[str, Path]) -> None:
    """A thread inside native code while Python shuts down would abort the process."""
    script = (
        "import atexit, sys, threading\n"
        "names = lambda: [t.name for t in threading.enumerate() if t.name.startswith('musicgen')]\n"
        "atexit.register(lambda: print(names()))\n"
        "from musicgen import MusicGen\n"
        "model = MusicGen.get_pretrained(sys.argv[1])\n"
        "model.set_generation_params(duration=0.2)\n"
        "model.generate(['rock'])\n"
        "assert names()\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(folders["text"])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_script_that_loads_and_generates_prints_nothing() -> None:
    """Libraries' chatter would be the first that a new user sees."""
    script = """
from musicgen import MusicGen
model = MusicGen.get_pretrained("demo")
model.set_generation_params(duration=0.2)
model.generate(["happy rock"], seed=[1])
model.close()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert (done.stdout, done.stderr) == ("", "")
