"""Quality loss of quantised weights and KV cache on the demo model: held-out perplexity and melody following.

Everything runs through the engine's compiled step: perplexity by feeding it held-out codes token by token, as in
decoding, with a KV cache of the dtype under test; generation through the engine.

    python -m musicgen.demo.quantisation --data build/demo --out build/demo/quantisation.json
"""

import argparse
import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from musicgen_kernels import PAGE_LEN
from musicgen_kernels.cpu_step import CpuStep
from musicgen_kernels.pages import KVStore, new_kv_store
from musicgen_kernels.step import StepBatch
from torch import Tensor

from musicgen.config import KVDtype, WeightDtype
from musicgen.demo import checkpoint_path
from musicgen.demo.dataset import SPECIAL, Clips, held_out_batch, load_clips
from musicgen.demo.evaluate import NEXT_CLIP, load_held_out_audio, prompt_of, similarities
from musicgen.demo.generate import generate
from musicgen.demo.text import build_tokenizer
from musicgen.engine.packing import pack_decoder
from musicgen.metrics import NUM_CHROMA
from musicgen.model import Model
from musicgen.types import Conditioning, SamplingParams
from musicgen.weights import load_model

WEIGHTS: tuple[WeightDtype, ...] = get_args(WeightDtype)
CACHES: tuple[KVDtype, ...] = ("float32", "float16", "int8")


@dataclass(frozen=True, slots=True)
class HeldOut:
    """``prefix`` float32 ``[B, P, dim]``; ``inputs`` and ``targets`` int64 ``[B, K, S]``, as in ``dataset.Batch``."""

    prefix: Tensor
    inputs: Tensor
    targets: Tensor


@torch.no_grad()
def prepare(model: Model, clips: Clips, num_clips: int, num_steps: int) -> HeldOut:
    """The first steps of held-out clips after their own melody and text, projected by the engine's modules."""
    batch = held_out_batch(clips, build_tokenizer(), list(range(num_clips)), num_steps)
    prefixes = []
    for chroma, ids in zip(batch.chroma, batch.text_ids, strict=True):
        text = model.text_encoder.model(input_ids=ids[None]).last_hidden_state[0]
        conditioning = Conditioning(text, F.one_hot(chroma, NUM_CHROMA).float())
        rows = model.lm.guidance_rows(conditioning, SamplingParams(guidance_scale=1.0))
        assert rows.prefix is not None
        prefixes.append(rows.prefix[0])
    return HeldOut(torch.stack(prefixes), batch.inputs, batch.targets)


@torch.inference_mode()
def teacher_forced_losses(step: CpuStep, held: HeldOut, kv: KVDtype, num_threads: int) -> Tensor:
    """Mean loss of each codebook in nats per code, float64 ``[K]``, excluding positions without a code.

    The prefix is one step; then every step feeds one token per row and reads its logits, as in decoding.
    """
    num_rows, prefix_len, _ = held.prefix.shape
    num_codebooks, num_steps = held.inputs.shape[1:]
    num_pages = -(-(prefix_len + num_steps) // PAGE_LEN)
    pages = _pages(step, num_rows * num_pages, kv)
    page_table = torch.arange(num_rows * num_pages, dtype=torch.int32).view(num_rows, num_pages)
    first = StepBatch(
        codes=torch.zeros(num_rows * prefix_len, num_codebooks, dtype=torch.int32),
        query_offsets=prefix_len * torch.arange(num_rows + 1, dtype=torch.int32),
        kv_lens=torch.full((num_rows,), prefix_len, dtype=torch.int32),
        page_table=page_table,
        logit_tokens=torch.empty(0, dtype=torch.int32),
        prefix=held.prefix.flatten(0, 1).contiguous(),
        prefix_index=torch.arange(num_rows * prefix_len, dtype=torch.int32),
    )
    step.run(first, pages, None, num_threads=num_threads)
    sums, counts = torch.zeros(num_codebooks, dtype=torch.float64), torch.zeros(num_codebooks, dtype=torch.int64)
    for s in range(num_steps):
        batch = StepBatch(
            codes=held.inputs[:, :, s].to(torch.int32).contiguous(),
            query_offsets=torch.arange(num_rows + 1, dtype=torch.int32),
            kv_lens=torch.full((num_rows,), prefix_len + s + 1, dtype=torch.int32),
            page_table=page_table,
            logit_tokens=torch.arange(num_rows, dtype=torch.int32),
        )
        logits = step.run(batch, pages, None, num_threads=num_threads)
        targets = held.targets[:, :, s]
        losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=SPECIAL, reduction="none")
        sums += losses.sum(dim=0).double()
        counts += (targets != SPECIAL).sum(dim=0)
    return sums / counts


def _pages(step: CpuStep, num_pages: int, kv: KVDtype) -> KVStore:
    weights = step.weights
    head_dim = weights.dim // weights.num_heads
    return new_kv_store(len(weights.blocks), num_pages, weights.num_heads, head_dim, getattr(torch, kv))


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One record per combination of weights and KV dtype: losses, perplexity, chroma cosine similarity."""
    model = load_model(str(arguments.checkpoint), "cpu")
    clips = load_clips(arguments.data / "held")
    held = prepare(model, clips, arguments.clips, arguments.steps)
    melodies = load_held_out_audio(arguments.data / "held", arguments.duration)[: arguments.melodies]
    labels = [clips.labels[(index + NEXT_CLIP) % len(melodies)] for index in range(len(melodies))]
    records = []
    for weights in WEIGHTS:
        max_positions = held.prefix.shape[1] + arguments.steps
        step = CpuStep(pack_decoder(model.lm.decoder, weights, max_positions))
        for kv in CACHES:
            losses = teacher_forced_losses(step, held, kv, arguments.threads)
            record: dict[str, Any] = {"weights": weights, "kv": kv, "losses": losses.tolist()}
            record["perplexity"] = losses.exp().tolist()
            record["perplexity_of_mean"] = losses.mean().exp().item()
            prompts = [prompt_of(label) for label in labels]
            made = generate(model, prompts, melodies, weights=weights, kv=kv, num_threads=arguments.threads)
            pairs = similarities(melodies, made)
            record |= {"right": pairs.right, "wrong": pairs.wrong, "right_soft": pairs.right_soft}
            print(json.dumps(record), flush=True)
            records.append(record)
            gc.collect()
    return records


def as_table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown table of all combinations, with the differences from float32 throughout."""
    lines = [
        "| weights | keys and values | perplexity, codebook 1 | all codebooks | change | chroma cosine | change |",
        "|---|---|---|---|---|---|---|",
    ]
    base = records[0]
    for record in records:
        change = 100 * (record["perplexity_of_mean"] / base["perplexity_of_mean"] - 1)
        lines.append(
            f"| {record['weights']} | {record['kv']} | {record['perplexity'][0]:.3f} "
            f"| {record['perplexity_of_mean']:.2f} | {change:+.2f} % "
            f"| {record['right']:.3f} | {record['right'] - base['right']:+.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=checkpoint_path())
    parser.add_argument("--data", type=Path, required=True, help="folder with held/, rendered and tokenised")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=64, help="clips for the perplexity")
    parser.add_argument("--steps", type=int, default=400, help="steps per clip")
    parser.add_argument("--melodies", type=int, default=16, help="pieces generated per combination")
    parser.add_argument("--duration", type=float, default=10.0, help="seconds per piece")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    records = compare(arguments)
    arguments.out.write_text(json.dumps(records, indent=1) + "\n")
    print(as_table(records))


if __name__ == "__main__":
    main()
