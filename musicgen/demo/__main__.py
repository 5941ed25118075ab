"""The complete training recipe of the demo model; each step can be interrupted and resumed.

    python -m musicgen.demo --out build/demo

``--codec FOLDER`` uses a trained codec (an ``EncodecModel`` or a whole checkpoint) instead of training one.
The defaults reproduce the bundled model. A quicker, lower-quality run:

    python -m musicgen.demo --out build/quick --clips 96 --grouped-clips 98 --codec-steps 1200 --lm-steps 800
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from musicgen.demo import train_codec, train_lm

TRAIN_SEED, HELD_OUT_SEED = 1, 900
HELD_OUT_CLIPS = 80


@dataclass(frozen=True, slots=True)
class Size:
    """Amount of data and training: individual clips, clips of melodies in every style, updates per model."""

    clips: int = 256
    grouped_clips: int = 392
    codec_steps: int = train_codec.NUM_STEPS
    lm_steps: int = train_lm.NUM_STEPS


def steps(out: Path, codec: Path | None, size: Size) -> list[list[str]]:
    """The commands of the recipe in order: modules of this package with their arguments."""
    train, held, run = str(out / "train"), str(out / "held"), str(out / "run")
    made_codec = str(codec or out / "codec-run" / "codec")

    def render(seed: int, num_clips: int, folder: str, name: str, *options: str) -> list[str]:
        return ["render", "--seed", str(seed), "--clips", str(num_clips), "--out", folder, "--name", name, *options]

    commands = [
        render(TRAIN_SEED, size.clips, train, "train"),
        render(TRAIN_SEED, size.grouped_clips, train, "pair", "--grouped"),
        render(HELD_OUT_SEED, HELD_OUT_CLIPS, held, "held"),
    ]
    if codec is None:
        codec_run = str(out / "codec-run")
        commands.append(["train_codec", "--data", train, "--run", codec_run, "--steps", str(size.codec_steps)])
    commands += [
        ["tokenise", "--data", train, "--codec", made_codec],
        ["tokenise", "--data", held, "--codec", made_codec],
        ["train_lm", "--data", str(out), "--codec", made_codec, "--run", run, "--steps", str(size.lm_steps)],
        ["plot", "--run", run, "--out", str(out / "loss.png")],
    ]
    for module, name in (("evaluate", "figures"), ("quantisation", "quantisation")):
        file = str(out / f"{name}.json")
        commands.append([module, "--checkpoint", f"{run}/checkpoint", "--data", str(out), "--out", file])
    return commands


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for data, training state, checkpoint and results"
    )
    parser.add_argument("--codec", type=Path, help="use this trained codec instead of training one")
    for field in fields(Size):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=field.default, help="default: %(default)s")
    chosen = parser.parse_args(arguments)
    size = Size(chosen.clips, chosen.grouped_clips, chosen.codec_steps, chosen.lm_steps)
    for module, *rest in steps(chosen.out, chosen.codec, size):
        print(f"== {module} {' '.join(rest)}", flush=True)
        subprocess.run([sys.executable, "-m", f"musicgen.demo.{module}", *rest], check=True)


if __name__ == "__main__":
    main()
