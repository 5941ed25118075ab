"""Synthesises a melody recording, for trying out melody conditioning without a recording at hand.

The notes are the theme of the last movement of Beethoven's ninth symphony (1824, public domain), played by a small
plucked-string synthesiser.

    python -m musicgen.demo.tune out/ode-to-joy.wav
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import soundfile as sf
from numpy.typing import NDArray

SAMPLE_RATE_HZ = 32000
BEAT_S = 30.0 / 64
"""Sixteen bars of four beats in 30 s, the window of the melody models."""
TONIC = 75
"""MIDI pitch of the first degree (E flat), which puts the tune in the register of the demo model's training data."""
SCALE = {-3: -5, 1: 0, 2: 2, 3: 4, 4: 5, 5: 7}
"""Degree of the scale → semitones above the tonic; −3 is the fifth below."""

Notes = tuple[tuple[int, float], ...]
_START: Notes = tuple((degree, 1) for degree in (3, 3, 4, 5, 5, 4, 3, 2, 1, 1, 2, 3))
_OPEN: Notes = (*_START, (3, 1.5), (2, 0.5), (2, 2))
_CLOSED: Notes = (*_START, (2, 1.5), (1, 0.5), (1, 2))
_MIDDLE: Notes = (
    *((2, 1), (2, 1), (3, 1), (1, 1), (2, 1), (3, 0.5), (4, 0.5), (3, 1), (1, 1)),
    *((2, 1), (3, 0.5), (4, 0.5), (3, 1), (2, 1), (1, 1), (2, 1), (-3, 2)),
)
ODE_TO_JOY: Notes = (*_OPEN, *_CLOSED, *_MIDDLE, *_CLOSED)
"""(degree of the scale, beats) of each note."""

HARMONICS = (1.0, 0.5, 0.3, 0.15, 0.08)
"""Amplitudes of the partials; each decays faster than the one below it."""
DECAY_HZ, ATTACK_S, PEAK = 1.6, 0.008, 0.7


def pluck(pitch: int, duration_s: float) -> NDArray[np.float64]:
    """One note, `[duration_s · SAMPLE_RATE_HZ]` samples: decaying partials, faded out at the end."""
    times_s = np.arange(round(duration_s * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    frequency_hz = 440.0 * 2 ** ((pitch - 69) / 12)
    wave = np.zeros_like(times_s)
    for number, amplitude in enumerate(HARMONICS, 1):
        wave += amplitude * np.exp(-DECAY_HZ * number * times_s) * np.sin(2 * np.pi * number * frequency_hz * times_s)
    fade = np.minimum(times_s, duration_s - times_s) / ATTACK_S
    return np.asarray(wave * np.clip(fade, 0.0, 1.0))


def melody() -> NDArray[np.float32]:
    """The tune: 30 s, mono, `SAMPLE_RATE_HZ`, peak `PEAK`."""
    wave = np.concatenate([pluck(TONIC + SCALE[degree], beats * BEAT_S) for degree, beats in ODE_TO_JOY])
    return np.asarray(wave * (PEAK / np.abs(wave).max()), dtype=np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tune to a WAV file.")
    parser.add_argument("path", type=Path)
    path: Path = parser.parse_args().path
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, melody(), SAMPLE_RATE_HZ, subtype="PCM_16")
    print(f"{path}: the melody of the Ode to Joy, {len(melody()) / SAMPLE_RATE_HZ:g} s")


if __name__ == "__main__":
    main()
