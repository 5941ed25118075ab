"""The command line: what is written and said, exit codes, one-line errors before any work, no torch for the help."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from musicgen_kernels.cpu_step import CpuStep
from musicgen_kernels.errors import BackendUnavailableError, KernelArgumentError
from musicgen_kernels.whole_step import whole_step
from tiny import tune

import musicgen
from musicgen import MusicGen, audio_write
from musicgen.cli import main
from musicgen.cli.plan import Piece, slug
from musicgen.cli.timing import Stopwatch
from musicgen.engine.packing import pack_decoder
from musicgen.errors import InvalidRequestError, WeightsError
from musicgen.model import Model
from musicgen.weights import load_model

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MUSICGEN_DEBUG", raising=False)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = int(exit.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """One second of a tune at another rate than the model's, as mp3."""
    path = tmp_path / "My tune.mp3"
    soundfile.write(path, tune(1.0, 44100)[0].numpy(), 44100)
    return path


def _last_json(out: str) -> dict[str, Any]:
    summary = json.loads(out.splitlines()[-1])
    assert isinstance(summary, dict)
    return summary


# --- help, versions


@pytest.mark.parametrize(
    "arguments", [["--help"], ["generate", "--help"], ["models", "--help"], ["doctor", "--help"], ["--version"]]
)
def test_help_imports_no_library(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom musicgen.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as exit: assert exit.code == 0\n"
        "print([m for m in ('torch', 'numpy', 'transformers', 'tqdm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "musicgen" in done.stdout


def test_python_m_runs_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "musicgen", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"musicgen {musicgen.__version__}\n"


def test_no_command_shows_the_help(run: Run) -> None:
    code, out, _ = run()
    assert code == 0
    assert 'musicgen generate "happy rock"' in out


# --- generate


def test_two_prompts_two_files(run: Run, folders: dict[str, Path], models: dict[str, Model], tmp_path: Path) -> None:
    code, out, err = run(
        *("generate", "Happy rock", "sad/jazz!", "--duration", 0.5, "--seed", 7, "--model", folders["text"]),
        *("--strategy", "peak", "--json"),
    )
    assert (code, err) == (0, "")
    names = ["happy-rock_seed7.wav", "sad-jazz_seed8.wav"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    summary = _last_json(out)
    assert [Path(file["path"]).name for file in summary["files"]] == names
    assert [(file["seed"], file["prompt"]) for file in summary["files"]] == [(7, "Happy rock"), (8, "sad/jazz!")]
    assert all(file["duration_s"] == 0.5 and file["sample_rate"] == 32000 for file in summary["files"])
    assert sum(spent for part, spent in summary["parts_s"].items() if part != "load") == pytest.approx(
        summary["work_s"], abs=0.01
    )
    assert summary["real_time_factor"] == pytest.approx(summary["work_s"] / 1.0, rel=0.05)
    assert min(summary["parts_s"].values()) > 0
    assert summary["settings"]["guidance"] == 3.0
    assert summary["settings"]["duration"] == 0.5
    for name in names:
        assert f"out/{name}" in out

    model = MusicGen(models["text"])
    model.set_generation_params(duration=0.5)
    wav = model.generate(["Happy rock", "sad/jazz!"], seed=7)
    assert isinstance(wav, torch.Tensor)
    for name, samples in zip(names, wav, strict=True):
        expected = audio_write(tmp_path / "expected" / name, samples, 32000, strategy="peak", add_suffix=False)
        written, alone = (soundfile.read(path)[0] for path in (tmp_path / "out" / name, expected))
        np.testing.assert_allclose(written, alone, rtol=0, atol=2 / 32768)  # the codes are equal: a rounding of 16 bits


def test_a_file_says_what_it_is(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    run(
        *("generate", "happy rock", "--duration", 0.5, "--seed", 3, "--model", folders["text"], "--format", "flac"),
        *("--temperature", 0.9, "--top-k", 250, "--weights", "int8"),
    )
    with soundfile.SoundFile(tmp_path / "out" / "happy-rock_seed3.flac") as file:
        assert file.title == "happy rock"
        assert "top_k" not in file.comment  # the default
        settings = "weights: int8; duration: 0.5 s; temperature: 0.9; "
        for words in ("Machine-made", settings, f"model: {folders['text'].name}", "seed: 3", "licence", "happy rock"):
            assert words in file.comment


@pytest.mark.parametrize("format", ["mp3", "ogg", "opus"])
def test_formats_and_level(run: Run, folders: dict[str, Path], format: str) -> None:
    code, out, _ = run(
        *("generate", "rock", "--duration", 1, "--seed", 1, "--model", folders["text"], "--format", format),
        *("--loudness", "-20", "--no-compressor", "--json"),
    )
    assert code == 0
    (file,) = _last_json(out)["files"]
    assert file["path"] == f"out/rock_seed1.{format}"
    assert file["loudness_lufs"] == pytest.approx(-20.0, abs=0.5)


def test_nothing_clips_unless_the_compressor_is_off(
    run: Run, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wav = 0.1 * torch.randn(1, 1, 32000, generator=torch.Generator().manual_seed(0))
    wav[..., ::1600] = 0.6  # clicks, which the target takes beyond full scale
    monkeypatch.setattr(MusicGen, "generate", lambda *_, **__: wav)
    command = ["generate", "rock", "--model", folders["text"], "--loudness", "-12", "--json"]
    code, out, err = run(*command)
    assert (code, err) == (0, "")
    assert _last_json(out)["files"][0]["peak"] < 0.99
    _, out, err = run(*command, "--no-compressor")
    assert "to avoid this, use the loudness compressor" in err
    assert _last_json(out)["files"][0]["peak"] > 0.99


def test_nothing_is_overwritten_unless_asked(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    command = ["generate", "rock", "--duration", 0.1, "--seed", 1, "--model", folders["text"], "--plot"]
    for _ in range(2):
        assert run(*command)[0] == 0
    names = ["rock_seed1-2.png", "rock_seed1-2.wav", "rock_seed1.png", "rock_seed1.wav"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    first, second = ((tmp_path / "out" / name).read_bytes() for name in ("rock_seed1.wav", "rock_seed1-2.wav"))
    assert first == second
    assert (tmp_path / "out" / "rock_seed1.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "out" / "rock_seed1.wav").write_bytes(b"old")
    assert run(*command, "--overwrite")[0] == 0
    assert (tmp_path / "out" / "rock_seed1.wav").read_bytes() == first
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


@pytest.mark.parametrize("name", ["song.wav", "new/Song.FLAC", "song.mp3", "song.ogg", "song.opus"])
def test_one_piece_in_the_file_asked_for(name: str, run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    command = ["generate", "rock", "--duration", 0.1, "--model", folders["text"], "-o", name]
    code, out, _ = run(*command, "--json")
    assert code == 0
    assert _last_json(out)["files"][0]["path"] == name
    container = {"song.ogg": "OGG", "song.opus": "OGG"}.get(name, Path(name).suffix[1:].upper())
    assert soundfile.info(tmp_path / name).format == container
    before = (tmp_path / name).read_bytes()
    code, out, err = run(*command)
    assert (code, out) == (2, "")
    assert "replace it with --overwrite" in err
    assert (tmp_path / name).read_bytes() == before
    assert run(*command, "--overwrite", "--seed", 5)[0] == 0
    assert (tmp_path / name).read_bytes() != before


def test_a_folder_with_the_name_of_a_file(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "takes.wav").mkdir()
    command = ["generate", "rock", "--duration", 0.1, "--model", folders["text"], "--seed", 1, "-o", "takes.wav"]
    assert run(*command)[0] == 0
    assert [path.name for path in (tmp_path / "takes.wav").iterdir()] == ["rock_seed1.wav"]


def test_audio_on_stdout(folders: dict[str, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "musicgen", "generate", "rock", "--duration", "0.5", "--model", folders["text"]]
    done = subprocess.run([*command, "-o", "-", "--format", "flac"], capture_output=True, cwd=tmp_path, check=True)
    samples, rate = soundfile.read(io.BytesIO(done.stdout))
    assert (len(samples), rate) == (16000, 32000)
    assert b"/dev/stdout  0.50 s  seed" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_prompts_from_stdin(run: Run, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("rock\n\n  sad jazz \n"))
    command = ["generate", "folk", "-", "--duration", 0.1, "--model", folders["text"], "--json"]
    _, out, _ = run(*command)
    assert [file["prompt"] for file in _last_json(out)["files"]] == ["folk", "rock", "sad jazz"]
    code, _, err = run(*command)
    assert (code, err) == (2, "musicgen: error: prompt: expected prompts on stdin, one per line, got none\n")


def test_quiet(run: Run, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, out, err = run(
        "generate", "rock", "--duration", 0.5, "--strategy", "peak", "--model", folders["text"], "--quiet"
    )
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert out.startswith("out/rock_seed")


@pytest.mark.parametrize("option", ["--weights", "--dtype"])
def test_the_type_of_the_weights(option: str, run: Run, folders: dict[str, Path]) -> None:
    _, out, _ = run("generate", "rock", "--duration", 0.1, "--model", folders["text"], option, "int8", "--json")
    assert _last_json(out)["weights"] == "int8"


def test_a_seed_is_drawn_and_told(run: Run, folders: dict[str, Path]) -> None:
    command = ["generate", "rock", "--duration", 0.1, "--model", folders["text"], "--json"]
    seeds = []
    for _ in range(2):
        _, out, _ = run(*command)
        (file,) = _last_json(out)["files"]
        assert f"seed {file['seed']} (random" in out
        seeds.append(file["seed"])
    assert seeds[0] != seeds[1]
    _, out, _ = run(*command, "--seed", 0)
    assert _last_json(out)["files"][0]["seed"] == 0
    assert "(random" not in out


def test_melody_once_for_all_or_one_each(run: Run, folders: dict[str, Path], recording: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.wav"
    soundfile.write(other, tune(1.0, first_note=5)[0].numpy(), 32000)
    command = ["generate", "rock", "jazz", "--duration", 0.4, "--seed", 1, "--model", folders["melody"], "--greedy"]
    code, out, _ = run(*command, "--melody", recording, "--json")
    assert code == 0
    one = _last_json(out)["files"]
    assert [file["path"] for file in one] == ["out/rock_my-tune_seed1.wav", "out/jazz_my-tune_seed2.wav"]
    _, out, _ = run(*command, "--melody", recording, "--melody", other, "--json")
    each = _last_json(out)["files"]
    assert [Path(file["melody"]).name for file in each] == ["My tune.mp3", "other.wav"]
    with soundfile.SoundFile(each[1]["path"]) as file:
        assert "greedy: True; melody: other.wav; " in file.comment

    def samples(file: dict[str, Any]) -> np.ndarray:
        return np.asarray(soundfile.read(file["path"])[0])

    np.testing.assert_array_equal(samples(one[0]), samples(each[0]))
    assert not np.array_equal(samples(one[1]), samples(each[1]))


def test_melody_without_words_and_samples(run: Run, folders: dict[str, Path], recording: Path) -> None:
    code, out, _ = run(
        *("generate", "--melody", recording, "--duration", 0.2, "--seed", 5, "--num-samples", 2),
        *("--model", folders["melody"], "--json"),
    )
    assert code == 0
    files = _last_json(out)["files"]
    assert [file["path"] for file in files] == ["out/my-tune_seed5.wav", "out/my-tune_seed6.wav"]
    assert [file["prompt"] for file in files] == [None, None]


def test_unconditional_stereo(run: Run, folders: dict[str, Path]) -> None:
    code, out, _ = run(
        "generate", "--unconditional", 2, "--duration", 0.2, "--seed", 5, "--model", folders["text-stereo"], "--json"
    )
    assert code == 0
    files = _last_json(out)["files"]
    assert [(file["path"], file["channels"]) for file in files] == [
        ("out/unconditional_seed5.wav", 2),
        ("out/unconditional_seed6.wav", 2),
    ]


@pytest.mark.parametrize("with_melody", [False, True])
def test_continuation(run: Run, folders: dict[str, Path], recording: Path, with_melody: bool) -> None:
    code, out, _ = run(
        *("generate", "rock", "--prompt-audio", recording, "--duration", 1.5, "--seed", 1, "--json"),
        *("--model", folders["melody"], *(["--melody", recording] if with_melody else [])),
    )
    assert code == 0
    (file,) = _last_json(out)["files"]
    assert file["duration_s"] == 1.5
    assert file["prompt_audio"] == str(recording)
    assert (file["melody"] is not None) == with_melody


def test_batches_change_nothing(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    command = ["generate", "rock", "jazz", "folk", "--duration", 0.4, "--seed", 1, "--model", folders["text"]]
    assert run(*command, "-o", "together")[0] == 0
    assert run(*command, "-o", "apart", "--batch", 2)[0] == 0
    for together in sorted((tmp_path / "together").iterdir()):
        apart = tmp_path / "apart" / together.name
        written, alone = (soundfile.read(path)[0] for path in (together, apart))
        np.testing.assert_allclose(written, alone, rtol=0, atol=2 / 32768)


def test_the_bar(run: Run, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, out, err = run(
        "generate", "rock", "jazz", "folk", "--duration", 0.4, "--batch", 2, "--model", folders["text"]
    )
    assert code == 0
    assert "rock and 1 more" in err
    assert "folk 100 %" in err
    assert "100 %" in err
    assert "1.2/1.2 s of music" in err
    assert "1.2/1.2" not in out


def test_the_demo_model_says_what_it_is(run: Run) -> None:
    threads = torch.get_num_threads()
    command = ["generate", "happy rock", "--duration", 0.2, "--seed", 1, "--strategy", "peak"]
    code, out, err = run(*command, "--threads", threads + 1)
    assert (code, err) == (0, "")
    first = out.splitlines()[0]
    assert "not Meta's weights" in first
    assert "MIT" in first
    assert torch.get_num_threads() == threads


def test_settings_of_libraries_are_put_back(run: Run, folders: dict[str, Path]) -> None:
    from transformers.utils import logging as transformers_logging

    before = [transformers_logging.is_progress_bar_enabled(), logging.getLogger("transformers").level]
    handlers = list(logging.getLogger("musicgen").handlers)
    assert run("generate", "rock", "--duration", 0.1, "--model", folders["text"])[0] == 0
    assert [transformers_logging.is_progress_bar_enabled(), logging.getLogger("transformers").level] == before
    assert logging.getLogger("musicgen").handlers == handlers


# --- errors


def _bad_files(folder: Path) -> None:
    soundfile.write(folder / "good.wav", tune(1.0)[0].numpy(), 32000)
    soundfile.write(folder / "empty.wav", np.zeros(0, np.float32), 32000)
    soundfile.write(folder / "nan.wav", np.full(32000, np.nan, np.float32), 32000, subtype="FLOAT")
    (folder / "text.mp3").write_text("no audio")
    (folder / "file").touch()
    (folder / "new.png").touch()


BAD_INPUT = {
    "nothing to make": ([], "expected a prompt"),
    "empty prompt": (["rock", " "], "expected non-empty prompts"),
    "no such model": (["rock", "--model", "no-such-model"], "no-such-model"),
    "misspelt model": (
        ["rock", "--model", "mello"],
        "--model: expected a short name, a Hugging Face repository id or a",
    ),
    "similar model": (["rock", "--model", "mello"], "did you mean melody?"),
    "no such file": (["rock", "--melody", "absent.wav"], "--melody: expected an existing audio file, got absent.wav"),
    "unreadable audio": (["rock", "--melody", "text.mp3"], "text.mp3"),
    "zero-length audio": (["rock", "--melody", "empty.wav"], "empty.wav"),
    "NaN audio": (["rock", "--melody", "nan.wav"], "nan.wav"),
    "NaN prompt audio": (["rock", "--prompt-audio", "nan.wav"], "--prompt-audio: "),
    "melody, model without": (["rock", "--melody", "good.wav", "--model", "small"], "no melody for model 'small'"),
    "double guidance, model without": (["rock", "--melody-guidance", "2", "--model", "small"], "no melody"),
    "double guidance, no melody": (["rock", "--melody-guidance", "2"], "melody-guidance"),
    "counts": (["a", "b", "c", "--melody", "good.wav", "--melody", "good.wav"], "one per prompt (3), got 2"),
    "prompt counts": (["a", "--prompt-audio", "good.wav", "--prompt-audio", "good.wav"], "prompt-audio"),
    "duration 0": (["rock", "--duration", "0"], "duration"),
    "duration < 0": (["rock", "--duration", "-3"], "duration"),
    "duration nan": (["rock", "--duration", "nan"], "duration"),
    "duration absurd": (["rock", "--duration", "1e9"], "duration"),
    "duration no number": (["rock", "--duration", "long"], "duration"),
    "prompt too long": (["rock", "--prompt-audio", "good.wav", "--duration", "1"], "shorter than the duration"),
    "top_k < 0": (["rock", "--top-k", "-1"], "--top-k: "),
    "top_p > 1": (["rock", "--top-p", "1.1"], "--top-p: "),
    "top_p < 0": (["rock", "--top-p", "-0.1"], "--top-p: "),
    "temperature": (["rock", "--temperature", "-1"], "temperature"),
    "guidance": (["rock", "--guidance", "inf"], "--guidance: "),
    "no samples": (["rock", "--num-samples", "0"], "num-samples"),
    "too many": (["rock", "--num-samples", "1001"], "at most 1000"),
    "batch": (["rock", "--batch", "0"], "batch"),
    "seed": (["rock", "--seed", "-1"], "seed"),
    "unconditional 0": (["--unconditional", "0"], "unconditional"),
    "unconditional and prompt": (["rock", "--unconditional", "1"], "unconditional"),
    "loudness out of range": (["rock", "--loudness", "3"], "loudness"),
    "loudness without effect": (["rock", "--loudness", "-14", "--strategy", "peak"], "loudness"),
    "stems without melody": (["rock", "--stems"], "stems"),
    "threads": (["rock", "--threads", "0"], "threads"),
    "out is a file": (["rock", "-o", "file"], "out: expected a writable folder"),
    "file for several": (["rock", "jazz", "-o", "a.wav"], "a folder for 2 pieces, got the file a.wav"),
    "file of another format": (["rock", "-o", "a.wav", "--format", "mp3"], "expected --format wav or none"),
    "existing file": (["rock", "-o", "good.wav"], "expected a new file, got good.wav"),
    "existing plot": (["rock", "-o", "new.wav", "--plot"], "expected a new file, got new.png"),
    "stdout for several": (["rock", "--num-samples", "2", "-o", "-"], "a folder for 2 pieces"),
    "stdout and JSON": (["rock", "-o", "-", "--json"], "expected no --json with -o -"),
    "stdout and plot": (["rock", "-o", "-", "--plot"], "expected no --plot with -o -"),
    "device": (["rock", "--device", "abacus"], "abacus"),
    "format": (["rock", "--format", "midi"], "midi"),
    "unknown option": (["rock", "--tempo", "3"], "--tempo 3; see `musicgen generate --help`"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_before_any_work(
    name: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("musicgen.weights.load._load", fail)
    _bad_files(tmp_path)
    arguments, words = BAD_INPUT[name]
    code, out, err = run("generate", *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("musicgen: error: ")
    assert err.count("\n") == 1
    assert words in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("param", "option"),
    [("duration_s", "--duration"), ("url", "--server"), ("extend_stride_s", "--extend-stride"), ("prompt", "prompt")],
)
def test_errors_of_a_service_name_options_too(
    param: str, option: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise InvalidRequestError("less", "more", "reduce it", param=param)

    monkeypatch.setattr("musicgen.cli.plugins.generate_remote", lambda: refuse)
    _, _, err = run("generate", "rock", "--server", "grpc://localhost:9000")
    assert err == f"musicgen: error: {option}: expected less, got more; reduce it\n"


@pytest.mark.parametrize(
    "option", ["--duration=-1", "--top-k=-1", "--guidance=nan", "--threads=0", "--loudness=3", "--extend-stride=0"]
)
def test_numbers_are_checked_before_torch_is_imported(option: str, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom musicgen.cli import main\n"
        "assert main(['generate', 'rock', sys.argv[1]]) == 2\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, option], cwd=tmp_path, check=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("text", ["rock", "--melody", "good.wav"], "no melody for model"),
        ("text", ["rock", "fifty " * 600], "at most 512 tokens"),
        ("text", ["rock", "--extend-stride", "31"], "--extend-stride"),
        ("text", ["rock", "--extend-stride", "0.01"], "--extend-stride"),
        ("text", ["rock", "\udcff"], "Unicode"),
        ("text", ["rock", "--duration", "0.01"], "at least one frame"),
        ("melody", ["rock", "--prompt-audio", "good.wav", "--duration", "1.01"], "shorter than the duration"),
    ],
)
def test_bad_input_that_only_the_model_knows(
    kind: str,
    arguments: list[str],
    words: str,
    run: Run,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr("musicgen.local_engine.LocalEngine.generate", fail)
    _bad_files(tmp_path)
    code, out, err = run("generate", *arguments, "--model", folders[kind])
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert not (tmp_path / "out").exists()


def test_unusable_weights_exit_with_1(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    code, out, err = run("generate", "rock", "--model", "./model")
    assert (code, out) == (1, "")
    assert err.startswith("musicgen: error: model: expected config.json")
    assert err.count("\n") == 1


def test_stems_without_demucs(run: Run, recording: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run("generate", "rock", "--melody", recording, "--stems")
    assert code == 1
    assert "pip install 'musicgen-serve[stems]'" in err


def test_stems_are_what_the_model_hears(
    run: Run, folders: dict[str, Path], recording: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = []

    class Stems:
        sample_rate = 32000

        def __init__(self, sample_rate: int, device: torch.device) -> None:
            assert sample_rate == 32000

        def __call__(self, wav: torch.Tensor, sample_rate: int) -> torch.Tensor:
            assert sample_rate == 44100
            return tune(1.0, first_note=3)

    generate = MusicGen.generate_continuation

    def spy(self: MusicGen, prompt: Any, *arguments: Any, **keywords: Any) -> Any:
        heard.append((prompt[0].shape[-1], keywords["melody_wavs"][0], keywords["melody_sample_rate"]))
        return generate(self, prompt, *arguments, **keywords)

    monkeypatch.setattr("musicgen.stems.MelodyStems", Stems)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(MusicGen, "generate_continuation", spy)
    code, _, _ = run(
        *("generate", "rock", "--melody", recording, "--prompt-audio", recording, "--stems", "--duration", 1.2),
        *("--model", folders["melody"]),
    )
    assert code == 0
    ((prompt_samples, melody, rate),) = heard
    assert rate == 32000
    torch.testing.assert_close(melody, tune(1.0, first_note=3))
    assert prompt_samples >= 44100  # the beginning keeps its drums


def test_interrupted(run: Run, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MusicGen, "generate", interrupt)
    code, _, err = run("generate", "rock", "--model", folders["text"])
    assert code == 130
    assert err == "\nmusicgen: interrupted\n"


def test_interrupted_after_a_file(run: Run, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    generate = MusicGen.generate

    def once(self: MusicGen, texts: list[str | None], **keywords: Any) -> Any:
        if texts == ["jazz"]:
            raise KeyboardInterrupt
        return generate(self, texts, **keywords)

    monkeypatch.setattr(MusicGen, "generate", once)
    code, out, err = run(
        "generate", "rock", "jazz", "--batch", 1, "--duration", 0.1, "--seed", 1, "--model", folders["text"]
    )
    assert code == 130
    assert "out/rock_seed1.wav" in out
    assert err.endswith("\nmusicgen: interrupted; the files listed above are complete\n")


def test_terminated(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "musicgen", "generate", "rock", "--duration", "600"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()  # the header: generation begins
        process.terminate()
        assert process.wait(30) == 143
        assert process.stderr.read() == "\nmusicgen: terminated\n"


def test_a_full_disk_behind_stdout(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "musicgen", "models"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (
        1,
        "musicgen: error: cannot write to stdout: No space left on device\n",
    )


@pytest.mark.parametrize(
    ("given", "words"), [("generat", "try `musicgen generate`"), ("happy rock", "try `musicgen generate 'happy rock'`")]
)
def test_a_command_that_does_not_exist(given: str, words: str, run: Run) -> None:
    code, out, err = run(given)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("the GPU\nis gone"), "RuntimeError: the GPU is gone"),
        (KernelArgumentError("x", "[1, 2]", "[2, 1]"), "KernelArgumentError: x: expected [1, 2], got [2, 1]"),
        (ValueError(), "ValueError"),
    ],
)
def test_an_error_that_nobody_foresaw_is_a_line(
    error: Exception, told: str, run: Run, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(MusicGen, "generate", fail)
    code, _, err = run("generate", "rock", "--model", folders["text"])
    assert (code, err) == (1, f"musicgen: error: {told} (unexpected error; set MUSICGEN_DEBUG=1 for a traceback)\n")
    monkeypatch.setenv("MUSICGEN_DEBUG", "1")
    with pytest.raises(type(error)):
        run("generate", "rock", "--model", folders["text"])


def test_a_terminal_that_cannot_show_a_sign() -> None:
    command = [sys.executable, "-m", "musicgen", "generate", "--help"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_debug_lets_errors_through(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("MUSICGEN_DEBUG", "1")
    with pytest.raises(WeightsError):
        run("generate", "rock", "--model", "./model")


# --- models, doctor


def test_models(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("musicgen.cli.models.is_cached", lambda repo_id: repo_id == "facebook/musicgen-stereo-small")
    code, out, _ = run("models")
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert "bundled" in rows["demo"]
    assert all(word in rows["stereo-small"] for word in ("0.42 B", "stereo", "CC-BY-NC-4.0", "yes"))
    assert "yes" not in rows["small"]
    _, out, _ = run("models", "--json")
    cards = {card["name"]: card for card in json.loads(out)}
    assert len(cards) == 11
    assert [name for name, card in cards.items() if card["is_local"]] == ["demo", "stereo-small"]
    assert cards["melody"]["melody"] is True


def test_doctor(run: Run) -> None:
    from musicgen_kernels.backend import OPERATIONS

    code, out, _ = run("doctor")
    assert code == 0
    for words in (torch.__version__, "kernel backends on cpu", "offline mode", "demucs", *OPERATIONS):
        assert words in out
    _, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert found["versions"]["torch"] == torch.__version__
    assert [choice["operation"] for choice in found["backends"]["cpu"]] == list(OPERATIONS)
    assert found["hugging_face"]["offline"] is True  # as conftest sets it


@pytest.mark.parametrize(
    ("asked", "runs", "reason"),
    [
        (None, "one call", "to the C++ kernels at level "),
        ("cpu:baseline", "one call", "at level baseline"),
        ("reference", "operations", "MUSICGEN_KERNELS_BACKEND selects"),
        ("linear=reference", "operations", "MUSICGEN_KERNELS_BACKEND selects"),
        ("cpu:abacus", "none", "no such level"),
    ],
)
def test_doctor_says_what_runs_a_step(
    asked: str | None, runs: str, reason: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `whole_step` decides it."""
    monkeypatch.delenv("MUSICGEN_KERNELS_ISA", raising=False)
    monkeypatch.delenv("MUSICGEN_KERNELS_BACKEND", raising=False)
    if asked is not None:
        monkeypatch.setenv("MUSICGEN_KERNELS_BACKEND", asked)
    code, out, _ = run("doctor", "--json")
    assert code == 0
    step = json.loads(out)["steps"]["cpu"]
    assert step["runs"] == runs
    assert reason in step["reason"]
    lm = load_model("demo").lm
    if runs == "none":
        with pytest.raises(BackendUnavailableError):
            whole_step(pack_decoder(lm.decoder, "int8", 64))
    else:
        chosen = whole_step(pack_decoder(lm.decoder, "int8", 64))
        assert isinstance(chosen, CpuStep) == (runs == "one call")


def test_doctor_says_why_there_are_no_kernels(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from musicgen_kernels import isa

    def unavailable(*_: object) -> None:
        raise BackendUnavailableError("cpu", "no compiler was found")

    monkeypatch.setattr(isa, "supported_levels", unavailable)
    monkeypatch.delenv("MUSICGEN_KERNELS_BACKEND", raising=False)
    code, out, _ = run("doctor")
    assert code == 0
    assert "no compiler was found" in out
    _, out, _ = run("doctor", "--json")
    assert json.loads(out)["steps"]["cpu"]["runs"] == "operations"


# --- parts


def test_an_inner_part_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    watch = Stopwatch()

    def decode(seconds: float) -> str:
        nonlocal now
        now += seconds
        return "done"

    decoder = watch.watch("decode", decode)
    with watch.measure("codes"):
        now += 1
        assert decoder(4.0) == "done"
        now += 2
    assert watch.seconds["codes"] == 3
    assert watch.seconds["decode"] == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Happy Rock!", "happy-rock"), ("../../etc/passwd", "etc-passwd"), ("été 80's", "été-80-s"), ("…", "piece")],
)
def test_slug(text: str, expected: str) -> None:
    assert slug(text) == expected


def test_slug_is_short() -> None:
    assert len(slug("word " * 100)) <= 48
    assert len(slug("音楽" * 100).encode()) <= 64
    assert slug("音楽" * 100).startswith("音楽音楽")


@pytest.mark.parametrize("sign", ["w", "é", "音", "\N{GUITAR}", "𝄞"])
def test_every_name_fits(sign: str) -> None:
    """Whatever it is made from, with the longest seed, number and suffix."""
    source = Path(sign * (250 // len(sign.encode())))
    piece = Piece(sign * 300, source, source, seed=2**63 - 1)
    assert len(f"{piece.file_stem}-1000.flac".encode()) <= 255


def test_a_name_that_is_too_long_is_known_before_the_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems allow less than others."""

    def fail(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("musicgen.weights.load._load", fail)
    monkeypatch.setattr("musicgen.cli.plan.MAX_SLUG_LEN", 1000)
    monkeypatch.setattr("musicgen.cli.plan.MAX_SLUG_BYTES", 1000)
    code, _, err = run("generate", "音" * 100)
    assert code == 2
    assert "name too long" in err
    assert err.count("\n") == 1


def test_a_file_name_that_is_no_text(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    """Names are bytes; what cannot be shown is replaced."""
    path = tmp_path / "caf\udce9.wav"
    soundfile.write(tmp_path / "tune.wav", tune(1.0)[0].numpy(), 32000)
    try:
        (tmp_path / "tune.wav").rename(path)
    except OSError:
        pytest.skip("the file system takes Unicode only")
    code, out, err = run(
        *("generate", "--melody", path, "--duration", 0.2, "--seed", 1, "--model", folders["melody"]),
        *("--plot", "--json", "--strategy", "peak"),
    )
    assert (code, err) == (0, "")
    (file,) = _last_json(out)["files"]
    assert (file["path"], file["melody"]) == ("out/caf_seed1.wav", str(path))
