"""Trains the demo codec from scratch on rendered shards: a small EnCodec in Hugging Face layout.

Resumable and seeded; the schedule counts steps, so the result does not depend on the speed of the machine.

    python -m musicgen.demo.train_codec --data build/demo/train --run build/demo/codec-run
"""

import argparse
import json
import math
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import EncodecConfig, EncodecModel

from musicgen.demo.style import mel_filter_bank

CROP_SAMPLES = 640 * 32
NUM_STEPS = 2400
PEAK_RATE = 1e-3
DECAY = 0.98
"""Decay of the running means that the codebooks follow."""
DEAD_SIZE = 0.01
"""Entries whose running count falls below this are reset to a random latent of the batch."""
RESOLUTIONS = ((256, 16), (512, 32), (1024, 64), (2048, 96), (4096, 0))
"""(window in samples, mel bands; 0 bands: the first 600 linear bins, for harmonics below 4.7 kHz)."""


def codec_config() -> EncodecConfig:
    """32 kHz mono, hop 640, 4 codebooks of 1024, 12 filters, latent 64: 2.1 million parameters."""
    return EncodecConfig(
        sampling_rate=32000,
        audio_channels=1,
        normalize=False,
        chunk_length_s=None,
        overlap=None,
        upsampling_ratios=[8, 5, 4, 4],
        num_filters=12,
        hidden_size=64,
        codebook_dim=64,
        codebook_size=1024,
        target_bandwidths=[2.0],
        use_causal_conv=False,
        use_conv_shortcut=False,
        num_residual_layers=1,
        num_lstm_layers=2,
        pad_mode="reflect",
        norm_type="weight_norm",
    )


@dataclass(slots=True)
class Codebook:
    """One quantiser's entries (the model's own buffer, mutated in place) and the running means they follow."""

    embed: Tensor
    sizes: Tensor
    sums: Tensor

    def place(self, latents: Tensor) -> None:
        """Initialise with random latents of the data, ``[N, D]``, slightly perturbed."""
        chosen = latents[torch.randint(len(latents), (len(self.embed),))]
        self.embed.copy_(chosen + 0.05 * latents.std() * torch.randn_like(chosen))
        self.sizes.fill_(0.05)
        self.sums.copy_(self.embed * 0.05)

    def nearest(self, latents: Tensor) -> Tensor:
        """Index of the nearest entry of each latent: ``[N, D]`` → int64 ``[N]``."""
        return (self.embed.pow(2).sum(1) - 2 * latents @ self.embed.t()).argmin(1)

    def follow(self, latents: Tensor, indices: Tensor) -> None:
        """Moves the entries towards the means of their latents (van den Oord et al. 2017, appendix A.1)."""
        counts = torch.bincount(indices, minlength=len(self.embed)).float()
        self.sizes.mul_(DECAY).add_(counts, alpha=1 - DECAY)
        self.sums.mul_(DECAY).index_add_(0, indices, latents, alpha=1 - DECAY)
        self.embed.copy_(self.sums / self.sizes.clamp_min(1e-3)[:, None])
        dead = self.sizes < DEAD_SIZE
        if dead.any():
            chosen = latents[torch.randint(len(latents), (int(dead.sum()),))]
            self.embed[dead], self.sums[dead], self.sizes[dead] = chosen, chosen * 0.05, 0.05


def quantise(latent: Tensor, codebooks: list[Codebook], *, first: bool) -> tuple[Tensor, Tensor]:
    """Residual quantisation with straight-through gradients: ``[B, D, T]`` → the same, and the commitment loss.

    Mutates the codebooks; ``first`` initialises them from the data.
    """
    rows, dim, num_frames = latent.shape
    residual = latent.transpose(1, 2).reshape(-1, dim)
    quantised, commitment = torch.zeros_like(residual), torch.zeros(())
    for book in codebooks:
        with torch.no_grad():
            if first:
                book.place(residual)
            indices = book.nearest(residual)
            values = book.embed[indices].clone()
            book.follow(residual, indices)
        commitment = commitment + F.mse_loss(residual, values)
        quantised = quantised + values
        residual = residual - values
    quantised = quantised.view(rows, num_frames, dim).transpose(1, 2)
    return latent + (quantised - latent).detach(), commitment / len(codebooks)


