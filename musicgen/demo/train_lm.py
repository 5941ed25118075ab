"""Trains the demo language model, text encoder and projections jointly on cached codes.

Implements the training loop: optimisers, schedule, checkpoints, log. Resumable: run again with the same ``--run``, it
continues, including the random state. The schedule counts steps, not time, so the result does not depend on the speed
of the machine.

    python -m musicgen.demo.train_lm --data build/demo --codec build/demo/codec --run build/demo/run
"""

import argparse
import json
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EncodecModel, MusicgenMelodyForConditionalGeneration

from musicgen.demo.dataset import Clips, held_out_batch, load_clips, sample_batch
from musicgen.demo.forward import MAX_STEPS, codebook_losses, initialise, text_separation
from musicgen.demo.model import build_model, load_codec, save_checkpoint
from musicgen.demo.muon import Muon
from musicgen.demo.text import build_tokenizer

LOSS_WEIGHTS = (2.0, 1.0, 0.6, 0.4)
"""The first codebook carries the pitch; the weights sum to the number of codebooks."""
TEXT_RATE = 0.05
"""Learning rate of text encoder and text projection, relative to AdamW's. The decoder normalises its inputs, so nothing
bounds the text states: at the full rate they grew to ten times the positions, in one direction, and words became
indistinguishable."""
NUM_STEPS = 2000
WARM_UP_STEPS = 60
DECAY_FROM = 0.55
"""Fraction of the steps after which the learning rate decays linearly, to 2 % of its peak."""
CONDITIONS: tuple[tuple[str, dict[str, str]], ...] = (
    ("right", {}),
    ("wrong_melody", {"melody": "wrong"}),
    ("no_melody", {"melody": "none"}),
    ("wrong_text", {"text": "wrong"}),
    ("no_text", {"text": "none"}),
    ("nothing", {"melody": "none", "text": "none"}),
)


@dataclass(frozen=True, slots=True)
class Settings:
    """``num_steps`` updates in total; ``crop`` is (clips, frames) of a batch, ``long_crop`` near the end."""

    num_steps: int
    seed: int
    crop: tuple[int, int]
    long_crop: tuple[int, int]
    long_from: float
    muon_rate: float
    adam_rate: float


def learning_rate_factor(step: int, progress: float) -> float:
    """Warm-up, then 1, then linear decay with ``progress``."""
    fall = 1.0 if progress < DECAY_FROM else max(0.02, (1.0 - progress) / (1.0 - DECAY_FROM))
    return min(1.0, (step + 1) / WARM_UP_STEPS) * fall


