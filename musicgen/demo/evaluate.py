"""Held-out evaluation of the demo model: codec, language model, generation.

Computes the metrics and writes them as JSON. Run it on shards with a seed that was not used in training, rendered and
tokenised like the training data.

    python -m musicgen.demo.evaluate --data build/demo --out build/demo/figures.json
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EncodecModel, MusicgenMelodyForConditionalGeneration

from musicgen.demo import checkpoint_path
from musicgen.demo.dataset import SPECIAL, Clips, held_out_batch, load_clips
from musicgen.demo.forward import codebook_losses
from musicgen.demo.generate import generate
from musicgen.demo.plot import plot_chroma
from musicgen.demo.score import STYLES, Label
from musicgen.demo.style import StyleClassifier, features, fit_classifier
from musicgen.demo.text import build_tokenizer
from musicgen.demo.tokenise import HOP_LEN, decode, encode
from musicgen.demo.train_lm import CONDITIONS
from musicgen.demo.train_lm import evaluate as evaluate_losses
from musicgen.metrics import NUM_CHROMA, chroma_cosine_similarity, chromagram, spectral_distance
from musicgen.model import Model
from musicgen.weights import load_model

SAMPLE_RATE_HZ = 32000
SILENT_RMS = 0.01
ONE_NOTE_SHARE = 0.9
CARD_PROMPTS = ("happy rock", "energetic EDM", "sad jazz")
NEXT_CLIP = 1
"""Prompts are taken from the next clip, so that melody and style come from different sources."""


@dataclass(frozen=True, slots=True)
class Similarities:
    """Chroma cosine similarity, one-hot (exact) and soft, with the right reference and with all wrong ones."""

    right: float
    wrong: float
    right_soft: float
    wrong_soft: float


def similarities(references: Tensor, others: Tensor, num_shifts: int = 8) -> Similarities:
    """Compares two lists of recordings, ``[B, samples]`` each, in order and shifted by 1..num_shifts places."""
    shifts = range(1, min(num_shifts, len(references) - 1) + 1)

    def mean(argmax: bool, shift: int) -> float:
        return chroma_cosine_similarity(references, others.roll(shift, 0), argmax=argmax).mean().item()

    wrong = [float(np.mean([mean(argmax, shift) for shift in shifts])) for argmax in (True, False)]
    return Similarities(mean(True, 0), wrong[0], mean(False, 0), wrong[1])


@torch.no_grad()
def losses_without_past(model: MusicgenMelodyForConditionalGeneration, clips: Clips) -> dict[str, list[float]]:
    """Held-out loss of each codebook in nats per code with all past codes masked, i.e. from the conditions alone.

    Over the first 8 s of each clip, in float32.
    """
    tokenizer, result = build_tokenizer(), {}
    for name, keywords in CONDITIONS:
        parts = []
        for start in range(0, len(clips), 8):
            rows = list(range(start, min(start + 8, len(clips))))
            batch = held_out_batch(clips, tokenizer, rows, 400, **keywords)
            hidden = replace(batch, inputs=torch.full_like(batch.inputs, SPECIAL))
            parts.append(len(rows) * codebook_losses(model, hidden, torch.float32))
        result[name] = [round(value, 4) for value in (torch.stack(parts).sum(dim=0) / len(clips)).tolist()]
    return result


def codec_figures(codec: EncodecModel, wav: Tensor) -> dict[str, Any]:
    """Reconstruction quality of the codec on recordings, ``[B, samples]`` (whole frames)."""
    codes = encode(codec, wav)
    decoded = decode(codec, codes)
    used = [torch.unique(codes[:, k]).numel() for k in range(codes.shape[1])]
    shares = [
        torch.bincount(codes[:, k].flatten(), minlength=2).float() / codes[:, k].numel() for k in range(len(used))
    ]
    perplexities = [float((-(p[p > 0] * p[p > 0].log()).sum()).exp()) for p in shares]
    result: dict[str, Any] = {"spectral_distance": spectral_distance(wav, decoded).mean().item(), "entries_used": used}
    result["codebook_perplexity"] = [round(value, 1) for value in perplexities]
    if len(wav) > 1:
        pairs = similarities(wav, decoded)
        result |= {name: round(getattr(pairs, name), 4) for name in Similarities.__slots__}
        result |= {name: round(share, 4) for name, share in moved_classes(wav, decoded).items()}
    else:
        result["right"] = chroma_cosine_similarity(wav, decoded).mean().item()
        result["right_soft"] = chroma_cosine_similarity(wav, decoded, argmax=False).mean().item()
    return result


def moved_classes(wav: Tensor, decoded: Tensor) -> dict[str, float]:
    """Fractions of frames whose strongest pitch class moved by a semitone, and by a fourth or a fifth."""
    steps = (chromagram(decoded).argmax(dim=-1) - chromagram(wav).argmax(dim=-1)) % NUM_CHROMA
    moved = {"semitone": (1, 11), "fourth_or_fifth": (5, 7)}
    return {name: torch.isin(steps, torch.tensor(by)).float().mean().item() for name, by in moved.items()}


def collapse(wav: Tensor) -> dict[str, float]:
    """Fractions of recordings, ``[B, samples]``, that are silent, and that stay on one pitch class."""
    silent = wav.pow(2).mean(dim=1).sqrt() < SILENT_RMS
    classes = chromagram(wav).argmax(dim=-1)
    top = torch.stack([torch.bincount(row, minlength=12).max() / len(row) for row in classes])
    return {"silent": silent.float().mean().item(), "one_note": (top > ONE_NOTE_SHARE).float().mean().item()}


def train_classifier(codec: EncodecModel, folder: Path, num_clips: int, num_samples: int) -> StyleClassifier:
    """Train a style classifier on decoded training clips, each split into pieces of ``num_samples``."""
    clips = load_clips(folder)
    rows, styles = [], []
    for index in range(min(num_clips, len(clips))):
        codes = undelay(clips.sequences[index : index + 1].long())
        pieces = decode(codec, codes)[0].unfold(0, num_samples, num_samples)
        rows.append(features(pieces))
        styles += [clips.labels[index].style] * len(pieces)
    return fit_classifier(torch.cat(rows), styles)


def undelay(sequences: Tensor) -> Tensor:
    """Inverse of ``dataset.delay``: int ``[N, K, T + 4]`` → ``[N, K, T]``."""
    num_codebooks, num_frames = sequences.shape[1], sequences.shape[2] - sequences.shape[1]
    return torch.stack([sequences[:, k, 1 + k : 1 + k + num_frames] for k in range(num_codebooks)], dim=1)


def generation_figures(
    model: Model, classifier: StyleClassifier, melodies: Tensor, prompts: Sequence[tuple[str, str]], num_threads: int
) -> dict[str, Any]:
    """Melody following, style and collapse of generated music.

    Args:
        melodies: float ``[B, samples]``.
        prompts: B pairs (style, prompt), not necessarily those of the melodies' clips.
    """
    wav = generate(model, [prompt for _, prompt in prompts], melodies, num_threads=num_threads)
    pairs = similarities(melodies, wav)
    found = classifier.predict(wav)
    result: dict[str, Any] = {"recordings": len(wav), "seconds": wav.shape[-1] / SAMPLE_RATE_HZ, **collapse(wav)}
    result |= {name: round(getattr(pairs, name), 4) for name in Similarities.__slots__}
    heard = Counter(f"{style} heard as {guess}" for (style, _), guess in zip(prompts, found, strict=True))
    result["styles"] = dict(sorted(heard.items()))
    result["style_accuracy"] = float(
        np.mean([style == guess for (style, _), guess in zip(prompts, found, strict=True)])
    )
    result["style_chance"] = 1 / len(classifier.names)
    return result


def load_recording(path: Path, num_samples: int) -> Tensor:
    """A recording as float ``[1, num_samples]``: mono, 32 kHz, peak 0.8, repeated if shorter."""
    import soundfile as sf
    import torchaudio

    audio, rate_hz = sf.read(str(path), dtype="float32", always_2d=True)
    mono: Tensor = torchaudio.functional.resample(torch.from_numpy(audio.mean(axis=1)), rate_hz, SAMPLE_RATE_HZ)
    repeats = -(-num_samples // len(mono))
    cut = mono.repeat(repeats)[None, :num_samples]
    return cut * (0.8 / cut.abs().max().clamp_min(1e-3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=checkpoint_path())
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ (for the classifier) and held/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--melodies", type=int, default=64)
    parser.add_argument("--duration", type=float, default=10.0)
    parser.add_argument("--recordings", type=Path, nargs="*", default=[], help="additional melody recordings")
    parser.add_argument("--pictures", type=Path, help="folder for plots of those melodies and their pieces")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    figures = all_figures(arguments)
    arguments.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def all_figures(arguments: argparse.Namespace) -> dict[str, Any]:
    """All metrics, as a JSON-serialisable dictionary."""
    model = MusicgenMelodyForConditionalGeneration.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
    engine_model = load_model(str(arguments.checkpoint), "cpu")
    codec = model.audio_encoder
    num_samples = int(arguments.duration * SAMPLE_RATE_HZ) // HOP_LEN * HOP_LEN
    held = load_clips(arguments.data / "held")
    wav = load_held_out_audio(arguments.data / "held", arguments.duration)
    figures: dict[str, Any] = {"codec": codec_figures(codec, wav[:32]), "codec_recordings": {}}
    print(figures, flush=True)
    for path in arguments.recordings:
        figures["codec_recordings"][path.stem] = codec_figures(codec, load_recording(path, num_samples))
    figures["losses"] = evaluate_losses(model, held, len(held))
    figures["losses_without_past"] = losses_without_past(model, held)
    print(figures["losses"], figures["losses_without_past"], flush=True)
    classifier = train_classifier(codec, arguments.data / "train", 160, num_samples)
    decoded = decode(codec, encode(codec, wav[: arguments.melodies]))
    guesses = classifier.predict(decoded)
    truth = [label.style for label in held.labels[: arguments.melodies]]
    figures["classifier_accuracy_on_held_out"] = float(np.mean([a == b for a, b in zip(truth, guesses, strict=True)]))
    styles = [held.labels[(index + NEXT_CLIP) % arguments.melodies] for index in range(arguments.melodies)]
    prompts = [(label.style, prompt_of(label)) for label in styles]
    figures["generation"] = generation_figures(
        engine_model, classifier, wav[: arguments.melodies], prompts, arguments.threads
    )
    print(figures["generation"], flush=True)
    figures["recordings"] = {}
    for path in arguments.recordings:
        melody = load_recording(path, num_samples).expand(len(CARD_PROMPTS), -1)
        out = generate(engine_model, CARD_PROMPTS, melody, num_threads=arguments.threads)
        figures["recordings"][path.stem] = recording_figures(melody, out, classifier)
        if arguments.pictures:
            rows = [("melody", melody[0]), *zip(CARD_PROMPTS, out, strict=True)]
            plot_chroma(rows, arguments.pictures / f"demo-model-{path.stem}.png")
    return figures


def recording_figures(melody: Tensor, out: Tensor, classifier: StyleClassifier) -> dict[str, Any]:
    """Similarity of the card prompts' pieces to their melody, ``[3, samples]`` each, and the detected styles."""
    exact = chroma_cosine_similarity(melody, out)
    soft = chroma_cosine_similarity(melody, out, argmax=False)
    return {
        prompt: {"right": round(exact[i].item(), 4), "right_soft": round(soft[i].item(), 4), "style": style}
        for i, (prompt, style) in enumerate(zip(CARD_PROMPTS, classifier.predict(out), strict=True))
    }


def prompt_of(label: Label) -> str:
    """Mood and style as text, such as "sad jazz"."""
    return f"{label.mood} {STYLES[label.style].names[0]}"


def load_held_out_audio(folder: Path, duration_s: float) -> Tensor:
    """The starts of a folder's clips, float32 ``[N, samples]``, in whole code frames."""
    num_samples = int(duration_s * SAMPLE_RATE_HZ) // HOP_LEN * HOP_LEN
    shards = [np.load(path, mmap_mode="r")[:, :num_samples] for path in sorted(folder.glob("*.npy"))]
    return torch.cat([torch.from_numpy(shard.astype(np.float32)) / 32767 for shard in shards])


if __name__ == "__main__":
    main()
