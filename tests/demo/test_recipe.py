"""The recipe's steps name modules and options that exist, and none is left out."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from musicgen.demo.__main__ import Size, steps


def test_every_step_is_a_module_and_takes_its_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = steps(Path("out"), None, Size())
    names = [command[0] for command in commands]
    assert names == [
        *("render", "render", "render", "train_codec", "tokenise", "tokenise"),
        *("train_lm", "plot", "evaluate", "quantisation"),
    ]
    assert [c[0] for c in steps(Path("out"), Path("codec"), Size())].count("train_codec") == 0
    for name, *options in commands:
        module = importlib.import_module(f"musicgen.demo.{name}")
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit) as stop:
            module.main()
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert all(option in text for option in options if option.startswith("--"))


def test_importing_the_package_needs_no_training_packages() -> None:
    code = "import sys, musicgen.demo as demo; demo.checkpoint_path(); print('torch' in sys.modules)"
    # The parent package decides what it imports itself; the demo package must add nothing.
    base = subprocess.run(
        [sys.executable, "-c", "import sys, musicgen; print('transformers' in sys.modules)"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    with_demo = subprocess.run(
        [sys.executable, "-c", code.replace("'torch'", "'transformers'")], check=True, capture_output=True, text=True
    )
    assert with_demo.stdout == base.stdout
