"""Batches for the demo language model from cached codes, chroma and labels.

Handles the delay pattern's layout, crops, random prompts and condition dropout.
"""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from musicgen.demo.model import CHROMA_LEN, CODEBOOK_SIZE, NUM_CODEBOOKS
from musicgen.demo.score import Label, describe

SPECIAL = CODEBOOK_SIZE
HIDDEN_SHARE, HIDDEN_RUN_LEN = 0.3, 12
FOREIGN_SHARE, FOREIGN_RUN_LEN = 0.3, 100
"""Fraction of a batch's rows whose past is masked or replaced, and the length of the affected runs in steps."""
MIN_MELODY_FRAMES = 40
"""Minimum length of a crop's melody, in chroma frames, before it is repeated: 5 s."""


@dataclass(frozen=True, slots=True)
class Clips:
    """``sequences`` int16 ``[N, K, T + 4]`` (delayed, column 0 special); ``chroma`` int8 ``[N, 235]``; ``labels`` N.

    ``groups`` maps group names to the indices of the clips that play the same melody.
    """

    sequences: Tensor
    chroma: Tensor
    chroma_original: Tensor
    labels: tuple[Label, ...]
    groups: dict[str, list[int]]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class Batch:
    """One crop of each of B clips.

    ``inputs`` and ``targets`` int64 ``[B, K, S]`` (``SPECIAL`` where the delay pattern has no code); ``chroma`` int64
    ``[B, 235]``; ``text_ids`` int64 ``[B, text_len]``; ``text_mask`` float32 ``[B]``, 0 where the text is dropped;
    ``offset`` is the step of the first column.
    """

    inputs: Tensor
    targets: Tensor
    chroma: Tensor
    text_ids: Tensor
    text_mask: Tensor
    offset: int


def delay(codes: Tensor) -> Tensor:
    """Delay pattern: int ``[N, K, T]`` → ``[N, K, T + 4]`` with ``out[:, k, 1 + k + t] = codes[:, k, t]``."""
    num_clips, num_codebooks, num_frames = codes.shape
    out = torch.full((num_clips, num_codebooks, num_frames + NUM_CODEBOOKS), SPECIAL, dtype=codes.dtype)
    for k in range(num_codebooks):
        out[:, k, 1 + k : 1 + k + num_frames] = codes[:, k]
    return out


def load_clips(folder: Path) -> Clips:
    """All cached shards of a folder.

    Raises:
        FileNotFoundError: the folder has no cached shards.
    """
    paths = sorted(folder.glob("*.npz"))
    if not paths:
        raise FileNotFoundError(f"no cached shards (*.npz) in {folder}; run musicgen.demo.tokenise first")
    codes, decoded, original, labels = [], [], [], []
    for path in paths:
        with np.load(path) as cache:
            codes.append(torch.from_numpy(cache["codes"]))
            decoded.append(torch.from_numpy(cache["chroma_decoded"]))
            original.append(torch.from_numpy(cache["chroma"]))
        labels += [Label(**fields) for fields in json.loads(path.with_suffix(".json").read_text())]
    groups: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        if label.group is not None:
            groups.setdefault(label.group, []).append(index)
    return Clips(delay(torch.cat(codes)), torch.cat(decoded), torch.cat(original), tuple(labels), groups)


def repeat_melody(chroma: Tensor, num_frames: int) -> Tensor:
    """The first ``num_frames`` of ``[..., frames]``, repeated cyclically to the same length."""
    return chroma[..., torch.arange(chroma.shape[-1]) % num_frames]