def build_optimisers(model: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon (Jordan 2024) for the transformer's matrices, AdamW for everything else.

    Every group stores its maximum rate as ``peak``.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    text: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_text = name.startswith(("text_encoder.", "enc_to_dec_proj."))
            is_matrix = ".layers." in name and parameter.dim() == 2
            (text if is_text else matrices if is_matrix else others).append(parameter)
    groups = [{"params": others, "peak": settings.adam_rate}, {"params": text, "peak": TEXT_RATE * settings.adam_rate}]
    wide = [{"params": matrices, "peak": settings.muon_rate}]
    return [
        Muon(wide, lr=settings.muon_rate, weight_decay=0.01),
        torch.optim.AdamW(groups, lr=settings.adam_rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def choose_crop(settings: Settings, progress: float, rng: random.Random) -> tuple[int, int, int]:
    """(clips, frames, offset) of the next batch: half of the crops start with the clip, to learn its positions."""
    batch_size, num_frames = settings.crop if progress < settings.long_from else settings.long_crop
    offset = 0 if rng.random() < 0.5 else rng.randrange(0, MAX_STEPS - num_frames, 16)
    return batch_size, num_frames, offset


@torch.no_grad()
def evaluate(model: MusicgenMelodyForConditionalGeneration, clips: Clips, num_clips: int) -> dict[str, list[float]]:
    """Held-out loss of each codebook in nats per code, in 8 s crops, for all relevant pairings of conditions."""
    tokenizer, rows, result = build_tokenizer(), list(range(min(num_clips, len(clips)))), {}
    for name, keywords in CONDITIONS:
        parts: list[Tensor] = []
        for start in range(0, len(rows), 8):
            batch = held_out_batch(clips, tokenizer, rows[start : start + 8], 400, **keywords)
            parts.append(codebook_losses(model, batch))
        result[name] = [round(value, 4) for value in torch.stack(parts).mean(dim=0).tolist()]
    return result


class Trainer:
    """State of a training run: model, optimisers, random state, step and elapsed time."""

    def __init__(self, settings: Settings, codec: EncodecModel, run: Path) -> None:
        self.settings, self.run = settings, run
        self.model = build_model(codec, settings.seed)
        self.model.train()
        self.rng = random.Random(settings.seed)
        self.tokenizer = build_tokenizer()
        self.step, self.used_s = 0, 0.0
        self.optimisers = build_optimisers(self.model, settings)
        if (run / "state.pt").exists():
            self.load()
        else:
            initialise(self.model, settings.seed)

    @property
    def progress(self) -> float:
        """Fraction of the steps completed."""
        return self.step / self.settings.num_steps

    def train_step(self, clips: Clips) -> Tensor:
        """One update; returns the loss of each codebook, float32 ``[K]``."""
        batch_size, num_frames, offset = choose_crop(self.settings, self.progress, self.rng)
        batch = sample_batch(clips, self.tokenizer, self.rng, batch_size, num_frames, offset)
        losses = codebook_losses(self.model, batch)
        torch.autograd.backward((losses * torch.tensor(LOSS_WEIGHTS)).mean())
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], 1.0)
        factor = learning_rate_factor(self.step, self.progress)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        return losses.detach()

    def log(self, record: dict[str, Any]) -> None:
        """Appends a line to ``log.jsonl`` and prints it."""
        line = json.dumps({"step": self.step, "minutes": round(self.used_s / 60, 2), **record})
        with (self.run / "log.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def log_held_out(self, clips: Clips, num_clips: int) -> None:
        """Logs the held-out losses, and how well the words can be distinguished."""
        losses = evaluate(self.model, clips, num_clips)
        self.log({"held_out": losses, "text_separation": round(text_separation(self.model), 4)})

    def save(self) -> None:
        """Writes the complete training state atomically."""
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        state = {
            "model": {name: p.detach() for name, p in trained.items()},
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "rng": self.rng.getstate(),
            "step": self.step,
            "used_s": self.used_s,
        }
        torch.save(state, self.run / ".state.pt")
        os.replace(self.run / ".state.pt", self.run / "state.pt")

    def load(self) -> None:
        """Resumes from ``state.pt``."""
        state = torch.load(self.run / "state.pt", weights_only=False)
        self.model.load_state_dict(state["model"], strict=False)
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.rng.setstate(state["rng"])
        self.step, self.used_s = state["step"], state["used_s"]
        print(f"resuming at step {self.step} after {self.used_s / 60:.1f} minutes", flush=True)


def train(
    trainer: Trainer, data: Path, held_out: Clips, save_every_s: float = 180.0, eval_every_s: float = 420.0
) -> None:
    """Runs the remaining steps, appending to ``log.jsonl``."""
    clips = load_clips(data)
    mean: Tensor | None = None
    saved_s = evaluated_s = trainer.used_s
    while trainer.step < trainer.settings.num_steps:
        start_s = time.monotonic()
        losses = trainer.train_step(clips)
        mean = losses if mean is None else 0.95 * mean + 0.05 * losses
        trainer.used_s += time.monotonic() - start_s
        if trainer.step % 20 == 0:
            trainer.log({"train": [round(value, 4) for value in mean.tolist()], "clips": len(clips)})
        if trainer.used_s - saved_s > save_every_s:
            trainer.save()
            saved_s = trainer.used_s
        if trainer.used_s - evaluated_s > eval_every_s:
            trainer.log_held_out(held_out, 32)
            evaluated_s = trainer.used_s
    trainer.save()
    trainer.log_held_out(held_out, len(held_out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and held/, tokenised")
    parser.add_argument("--codec", type=Path, required=True, help="folder with an EncodecModel or a checkpoint")
    parser.add_argument("--run", type=Path, required=True, help="folder for state, log and checkpoint")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="total updates, across restarts")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--frames", type=int, default=500, help="length of a crop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--export-only", action="store_true", help="export a checkpoint from the saved state and exit")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.run.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        num_steps=arguments.steps,
        seed=arguments.seed,
        crop=(arguments.batch, arguments.frames),
        long_crop=(max(1, arguments.batch // 2), 2 * arguments.frames),
        long_from=0.85,
        muon_rate=3e-3,
        adam_rate=2e-3,
    )
    trainer = Trainer(settings, load_codec(arguments.codec), arguments.run)
    if not arguments.export_only:
        train(trainer, arguments.data / "train", load_clips(arguments.data / "held"))
    save_checkpoint(trainer.model, arguments.run / "checkpoint")


if __name__ == "__main__":
    main()
