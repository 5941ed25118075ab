"""Headers of audio files of known length, built before any audio is available.

libsndfile fills in lengths when a file is closed, which is too late for a stream.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from musicgen.audio_encode import encode_audio

_MPEG_1_RATE = 32000
"""Hz. From this rate on an MPEG frame has 1152 samples, below it 576 (MPEG-2, ISO 13818-3)."""
_LAME_DELAY = 576
"""Samples of silence before the first sample of an mp3, and at least as many after its last: ENCDELAY in lame.h."""


def wav_header(sample_rate: int, channels: int, num_samples: int, metadata: Mapping[str, str]) -> bytes:
    """The bytes that `encode_audio` writes before the samples of a wav with `num_samples` samples per channel."""
    shortest = encode_audio(torch.zeros(channels, 1), sample_rate, "wav", metadata=metadata)
    at = 12
    while shortest[at : at + 4] != b"data":
        at += 8 + int.from_bytes(shortest[at + 4 : at + 8], "little")
    data_bytes = num_samples * channels * 2
    riff_bytes = at + data_bytes  # everything after "RIFF" and the size: rest of the header, and data
    return b"RIFF" + riff_bytes.to_bytes(4, "little") + shortest[8 : at + 4] + data_bytes.to_bytes(4, "little")


def flac_header(begun: bytes, num_samples: int) -> bytes:
    """The header of a flac file with its length filled in, which libFLAC does only at the end.

    STREAMINFO starts at byte 8; the number of samples is the 36-bit field at its bit 108 (RFC 9639, section 8.2).
    """
    field = int.from_bytes(begun[21:26], "big")
    kept = field >> 36 << 36
    return begun[:21] + (kept | num_samples).to_bytes(5, "big") + begun[26:]


def mp3_header(sample_rate: int, channels: int, num_samples: int, metadata: Mapping[str, str]) -> bytes:
    """The bytes that `encode_audio` writes before the first audio frame: ID3 tags and LAME's "Info" frame.

    The Info frame holds the length and the encoder delay to skip. Fields as in LAME's VbrTag.c; the audio checksum is
    not known yet and left 0.
    """
    shortest = encode_audio(torch.zeros(channels, 1), sample_rate, "mp3", metadata=metadata)
    frame_at = _id3_bytes(shortest)
    tag_at = shortest.index(b"Info", frame_at)
    tag = bytearray(shortest[tag_at : tag_at + 156])
    frame_len = 1152 if sample_rate >= _MPEG_1_RATE else 576
    padding = frame_len - (num_samples + _LAME_DELAY) % frame_len
    padding += frame_len if padding < _LAME_DELAY else 0
    num_frames = (_LAME_DELAY + num_samples + padding) // frame_len
    bits_per_s = 1000 * int.from_bytes(tag[146:148], "big")
    info_bytes, part = divmod(frame_len * bits_per_s, 8 * sample_rate)
    num_padded = -(-(num_frames - 1) * part // (8 * sample_rate))  # frames with a padding byte
    num_bytes = (1 + num_frames) * info_bytes + num_padded
    tag[8:12] = num_frames.to_bytes(4, "big")
    tag[12:16] = tag[148:152] = num_bytes.to_bytes(4, "big")
    tag[16:116] = bytes(256 * percent // 100 for percent in range(100))  # seek table: linear
    tag[141:144] = (_LAME_DELAY << 12 | padding).to_bytes(3, "big")
    tag[152:154] = bytes(2)
    tag[154:156] = crc16(shortest[frame_at:tag_at] + tag[:154]).to_bytes(2, "big")
    return shortest[:tag_at] + tag + shortest[tag_at + len(tag) : frame_at + info_bytes]


def _id3_bytes(mp3: bytes) -> int:
    """Length of the leading ID3v2 tag (id3.org, section 3.1: four times seven bits); 0 if absent."""
    if mp3[:3] != b"ID3":
        return 0
    return 10 + sum(byte << 7 * place for place, byte in enumerate(reversed(mp3[6:10])))


def crc16(data: bytes) -> int:
    """Checksum of an "Info" frame: polynomial 0x8005, LSB first, initial value 0."""
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xA001 if crc & 1 else 0)
    return crc
