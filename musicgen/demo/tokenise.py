"""Converts rendered shards to training data: codes and chroma, cached next to the audio.

Writes cache files ``{shard}.npz`` (``codes`` int16 ``[clips, 4, 1500]``; ``chroma`` and ``chroma_decoded`` int8
``[clips, 235]``, the strongest pitch class of each frame of the original and of the codec's reconstruction).

    python -m musicgen.demo.tokenise --data build/demo --codec build/demo/codec
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EncodecModel

from musicgen.demo.model import load_codec
from musicgen.metrics import chromagram

HOP_LEN = 640
PIECE_FRAMES, CONTEXT_FRAMES = 100, 6
"""Convolutions run on 2 s pieces, whose activations fit in cache; the context covers the receptive field."""


def _split_at_lstm(layers: nn.ModuleList) -> tuple[list[nn.Module], nn.Module, list[nn.Module]]:
    index = next(i for i, layer in enumerate(layers) if type(layer).__name__ == "EncodecLSTM")
    return list(layers[:index]), layers[index], list(layers[index + 1 :])


def _run(layers: list[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _in_pieces(layers: list[nn.Module], x: Tensor, num_frames: int, hop_in: int, hop_out: int) -> Tensor:
    """Applies non-causal convolutions in pieces with context, which is trimmed again; equal to a single pass."""
    pieces = []
    for start in range(0, num_frames, PIECE_FRAMES):
        stop = min(num_frames, start + PIECE_FRAMES)
        first, last = max(0, start - CONTEXT_FRAMES), min(num_frames, stop + CONTEXT_FRAMES)
        out = _run(layers, x[..., first * hop_in : last * hop_in])
        pieces.append(out[..., (start - first) * hop_out : (stop - first) * hop_out])
    return torch.cat(pieces, dim=-1)


@torch.no_grad()
def encode(codec: EncodecModel, wav: Tensor) -> Tensor:
    """Codes of recordings: float ``[B, samples]`` (whole frames of 640) → int64 ``[B, K, T]``."""
    before, lstm, after = _split_at_lstm(codec.encoder.layers)
    num_frames = wav.shape[-1] // HOP_LEN
    rows = [_in_pieces(before, row[None, None], num_frames, HOP_LEN, 1) for row in wav]
    latent = _run(after, lstm(torch.cat(rows)))
    codes: Tensor = codec.quantizer.encode(latent, codec.config.target_bandwidths[-1])
    return codes.transpose(0, 1)


@torch.no_grad()
def decode(codec: EncodecModel, codes: Tensor) -> Tensor:
    """Audio of codes: int64 ``[B, K, T]`` → float32 ``[B, 640·T]``."""
    before, lstm, after = _split_at_lstm(codec.decoder.layers)
    hidden = lstm(_run(before, codec.quantizer.decode(codes.transpose(0, 1))))
    rows = [_in_pieces(after, row[None], codes.shape[-1], 1, HOP_LEN) for row in hidden]
    return torch.cat(rows)[:, 0]


def pitch_classes(wav: Tensor) -> Tensor:
    """Strongest pitch class of each chroma frame: float ``[B, samples]`` → int8 ``[B, frames]``."""
    return torch.cat([chromagram(row[None]).argmax(dim=-1) for row in wav]).to(torch.int8)


def tokenise_shard(codec: EncodecModel, path: Path) -> Path:
    """Writes the cache of one shard unless it exists."""
    out = path.with_suffix(".npz")
    if out.exists():
        return out
    wav = torch.from_numpy(np.load(path).astype(np.float32) / 32767)
    codes = encode(codec, wav)
    temporary = path.parent / f".{path.stem}.npz"
    np.savez_compressed(
        temporary,
        codes=codes.numpy().astype(np.int16),
        chroma=pitch_classes(wav).numpy(),
        chroma_decoded=pitch_classes(decode(codec, codes)).numpy(),
    )
    os.replace(temporary, out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--codec", type=Path, required=True, help="folder with an EncodecModel or a checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--part", type=int, nargs=2, default=(0, 1), help="index of this process and number of processes"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    codec = load_codec(arguments.codec)
    index, count = arguments.part
    for path in sorted(arguments.data.glob("*.npy"))[index::count]:
        start_s = time.monotonic()
        print(tokenise_shard(codec, path), f"{time.monotonic() - start_s:.1f} s", flush=True)


if __name__ == "__main__":
    main()
