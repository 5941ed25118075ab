"""Samples to the bytes of a response: whole, or as a stream that decodes to the same.

The conversion of float to 16 bits is `audio_encode.to_frames` everywhere: so a wav is its pcm16 with a header, and what
a flac decodes to. A streamed mp3 or ogg decodes to the samples of the whole one, too. Of opus that is not promised: it
is resampled in parts, which is the same only to float rounding.
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
from musicgen_serving.audio_heads import flac_head, mp3_head, wav_head

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
_OPUS_PAGE_MS = 100.0
"""Pages leave the encoder whole, by default each second: late for who listens. Shorter ones cost bytes, 3 % here."""
_SET_OGG_PAGE_LATENCY_MS = 0x1302


def media_type(format: str, sample_rate: int, channels: int) -> str:
    if format in _RAW_ENCODINGS:
        return f"audio/pcm; encoding={_RAW_ENCODINGS[format]}; rate={sample_rate}; channels={channels}"
    return _MEDIA_TYPES[format]


def file_rate(format: str, sample_rate: int) -> int:
    """Rate in Hz of what is given for samples at `sample_rate`."""
    return FORMATS[format].rate_for(sample_rate) if format in FORMATS else sample_rate


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
    """An encoder for exactly `num_samples` samples a channel, in any of the API's formats."""
    if format == "wav":
        return _RawStream("pcm16", wav_head(sample_rate, channels, num_samples, metadata))
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
    """A file by libsndfile, into a sink that forgets what was sent."""

    def __init__(
        self, format: str, sample_rate: int, channels: int, num_samples: int, metadata: Mapping[str, str]
    ) -> None:
        rate = file_rate(format, sample_rate)
        self._format, self._subtype = format, FORMATS[format].subtype
        self._resampler = StreamResampler(sample_rate, rate)
        self._num_samples = resampled_len(num_samples, sample_rate, rate)
        self._head = mp3_head(rate, channels, self._num_samples, metadata) if format == "mp3" else b""
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
            return flac_head(taken, self._num_samples)
        return self._head + taken[len(self._head) :]  # as long as what LAME has in its place


def _set_page_latency(file: soundfile.SoundFile, latency_ms: float) -> None:
    """Let an Ogg file with Opus write a page after so many milliseconds, at least 50.

    A command of libsndfile's, SFC_SET_OGG_PAGE_LATENCY_MS, for which soundfile has no name; what carries it out there
    is not public either.
    """
    value = soundfile._ffi.new("double *", latency_ms)
    soundfile._snd.sf_command(file._file, _SET_OGG_PAGE_LATENCY_MS, value, soundfile._ffi.sizeof("double"))


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
