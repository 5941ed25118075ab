"""Malformed inputs: truncated, bit-flipped or mislabelled recordings, and mutated bytes of any kind.

Deterministic, given a `random.Random`. Sends nothing.
"""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Callable

import numpy as np
import soundfile

RATE = 16000
FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "wav-float": ("WAV", "FLOAT"),
    "flac": ("FLAC", "PCM_16"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "aiff": ("AIFF", "PCM_16"),
}
BOMB_S = 1800
"""Silence of this duration takes only a few kilobytes in compressed formats."""
BLOCK = 1 << 16
INTERESTING = (0, 1, 2, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def recordings(rng: random.Random) -> dict[str, bytes]:
    """A short tone in each format, and one in stereo."""
    time_s = np.arange(int(0.4 * RATE)) / RATE
    tune = 0.4 * np.sin(2 * np.pi * rng.uniform(110, 440) * time_s)
    made = {name: _encoded(tune, RATE, *how) for name, how in FORMATS.items()}
    made["stereo"] = _encoded(np.stack([tune, -tune], axis=-1), RATE, "WAV", "PCM_16")
    return made


def bombs() -> dict[str, bytes]:
    """Small files that decode to half an hour."""
    silence = np.zeros(BOMB_S * 8000, dtype=np.int16)
    return {f"bomb-{name}": _encoded(silence, 8000, *FORMATS[name]) for name in ("flac", "ogg", "mp3")}


def _encoded(samples: np.ndarray, rate: int, container: str, subtype: str) -> bytes:
    out = io.BytesIO()
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    with soundfile.SoundFile(out, "w", rate, channels, subtype, format=container) as file:
        for start in range(0, len(samples), BLOCK):  # the Vorbis encoder may crash on large writes
            file.write(samples[start : start + BLOCK])
    return out.getvalue()


def mutated(data: bytes, rng: random.Random) -> bytes:
    """`data` with one to four kinds of damage."""
    for _ in range(rng.randint(1, 4)):
        data = rng.choice(DAMAGES)(data, rng)
    return data


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randint(0, len(data))]


def _flip(data: bytes, rng: random.Random) -> bytes:
    """Flip bits anywhere, or in the header only."""
    if not data:
        return data
    changed, reach = bytearray(data), rng.choice([len(data), min(len(data), 64)])
    for _ in range(rng.choice([1, 1, 3, 30])):
        changed[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _number(data: bytes, rng: random.Random) -> bytes:
    """Overwrite a header field with a number that is often mishandled."""
    width = rng.choice([1, 2, 4])
    if len(data) < width:
        return data
    at = rng.randint(0, min(len(data), 64) - width)
    value = rng.choice(INTERESTING) & (256**width - 1)
    return data[:at] + value.to_bytes(width, rng.choice(["little", "big"])) + data[at + width :]  # type: ignore[arg-type]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randint(0, len(data))
    return data[:at] + rng.randbytes(rng.choice([1, 4, 100])) + data[at:]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start = rng.randint(0, len(data))
    return data + data[start : start + 4096]


def _other_magic(data: bytes, rng: random.Random) -> bytes:
    magic = rng.choice([b"RIFF", b"fLaC", b"OggS", b"ID3\x04", b"\xff\xfb", b"FORM", b"PK\x03\x04", b"\x1f\x8b", b"#!"])
    return magic + data[len(magic) :]


def _large_tag(data: bytes, rng: random.Random) -> bytes:
    """Prepend an ID3 tag that claims to be 256 MiB long."""
    return b"ID3\x04\x00\x00" + struct.pack(">I", 0x7F7F7F7F) + data


DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _cut,
    _flip,
    _flip,
    _number,
    _number,
    _insert,
    _repeat,
    _other_magic,
    _large_tag,
)
