"""Checks that audio files have the expected sample rate and length, are finite and are not silent.

python -m musicgen.demo.check --seconds 8 --rate 32000 out/*.wav
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import soundfile as sf

SILENT_RMS = 1e-3
"""−60 dBFS; files below this count as silent."""
TOLERANCE_S = 0.05


def check(path: Path, rate_hz: int, duration_s: float) -> tuple[str, bool]:
    """A one-line report on a file, and whether it passes."""
    try:
        samples, rate = sf.read(path, always_2d=True)
    except (OSError, sf.LibsndfileError) as error:
        return f"{path}: cannot be read ({error})", False
    seconds = len(samples) / rate
    finite = bool(np.isfinite(samples).all())
    rms = float(np.sqrt(np.mean(np.square(samples)))) if samples.size else 0.0
    verdicts = {
        f"{rate} Hz": rate == rate_hz,
        f"{seconds:.2f} s": abs(seconds - duration_s) <= TOLERANCE_S,
        "finite" if finite else "not finite": finite,
        f"rms {rms:.3f}": finite and rms >= SILENT_RMS,
    }
    words = [what if good else f"{what} (WRONG)" for what, good in verdicts.items()]
    return f"{path}: {', '.join(words)}", all(verdicts.values())


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the sample rate, length and level of audio files.")
    parser.add_argument("--rate", type=int, required=True, metavar="HZ")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("files", nargs="+", type=Path)
    arguments = parser.parse_args()
    results = [check(path, arguments.rate, arguments.seconds) for path in arguments.files]
    for line, good in results:
        print("ok   " if good else "WRONG", line)
    return 0 if all(good for _, good in results) else 1


if __name__ == "__main__":
    sys.exit(main())
