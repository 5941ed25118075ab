"""Plots the loss curves of a training run from its log, and chromagrams.

python -m musicgen.demo.plot --run build/demo/run --out docs/demo-model-loss.png
"""

import argparse
import json
from pathlib import Path

from torch import Tensor

from musicgen.metrics import chromagram


def plot(log: Path, out: Path) -> None:
    """Training loss of each codebook, and the held-out loss of the first with the right, a wrong and no melody."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [json.loads(line) for line in log.read_text().splitlines()]
    train = [record for record in records if "train" in record]
    held = [record for record in records if "held_out" in record]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), dpi=80, layout="constrained")
    for k in range(len(train[0]["train"])):
        left.plot([r["step"] for r in train], [r["train"][k] for r in train], label=f"codebook {k + 1}")
    left.set(title="training", xlabel="step", ylabel="nats per code")
    left.legend()
    for name in ("right", "wrong_melody", "no_melody", "wrong_text"):
        steps = [record["step"] for record in held]
        right.plot(steps, [record["held_out"][name][0] for record in held], marker=".", label=name.replace("_", " "))
    right.set(title="held out, first codebook", xlabel="step")
    right.legend()
    figure.savefig(out)
    pyplot.close(figure)


def plot_chroma(recordings: list[tuple[str, Tensor]], out: Path) -> None:
    """Chromagrams of recordings of equal length, float ``[samples]`` each at 32 kHz, stacked vertically."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(recordings), 1, figsize=(7, 1.25 * len(recordings)), dpi=70, layout="constrained"
    )
    for axis, (title, wav) in zip(axes, recordings, strict=True):
        chroma = chromagram(wav[None])[0]
        axis.imshow(chroma.T.numpy(), origin="lower", aspect="auto", extent=(0, len(wav) / 32000, -0.5, 11.5))
        axis.set_title(title, fontsize=8)
        axis.set_yticks(range(0, 12, 2), ("C", "D", "E", "F♯", "G♯", "A♯"), fontsize=6)
        axis.tick_params(axis="x", labelsize=6)
    axes[-1].set_xlabel("seconds", fontsize=7)
    figure.savefig(out)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    plot(arguments.run / "log.jsonl", arguments.out)


if __name__ == "__main__":
    main()