def spectral_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """Spectral convergence plus log distance in mel bands at five resolutions: ``[B, samples]`` each → scalar."""
    total = torch.zeros(())
    for n_fft, num_bands in RESOLUTIONS:
        window = torch.hann_window(n_fft)
        first, second = (
            torch.stft(wav, n_fft, n_fft // 4, window=window, normalized=True, return_complex=True).abs()
            for wav in (made, wanted)
        )
        total = total + ((first - second).norm(dim=(1, 2)) / (second.norm(dim=(1, 2)) + 1e-2)).mean()
        if num_bands:
            bank = mel_filter_bank(num_bands, n_fft)
            first, second = bank @ first, bank @ second
        else:
            first, second = first[:, :600], second[:, :600]
        total = total + F.l1_loss((first + 1e-3).log(), (second + 1e-3).log())
    return total / len(RESOLUTIONS)


class CodecTrainer:
    """Training state of a codec; quantisation starts after ``warm_up_steps``, otherwise the codebooks collapse."""

    def __init__(self, run: Path, num_steps: int, *, seed: int = 0, warm_up_steps: int = 400) -> None:
        torch.manual_seed(seed)
        self.run, self.num_steps, self.warm_up_steps = run, num_steps, warm_up_steps
        self.model = EncodecModel(codec_config())
        self.model.train()
        self.codebooks = [
            Codebook(layer.codebook.embed, torch.ones(len(layer.codebook.embed)), layer.codebook.embed.clone())
            for layer in self.model.quantizer.layers
        ]
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=PEAK_RATE, betas=(0.8, 0.99))
        self.rng, self.step, self.used_s = random.Random(seed), 0, 0.0
        if (run / "state.pt").exists():
            self.load()

    def train_step(self, shards: list[NDArray[np.int16]], batch_size: int) -> float:
        """One update on random crops; returns the loss."""
        crops = []
        for _ in range(batch_size):
            shard = self.rng.choice(shards)
            start = self.rng.randrange(shard.shape[1] - CROP_SAMPLES)
            crops.append(shard[self.rng.randrange(len(shard)), start : start + CROP_SAMPLES])
        wav = torch.from_numpy(np.stack(crops).astype(np.float32) / 32767)[:, None]
        wav = wav * torch.empty(batch_size, 1, 1).uniform_(0.5, 1.1)
        latent, commitment = self.model.encoder(wav), torch.zeros(())
        if self.step >= self.warm_up_steps:
            latent, commitment = quantise(latent, self.codebooks, first=self.step == self.warm_up_steps)
        made = self.model.decoder(latent)[..., :CROP_SAMPLES]
        loss = spectral_loss(made[:, 0], wav[:, 0]) + 0.5 * F.l1_loss(made, wav) + 0.25 * commitment
        fall = 0.02 + 0.49 * (1 + math.cos(math.pi * self.step / self.num_steps))
        rate = PEAK_RATE * min(1, (self.step + 1) / 200) * fall
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 3.0)
        self.optimiser.step()
        self.step += 1
        return loss.item()

    def save(self) -> None:
        """Writes the training state, and the codec in Hugging Face layout."""
        state = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "codebooks": [(book.sizes, book.sums) for book in self.codebooks],
            "rng": (self.rng.getstate(), torch.get_rng_state()),
            "step": self.step,
            "used_s": self.used_s,
        }
        torch.save(state, self.run / ".state.pt")
        os.replace(self.run / ".state.pt", self.run / "state.pt")
        self.model.save_pretrained(self.run / "codec")

    def load(self) -> None:
        """Resumes from ``state.pt``."""
        state = torch.load(self.run / "state.pt", weights_only=False)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        for book, (sizes, sums) in zip(self.codebooks, state["codebooks"], strict=True):
            book.sizes, book.sums = sizes, sums
        self.rng.setstate(state["rng"][0])
        torch.set_rng_state(state["rng"][1])
        self.step, self.used_s = state["step"], state["used_s"]


def train(trainer: CodecTrainer, data: Path, batch_size: int, save_every_s: float = 240.0) -> None:
    """Runs the remaining steps, appending to ``log.jsonl``."""
    shards = [np.load(path, mmap_mode="r") for path in sorted(data.glob("*.npy"))]
    mean, saved_s = math.nan, trainer.used_s
    while trainer.step < trainer.num_steps:
        start_s = time.monotonic()
        loss = trainer.train_step(shards, batch_size)
        mean = loss if math.isnan(mean) else 0.98 * mean + 0.02 * loss
        trainer.used_s += time.monotonic() - start_s
        if trainer.step % 50 == 0:
            line = json.dumps({"step": trainer.step, "minutes": round(trainer.used_s / 60, 2), "loss": round(mean, 4)})
            with (trainer.run / "log.jsonl").open("a") as file:
                file.write(line + "\n")
            print(line, flush=True)
        if trainer.used_s - saved_s > save_every_s:
            trainer.save()
            saved_s = trainer.used_s
    trainer.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of rendered shards")
    parser.add_argument("--run", type=Path, required=True, help="folder for state, log and, in codec/, the codec")
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.run.mkdir(parents=True, exist_ok=True)
    train(CodecTrainer(arguments.run, arguments.steps, seed=arguments.seed), arguments.data, arguments.batch)


if __name__ == "__main__":
    main()
