"""Validation of uploaded recordings: format, size, duration. Shared by both ingresses.

Looks at the content only, never at file names or content types, and opens no paths. Reads headers without decoding, so
that a 1 kB file that claims to hold ten hours is rejected here.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from contextlib import contextmanager

import soundfile

from musicgen.errors import InvalidRequestError
from musicgen.waveform import MAX_CHANNELS, MAX_SAMPLE_RATE, MAX_SAMPLES_PER_S, MIN_SAMPLE_RATE
from musicgen_serving.errors import TooLargeError
from musicgen_serving.settings import LimitSettings

_CONTAINERS = {"wav": ("WAV", "WAVEX", "RF64"), "flac": ("FLAC",), "mp3": ("MP3",), "ogg": ("OGG",), "aiff": ("AIFF",)}
"""Format by magic bytes → formats that libsndfile may report."""
_EXPECTED = "a wav, flac, mp3, ogg, opus or aiff file"


class _Content(io.BytesIO):
    """A file in memory that tolerates out-of-range seeks, which libsndfile makes if a header is damaged."""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: len(self.getbuffer())}[whence]
        return super().seek(min(max(0, base + offset), 2**62))


def sniff(content: bytes) -> str | None:
    """Audio format by magic bytes: `wav`, `flac`, `mp3`, `ogg` or `aiff`; None: unknown."""
    head = content[:12]
    if head[:4] in (b"RIFF", b"RIFX", b"RF64") and head[8:12] == b"WAVE":
        return "wav"
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return "aiff"
    if head[:4] == b"fLaC":
        return "flac"
    if head[:4] == b"OggS":
        return "ogg"
    # MPEG audio: 11 set bits, then a version and a layer that are not reserved values.
    is_frame = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 0x18 != 8 and head[1] & 6
    return "mp3" if head[:3] == b"ID3" or is_frame else None


async def check_recording(content: bytes, param: str, limits: LimitSettings) -> None:
    """Validate a recording against the limits. Reads its header in a thread.

    Args:
        param: name of the field, for the error.
    Raises:
        TooLargeError: more bytes than `limits.max_file_bytes`.
        InvalidRequestError: not an audio file, unreadable, empty, too long, too many channels, or too large when
            decoded.
    """
    if len(content) > limits.max_file_bytes:
        message = f"{param}: expected at most {limits.max_file_bytes} bytes, got {len(content)}; trim or compress it"
        raise TooLargeError(message, param=param)
    kind = sniff(content)
    if kind is None:
        got = "no bytes" if not content else "an unknown format"
        raise InvalidRequestError(_EXPECTED, got, param=param)
    await asyncio.to_thread(_check_header, content, kind, param, limits.max_recording_s)


@contextmanager
def naming(param: str) -> Iterator[None]:
    """Makes an InvalidRequestError about a recording name its field: the library names its own arguments."""
    try:
        yield
    except InvalidRequestError as error:
        raise InvalidRequestError(error.expected, error.got, error.hint, param=param) from error


def length_s(content: bytes) -> float | None:
    """Duration of a recording in seconds from its header; None: only approximate (MPEG), or unreadable."""
    try:
        with soundfile.SoundFile(_Content(content)) as file:
            return None if str(file.format) in _CONTAINERS["mp3"] else int(file.frames) / int(file.samplerate)
    except (soundfile.LibsndfileError, OSError, ValueError, OverflowError, TypeError, ZeroDivisionError):
        return None


def _check_header(content: bytes, kind: str, param: str, max_recording_s: float) -> None:
    try:
        with soundfile.SoundFile(_Content(content)) as file:
            container, frames = str(file.format), int(file.frames)
            rate, channels = int(file.samplerate), int(file.channels)
    except (soundfile.LibsndfileError, OSError, ValueError, OverflowError, TypeError) as error:
        raise InvalidRequestError(_EXPECTED, "an unreadable file", "it may be damaged", param=param) from error
    if container not in _CONTAINERS[kind]:
        raise InvalidRequestError(_EXPECTED, "an unsupported format", param=param)
    if not MIN_SAMPLE_RATE <= rate <= MAX_SAMPLE_RATE:
        expected = f"a sample rate of {MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE} Hz"
        raise InvalidRequestError(expected, f"{rate} Hz", param=param)
    if not 1 <= channels <= MAX_CHANNELS:
        expected = f"at most {MAX_CHANNELS} channels"
        raise InvalidRequestError(expected, str(channels), "mix it to stereo first", param=param)
    if frames <= 0:
        raise InvalidRequestError("at least one sample", "an empty recording", param=param)
    if frames > max_recording_s * rate:
        got = f"{frames / rate:.0f} s" if frames < 2**50 else "unknown length"
        raise InvalidRequestError(f"at most {max_recording_s:g} s of audio", got, "trim it first", param=param)
    if frames * channels > max_recording_s * MAX_SAMPLES_PER_S:
        expected = f"at most {max_recording_s * MAX_SAMPLES_PER_S:.0f} samples over all channels"
        hint = "mix it to stereo or resample it to a lower rate"
        raise InvalidRequestError(expected, str(frames * channels), hint, param=param)