def sample_batch(
    clips: Clips, tokenizer: Tokenizer, rng: random.Random, batch_size: int, num_steps: int, offset: int
) -> Batch:
    """A training batch: random clips and words, shortened and repeated melodies, condition dropout.

    Drops both conditions in 10 % of examples (for guidance), only the text in 10 % and only the melody in 15 %.
    """
    chosen = [rng.randrange(len(clips)) for _ in range(batch_size)]
    chroma = clips.chroma[chosen].long()
    shortest = max(MIN_MELODY_FRAMES, -(-(offset + num_steps) * 10 // 64))
    text_mask = torch.ones(batch_size)
    for row in range(batch_size):
        if shortest < CHROMA_LEN and rng.random() < 0.4:
            chroma[row] = repeat_melody(chroma[row], rng.randint(shortest, CHROMA_LEN))
        drop = rng.random()
        if drop < 0.20:
            text_mask[row] = 0.0
        if drop < 0.10 or drop > 0.85:
            chroma[row] = 0
    texts = [describe(clips.labels[index], rng) for index in chosen]
    batch = _crop(clips, tokenizer, chosen, texts, chroma, text_mask, num_steps, offset)
    return replace(batch, inputs=disturb_past(clips, chosen, batch.inputs, offset, rng))


def disturb_past(clips: Clips, chosen: list[int], inputs: Tensor, offset: int, rng: random.Random) -> Tensor:
    """Masks runs of the past, or replaces them with codes of another style, in some rows of ``[B, K, S]`` (new tensor).

    Codes repeat from frame to frame, so the past alone predicts most of them and a model can ignore melody and text.
    With a masked past it cannot. A replaced past plays the same melody in another style if the clip has such a partner:
    it simulates music that has drifted away from its prompt, and trains the model to return to it.
    """
    out, num_steps = inputs.clone(), inputs.shape[-1]
    for row, index in enumerate(chosen):
        kind = rng.random()
        if kind < HIDDEN_SHARE:
            out[row, :, _runs(num_steps, HIDDEN_RUN_LEN, rng)] = SPECIAL
        elif kind < HIDDEN_SHARE + FOREIGN_SHARE:
            foreign = clips.sequences[_foreign_clip(clips, index, rng), :, offset : offset + num_steps].long()
            columns = _runs(num_steps, FOREIGN_RUN_LEN, rng)
            out[row, :, columns] = foreign[:, columns]
    return out


def _runs(num_steps: int, run_len: int, rng: random.Random) -> Tensor:
    """The steps to disturb: bool ``[num_steps]``, in runs, covering a third to all of them."""
    share = rng.uniform(0.3, 1.1)
    chosen = torch.tensor([rng.random() < share for _ in range(-(-num_steps // run_len))])
    return chosen.repeat_interleave(run_len)[:num_steps]


def _foreign_clip(clips: Clips, index: int, rng: random.Random) -> int:
    """A clip of another style: one with the same melody, or any if there is none."""
    label = clips.labels[index]
    rows = range(len(clips)) if label.group is None else clips.groups[label.group]
    others = [row for row in rows if clips.labels[row].style != label.style]
    return rng.choice(others) if others else index


def held_out_batch(
    clips: Clips, tokenizer: Tokenizer, rows: list[int], num_steps: int, *, melody: str = "right", text: str = "right"
) -> Batch:
    """Crops from the clips' start with the ``right`` condition, a ``wrong`` one (the next clip's) or ``none``.

    The prompt of a clip is the same in every call.
    """
    following = [(row + 1) % len(clips) for row in rows]
    chroma = clips.chroma[following if melody == "wrong" else rows].long()
    if melody == "none":
        chroma = torch.zeros_like(chroma)
    sources = following if text == "wrong" else rows
    texts = [describe(clips.labels[row], random.Random(f"held/{row}")) for row in sources]
    text_mask = torch.full((len(rows),), 0.0 if text == "none" else 1.0)
    return _crop(clips, tokenizer, rows, texts, chroma, text_mask, num_steps, 0)


def _crop(
    clips: Clips,
    tokenizer: Tokenizer,
    chosen: list[int],
    texts: list[str],
    chroma: Tensor,
    text_mask: Tensor,
    num_steps: int,
    offset: int,
) -> Batch:
    columns = clips.sequences[chosen, :, offset : offset + num_steps + 1].long()
    text_ids = torch.tensor([tokenizer.encode(text).ids for text in texts])
    return Batch(columns[:, :, :-1], columns[:, :, 1:], chroma, text_ids, text_mask, offset)
