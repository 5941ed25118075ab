"""Samples to the bytes of a response: whole, or as a stream that decodes to exactly the same.

The conversion of float to 16 bits is `audio_encode.to_frames` everywhere: so a wav is its pcm16 with a header, and what
a flac decodes to.
mp3 and opus do not stream: an mp3's first frame tells its delay and length and can only be written at the end, and
opus needs another sample rate, whose filter needs the whole piece to give the same samples.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import soundfile
import torch
from torch import Tensor

from musicgen.audio_encode import FORMATS, PCM_16, encode_audio, to_frames
from musicgen.loudness import normalize_audio

STREAM_FORMATS = ("wav", "flac", "ogg", "pcm16", "f32")
EVENT_FORMATS = ("pcm16", "f32")
_MEDIA_TYPES = {
    "wav": "audio/wav",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "ogg": "audio/ogg",
    "opus": "audio/ogg; codecs=opus",
}
_RAW_ENCODINGS = {"pcm16": "s16le", "f32": "f32le"}
_OGG_BLOCK = 65536
"""Samples. The Vorbis encoder's output depends on how many samples come at once: the same as in `encode_audio`."""


def media_type(format: str, sample_rate: int, channels: int) -> str:
    if format in _RAW_ENCODINGS:
        return f"audio/pcm; encoding={_RAW_ENCODINGS[format]}; rate={sample_rate}; channels={channels}"
    return _MEDIA_TYPES[format]


def file_rate(format: str, sample_rate: int) -> int:
    """Rate in Hz of what `encode_whole` gives for samples at `sample_rate`."""
    rates = FORMATS[format].sample_rates if format in FORMATS else ()
    if not rates or sample_rate in rates:
        return sample_rate
    return min((rate for rate in rates if rate >= sample_rate), default=max(rates))


def encode_whole(samples: Tensor, sample_rate: int, format: str, metadata: Mapping[str, str]) -> bytes:
    """`[C, N]` float32 → bytes in any of the API's formats."""
    if format in _RAW_ENCODINGS:
        return encode_raw(samples, format)
    return encode_audio(samples, sample_rate, format, metadata=metadata)


def levelled(samples: Tensor, sample_rate: int, loudness_lufs: float | None) -> Tensor:
    """`[C, N]` of a whole piece at that loudness; None: as it is."""
    if loudness_lufs is None:
        return samples
    return normalize_audio(
        samples,
        strategy="loudness",
        loudness_headroom_db=-loudness_lufs,
        sample_rate=sample_rate,
        log_clipping=False,
    )


def encode_raw(samples: Tensor, format: str) -> bytes:
    """`[C, N]` float32 → interleaved little-endian samples: f32 as they are, pcm16 as in a wav."""
    if format == "f32":
        return np.ascontiguousarray(samples.numpy().T, dtype="<f4").tobytes()
    return to_frames(samples, PCM_16).astype("<i2", copy=False).tobytes()


class StreamEncoder(Protocol):
    """One stream. A call that was abandoned in its thread harms nobody: nothing is closed under it."""

    def encode(self, samples: Tensor) -> bytes:
        """The next `[C, N]` samples; returns what can be sent already, perhaps nothing."""

    def finish(self) -> bytes:
        """The rest."""


def stream_encoder(
    format: str, sample_rate: int, channels: int, num_samples: int, metadata: Mapping[str, str]
) -> StreamEncoder:
    """An encoder for exactly `num_samples` samples a channel; `format` is one of `STREAM_FORMATS`."""
    if format == "wav":
        return _RawStream("pcm16", wav_header(sample_rate, channels, num_samples, metadata))
    if format in _RAW_ENCODINGS:
        return _RawStream(format, b"")
    return _FileStream(format, sample_rate, channels, num_samples, metadata)


def wav_header(sample_rate: int, channels: int, num_samples: int, metadata: Mapping[str, str]) -> bytes:
    """What `encode_audio` writes before the samples of a wav of `num_samples` samples a channel."""
    shortest = encode_audio(torch.zeros(channels, 1), sample_rate, "wav", metadata=metadata)
    at = 12
    while shortest[at : at + 4] != b"data":
        at += 8 + int.from_bytes(shortest[at + 4 : at + 8], "little")
    data_bytes = num_samples * channels * 2
    riff_bytes = at + data_bytes  # all after the 8 bytes "RIFF" and size: the rest of the header, and the data
    return b"RIFF" + riff_bytes.to_bytes(4, "little") + shortest[8 : at + 4] + data_bytes.to_bytes(4, "little")


class _RawStream:
    def __init__(self, format: str, header: bytes) -> None:
        self._format, self._header = format, header

    def encode(self, samples: Tensor) -> bytes:
        header, self._header = self._header, b""
        return header + encode_raw(samples, self._format)

    def finish(self) -> bytes:
        return b""


class _FileStream:
    """flac and ogg, by libsndfile into a sink that forgets what was sent."""

    def __init__(
        self, format: str, sample_rate: int, channels: int, num_samples: int, metadata: Mapping[str, str]
    ) -> None:
        kind = FORMATS[format]
        self._subtype = kind.subtype
        self._sink = _ForgetfulSink()
        self._file = soundfile.SoundFile(self._sink, "w", sample_rate, channels, kind.subtype, format=kind.container)
        for tag, value in metadata.items():
            setattr(self._file, tag, value)
        self._block = _OGG_BLOCK if format == "ogg" else 1
        self._waiting: list[Tensor] = []
        self._num_samples = num_samples
        self._must_patch = format == "flac"

    def encode(self, samples: Tensor) -> bytes:
        self._waiting.append(samples)
        num_waiting = sum(part.shape[-1] for part in self._waiting)
        if num_waiting < self._block:
            return b""
        joined = torch.cat(self._waiting, dim=-1)
        num_whole = num_waiting - num_waiting % self._block
        for start in range(0, num_whole, max(self._block, 4096)):
            part = joined[:, start : min(num_whole, start + max(self._block, 4096))]
            self._file.write(to_frames(part, self._subtype))
        self._waiting = [joined[:, num_whole:]] if num_whole < num_waiting else []
        return self._take()

    def finish(self) -> bytes:
        for part in self._waiting:
            self._file.write(to_frames(part, self._subtype))
        self._file.close()
        return self._take()

    def _take(self) -> bytes:
        taken = self._sink.take()
        if self._must_patch and taken:
            self._must_patch = False
            return _with_num_samples(taken, self._num_samples)
        return taken


def _with_num_samples(flac: bytes, num_samples: int) -> bytes:
    """The beginning of a flac file with its length, which libFLAC fills in only at the end.

    STREAMINFO begins at byte 8; the number of samples are the 36 bits at its bit 108 (RFC 9639, section 8.2).
    """
    field = int.from_bytes(flac[21:26], "big")
    kept = field >> 36 << 36
    return flac[:21] + (kept | num_samples).to_bytes(5, "big") + flac[26:]


class _ForgetfulSink:
    """A file for libsndfile to write. What has been taken cannot be written again; such corrections are dropped."""

    def __init__(self) -> None:
        self._kept = bytearray()
        self._num_taken = 0
        self._at = 0

    def write(self, data: bytes) -> int:
        start = self._at - self._num_taken
        if start >= 0:
            self._kept[start : start + len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        end = self._num_taken + len(self._kept)
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: end}[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, num_bytes: int) -> bytes:
        return b""

    def take(self) -> bytes:
        taken = bytes(self._kept)
        self._num_taken += len(taken)
        self._kept.clear()
        return taken
