"""The whole recipe of the demo model, step by step; each step continues where it was interrupted.

    python -m musicgen.demo --out build/demo --codec-minutes 70 --lm-minutes 90

``--codec FOLDER`` takes a trained codec (an ``EncodecModel`` or a whole checkpoint) in place of training one.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TRAIN_SEED, HELD_OUT_SEED = 1, 900
TRAIN_CLIPS, GROUPED_CLIPS, HELD_OUT_CLIPS = 512, 700, 80
"""Training clips of their own, training clips of melodies that come in every style, held-out clips."""


def steps(out: Path, codec: Path | None, codec_minutes: float, lm_minutes: float) -> list[list[str]]:
    """The commands of the recipe in order, each a module of this package with its arguments."""
    train, held, run = str(out / "train"), str(out / "held"), str(out / "run")
    made_codec = str(codec or out / "codec-run" / "codec")

    def render(seed: int, num_clips: int, folder: str, name: str, *options: str) -> list[str]:
        return ["render", "--seed", str(seed), "--clips", str(num_clips), "--out", folder, "--name", name, *options]

    commands = [
        render(TRAIN_SEED, TRAIN_CLIPS, train, "train"),
        render(TRAIN_SEED, GROUPED_CLIPS, train, "pair", "--grouped"),
        render(HELD_OUT_SEED, HELD_OUT_CLIPS, held, "held"),
    ]
    if codec is None:
        codec_run = str(out / "codec-run")
        commands.append(["train_codec", "--data", train, "--run", codec_run, "--minutes", str(codec_minutes)])
    commands += [
        ["tokenise", "--data", train, "--codec", made_codec],
        ["tokenise", "--data", held, "--codec", made_codec],
        ["train_lm", "--data", str(out), "--codec", made_codec, "--run", run, "--minutes", str(lm_minutes)],
        ["plot", "--run", run, "--out", str(out / "loss.png")],
    ]
    for module, name in (("evaluate", "figures"), ("quantisation", "quantisation")):
        file = str(out / f"{name}.json")
        commands.append([module, "--checkpoint", f"{run}/checkpoint", "--data", str(out), "--out", file])
    return commands


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--codec", type=Path)
    parser.add_argument("--codec-minutes", type=float, default=70.0)
    parser.add_argument("--lm-minutes", type=float, default=90.0)
    chosen = parser.parse_args(arguments)
    for module, *rest in steps(chosen.out, chosen.codec, chosen.codec_minutes, chosen.lm_minutes):
        print(f"== {module} {' '.join(rest)}", flush=True)
        subprocess.run([sys.executable, "-m", f"musicgen.demo.{module}", *rest], check=True)


if __name__ == "__main__":
    main()
