"""Samples → response bytes: a whole file, or a stream that decodes to the same samples.

Float to 16-bit conversion is `audio_encode.to_frames` everywhere, so a wav equals its pcm16 plus a header and the
decoded flac. A streamed mp3 or ogg also decodes to the same samples as the whole file. This is not guaranteed for opus:
it is resampled in chunks, which is equal only up to float rounding.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import soundfile
import torch
from torch import Tensor

from musicgen.audio_encode import FORMATS, PCM_16, encode_audio, open_encoder, to_frames
from musicgen.loudness import normalize_audio
from musicgen.waveform import StreamResampler, resampled_len
from musicgen_serving.audio_headers import flac_header, mp3_header, wav_header

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
"""Samples per write. The Vorbis encoder's output depends on it: must be the same as in `encode_audio`."""
_OPUS_PAGE_MS = 100.0
"""The encoder emits whole pages, by default one per second, which is too slow for streaming. This costs 3 % in size."""
_SET_OGG_PAGE_LATENCY_MS = 0x1302


def media_type(format: str, sample_rate: int, channels: int) -> str:
    if format in _RAW_ENCODINGS:
        return f"audio/pcm; encoding={_RAW_ENCODINGS[format]}; rate={sample_rate}; channels={channels}"
    return _MEDIA_TYPES[format]


def file_rate(format: str, sample_rate: int) -> int:
    """Sample rate in Hz of the encoded audio."""
    return FORMATS[format].rate_for(sample_rate) if format in FORMATS else sample_rate


def encode_whole(samples: Tensor, sample_rate: int, format: str, metadata: Mapping[str, str]) -> bytes:
    """`[C, N]` float32 → bytes in any of the API's formats."""
    if format in _RAW_ENCODINGS:
        return encode_raw(samples, format)
    return encode_audio(samples, sample_rate, format, metadata=metadata)


def levelled(samples: Tensor, sample_rate: int, loudness_lufs: float | None) -> Tensor:
    """A whole piece `[C, N]` normalized to a loudness; None: unchanged."""
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
    """`[C, N]` float32 → interleaved little-endian samples: f32 unchanged, pcm16 as in a wav."""
    if format == "f32":
        return np.ascontiguousarray(samples.numpy().T, dtype="<f4").tobytes()
    return to_frames(samples, PCM_16).astype("<i2", copy=False).tobytes()


class StreamEncoder(Protocol):
    """Encoder of one stream. A call abandoned in its thread is harmless: nothing is closed underneath it."""

    def encode(self, samples: Tensor) -> bytes:
        """Encode the next `[C, N]` samples; returns the bytes available so far, possibly none."""

    def finish(self) -> bytes:
        """The remaining bytes."""


def stream_encoder(
    format: str, sample_rate: int, channels: int, num_samples: int, metadata: Mapping[str, str]
) -> StreamEncoder:
    """An encoder for exactly `num_samples` samples per channel, in any of the API's formats."""
    if format == "wav":
        return _RawStream("pcm16", wav_header(sample_rate, channels, num_samples, metadata))
    if format in _RAW_ENCODINGS:
        return _RawStream(format, b"")
    return _FileStream(format, sample_rate, channels, num_samples, metadata)


class _RawStream:
    def __init__(self, format: str, header: bytes) -> None:
        self._format, self._header = format, header

    def encode(self, samples: Tensor) -> bytes:
        header, self._header = self._header, b""
        return header + encode_raw(samples, self._format)

    def finish(self) -> bytes:
        return b""


class _FileStream:
    """Encodes with libsndfile, into a sink that discards what was sent."""

    def __init__(
        self, format: str, sample_rate: int, channels: int, num_samples: int, metadata: Mapping[str, str]
    ) -> None:
        rate = file_rate(format, sample_rate)
        self._format, self._subtype = format, FORMATS[format].subtype
        self._resampler = StreamResampler(sample_rate, rate)
        self._num_samples = resampled_len(num_samples, sample_rate, rate)
        self._head = mp3_header(rate, channels, self._num_samples, metadata) if format == "mp3" else b""
        self._sink = _ForgetfulSink()
        self._file = open_encoder(self._sink, rate, channels, format, metadata=metadata)
        if format == "opus":
            _set_page_latency(self._file, _OPUS_PAGE_MS)
        self._block = _OGG_BLOCK if format == "ogg" else 1
        self._waiting: list[Tensor] = []
        self._has_begun = False

    def encode(self, samples: Tensor) -> bytes:
        self._waiting.append(self._resampler.resample(samples))
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
        last = torch.cat([*self._waiting, self._resampler.finish()], dim=-1)
        self._file.write(to_frames(last, self._subtype))
        self._file.close()
        return self._take()

    def _take(self) -> bytes:
        taken = self._sink.take()
        if self._has_begun or not taken:
            return taken
        self._has_begun = True
        if self._format == "flac":
            return flac_header(taken, self._num_samples)
        return self._head + taken[len(self._head) :]  # same length as LAME's head


def _set_page_latency(file: soundfile.SoundFile, latency_ms: float) -> None:
    """Set the page duration of an Ogg Opus file in milliseconds, at least 50.

    This is libsndfile's SFC_SET_OGG_PAGE_LATENCY_MS, which soundfile does not expose, hence the private members.
    """
    value = soundfile._ffi.new("double *", latency_ms)
    soundfile._snd.sf_command(file._file, _SET_OGG_PAGE_LATENCY_MS, value, soundfile._ffi.sizeof("double"))


class _ForgetfulSink:
    """File object for libsndfile. Bytes already taken cannot be rewritten; later corrections to them are dropped."""

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
