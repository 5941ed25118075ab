"""Renders the demo model's scores to audio with FluidSynth.

Writes shards to disk: ``{name}_{index:04d}.npy`` (int16 ``[clips, 960000]``, 32 kHz mono) and ``.json`` (the labels).
Requires the Debian packages ``fluidsynth`` and ``fluid-soundfont-gm`` (FluidR3, MIT licence).

    python -m musicgen.demo.render --seed 1 --clips 640 --out build/demo --name train
"""

import argparse
import json
import os
import random
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import soundfile as sf
from numpy.typing import NDArray

from musicgen.demo.score import (
    BASS_CHANNEL,
    CLIP_S,
    COMP_CHANNEL,
    DRUM_CHANNEL,
    LEAD_CHANNEL,
    STYLES,
    Score,
    compose,
    compose_in_every_style,
)

SAMPLE_RATE_HZ = 32000
CLIP_SAMPLES = int(CLIP_S * SAMPLE_RATE_HZ)
CLIPS_A_SHARD = 16
GAP_S = 2.0
"""Silence between clips of one MIDI file, in which the last notes decay."""
TICKS_A_SECOND = 960
DEFAULT_SOUND_FONT = "/usr/share/sounds/sf2/FluidR3_GM.sf2"
CHANNEL_VOLUMES = {LEAD_CHANNEL: 127, COMP_CHANNEL: 64, BASS_CHANNEL: 72, DRUM_CHANNEL: 80}
"""MIDI controller 7: keeps the lead the strongest voice, so that the chroma's maximum is the melody."""
PEAK = 0.8


def _variable_length(value: int) -> bytes:
    """A MIDI variable-length quantity (7 bits a byte, all but the last with the top bit set)."""
    out = [value & 127]
    while value := value >> 7:
        out.append((value & 127) | 128)
    return bytes(reversed(out))


def midi_file(scores: Sequence[Score]) -> bytes:
    """A format-0 Standard MIDI File that plays the scores one after another, ``CLIP_S + GAP_S`` seconds each."""
    events: list[tuple[int, int, bytes]] = []
    for index, score in enumerate(scores):
        offset_s = index * (CLIP_S + GAP_S)
        start = round(offset_s * TICKS_A_SECOND)
        style = STYLES[score.label.style]
        for channel, program in (
            (LEAD_CHANNEL, score.label.lead),
            (COMP_CHANNEL, style.comp),
            (BASS_CHANNEL, style.bass),
        ):
            events.append((start, 1, bytes([0xC0 | channel, program])))
        for channel, volume in CHANNEL_VOLUMES.items():
            events.append((start, 1, bytes([0xB0 | channel, 7, volume])))
        for note in score.notes:
            on, off = (round((offset_s + min(at, CLIP_S)) * TICKS_A_SECOND) for at in (note.start_s, note.end_s))
            events.append((on, 2, bytes([0x90 | note.channel, note.pitch, note.velocity])))
            events.append((max(off, on + 1), 0, bytes([0x80 | note.channel, note.pitch, 0])))
    end = round(len(scores) * (CLIP_S + GAP_S) * TICKS_A_SECOND)
    # A single tempo: 1,000,000 µs per quarter note of TICKS_A_SECOND ticks, so that a tick is a fixed time.
    track = b"\x00\xff\x51\x03" + (1_000_000).to_bytes(3, "big")
    last = 0
    for tick, _, message in sorted(events, key=lambda event: event[:2]):
        track += _variable_length(tick - last) + message
        last = tick
    track += _variable_length(max(0, end - last)) + b"\xff\x2f\x00"
    header = b"MThd" + struct.pack(">IHHH", 6, 0, 1, TICKS_A_SECOND)
    return header + b"MTrk" + struct.pack(">I", len(track)) + track


def render(scores: Sequence[Score], sound_font: str = DEFAULT_SOUND_FONT) -> NDArray[np.int16]:
    """Audio of the scores: int16 ``[len(scores), CLIP_SAMPLES]``, mono 32 kHz, each clip's peak at ``PEAK``.

    Raises:
        RuntimeError: FluidSynth is missing or failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        midi, wav = Path(folder, "scores.mid"), Path(folder, "scores.wav")
        midi.write_bytes(midi_file(scores))
        command = ["fluidsynth", "-ni", "-q", "-r", str(SAMPLE_RATE_HZ), "-g", "0.6", "-R", "0", "-C", "0"]
        command += ["-O", "s16", "-T", "wav", "-F", str(wav), sound_font, str(midi)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            raise RuntimeError(
                f"fluidsynth failed to render with {sound_font}: {error}; install fluidsynth and fluid-soundfont-gm"
            ) from error
        audio, _ = sf.read(str(wav), dtype="float32", always_2d=True)
    mono = audio.mean(axis=1)
    clips = np.zeros((len(scores), CLIP_SAMPLES), np.int16)
    for index in range(len(scores)):
        start = round(index * (CLIP_S + GAP_S) * SAMPLE_RATE_HZ)
        clip = mono[start : start + CLIP_SAMPLES]
        clips[index, : len(clip)] = (clip / max(float(np.abs(clip).max()), 1e-3) * PEAK * 32767).astype(np.int16)
    return clips


def render_shard(
    seed: int, index: int, out: Path, name: str, num_clips: int = CLIPS_A_SHARD, *, grouped: bool = False
) -> Path:
    """Writes shard ``index`` of a seed unless it exists; returns the path of its ``.npy``.

    ``grouped``: render every melody in every style; the shard holds as many whole groups as fit into ``num_clips``.
    """
    path = out / f"{name}_{index:04d}.npy"
    if path.exists():
        return path
    if grouped:
        rng = random.Random(f"{seed}/grouped/{index}")
        names = [f"{seed}/{index}/{number}" for number in range(num_clips // len(STYLES))]
        scores = [score for group in names for score in compose_in_every_style(rng, group)]
    else:
        rng = random.Random(f"{seed}/{index}")
        scores = [compose(rng) for _ in range(num_clips)]
    clips = render(scores)
    path.with_suffix(".json").write_text(json.dumps([asdict(score.label) for score in scores]))
    temporary = out / f".{name}_{index:04d}.npy"
    np.save(temporary, clips)
    os.replace(temporary, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, required=True, help="use different seeds for held-out and training data")
    parser.add_argument("--clips", type=int, required=True, help="rounded up to whole shards")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="train")
    parser.add_argument("--grouped", action="store_true", help="every melody in every style")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    num_a_shard = CLIPS_A_SHARD // len(STYLES) * len(STYLES) if arguments.grouped else CLIPS_A_SHARD
    for index in range(-(-arguments.clips // num_a_shard)):
        path = render_shard(arguments.seed, index, arguments.out, arguments.name, grouped=arguments.grouped)
        print(path, flush=True)


if __name__ == "__main__":
    main()
