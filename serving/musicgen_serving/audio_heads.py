"""How files of a known length begin, before any of their audio is there.

libsndfile writes lengths into the beginning of a file at its end, which a stream cannot take back. Knows nothing of
streams.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from musicgen.audio_encode import encode_audio

_MPEG_1_RATE = 32000
"""Hz. From here on an MPEG frame has 1152 samples, below it 576 (MPEG-2, ISO 13818-3)."""
_LAME_DELAY = 576
"""Samples of silence before an mp3's first, and at least so many after its last: ENCDELAY in LAME's lame.h."""


def wav_head(sample_rate: int, channels: int, num_samples: int, metadata: Mapping[str, str]) -> bytes:
    """What `encode_audio` writes before the samples of a wav of `num_samples` samples a channel."""
    shortest = encode_audio(torch.zeros(channels, 1), sample_rate, "wav", metadata=metadata)
    at = 12
    while shortest[at : at + 4] != b"data":
        at += 8 + int.from_bytes(shortest[at + 4 : at + 8], "little")
    data_bytes = num_samples * channels * 2
    riff_bytes = at + data_bytes  # all after the 8 bytes "RIFF" and size: the rest of the header, and the data
    return b"RIFF" + riff_bytes.to_bytes(4, "little") + shortest[8 : at + 4] + data_bytes.to_bytes(4, "little")


def flac_head(begun: bytes, num_samples: int) -> bytes:
    """The beginning of a flac file with its length, which libFLAC fills in only at the end.

    STREAMINFO begins at byte 8; the number of samples are the 36 bits at its bit 108 (RFC 9639, section 8.2).
    """
    field = int.from_bytes(begun[21:26], "big")
    kept = field >> 36 << 36
    return begun[:21] + (kept | num_samples).to_bytes(5, "big") + begun[26:]


def mp3_head(sample_rate: int, channels: int, num_samples: int, metadata: Mapping[str, str]) -> bytes:
    """What `encode_audio` writes before the first frame with audio: ID3 tags and LAME's "Info" frame.

    That frame tells players the length, and how much of the encoder's delay they are to leave out. Its fields are those
    of LAME's VbrTag.c; the checksum of the audio is left 0, as nobody can know it yet.
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
    num_padded = -(-(num_frames - 1) * part // (8 * sample_rate))  # frames are a byte longer when a byte is owed
    num_bytes = (1 + num_frames) * info_bytes + num_padded
    tag[8:12] = num_frames.to_bytes(4, "big")
    tag[12:16] = tag[148:152] = num_bytes.to_bytes(4, "big")
    tag[16:116] = bytes(256 * percent // 100 for percent in range(100))  # where in the file each percent of it begins
    tag[141:144] = (_LAME_DELAY << 12 | padding).to_bytes(3, "big")
    tag[152:154] = bytes(2)
    tag[154:156] = crc16(shortest[frame_at:tag_at] + tag[:154]).to_bytes(2, "big")
    return shortest[:tag_at] + tag + shortest[tag_at + len(tag) : frame_at + info_bytes]


def _id3_bytes(mp3: bytes) -> int:
    """Length of the ID3v2 tag at the beginning (id3.org, section 3.1: four times seven bits); 0 without one."""
    if mp3[:3] != b"ID3":
        return 0
    return 10 + sum(byte << 7 * place for place, byte in enumerate(reversed(mp3[6:10])))


def crc16(data: bytes) -> int:
    """The checksum of an "Info" frame: polynomial 0x8005, the lowest bit first, from 0."""
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xA001 if crc & 1 else 0)
    return crc
