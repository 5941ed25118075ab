"""The beginnings of files, beside those that libsndfile writes when it knows everything."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
import torch
from musicgen_serving.audio_headers import crc16, flac_header, mp3_header, wav_header

from musicgen.audio_encode import encode_audio, generation_metadata

TAGS = generation_metadata("Info", 3, license="MIT", prompt="two words " * 20)
LENGTHS = (1, 2, 575, 576, 577, 1151, 1152, 1153, 1728, 31_999, 100_000)


def noise(channels: int, num_samples: int) -> torch.Tensor:
    return 0.3 * torch.randn(channels, num_samples, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("num_samples", LENGTHS)
def test_wav(num_samples: int) -> None:
    head = wav_header(32000, 2, num_samples, TAGS)
    assert encode_audio(noise(2, num_samples), 32000, "wav", metadata=TAGS)[: len(head)] == head


def test_flac() -> None:
    whole = encode_audio(noise(1, 100_000), 32000, "flac", metadata=TAGS)
    unknown = whole[:21] + bytes([whole[21] & 0xF0, 0, 0, 0, 0]) + whole[26:]
    assert unknown != whole
    assert flac_header(unknown, 100_000) == whole


@pytest.mark.parametrize("metadata", [{}, TAGS], ids=["untagged", "tagged"])
@pytest.mark.parametrize(("rate", "channels"), [(32000, 1), (32000, 2), (44100, 2), (16000, 1), (22050, 2), (8000, 1)])
def test_mp3(rate: int, channels: int, metadata: dict[str, str]) -> None:
    for num_samples in LENGTHS:
        whole = encode_audio(noise(channels, num_samples), rate, "mp3", metadata=metadata)
        head = mp3_header(rate, channels, num_samples, metadata)
        tag_at = head.rindex(b"Info")
        frame_at = head.rindex(b"\xff", 0, tag_at)
        mode_at = frame_at + 3  # how stereo was joined in the last frame: nothing to a frame without sound
        assert (head[:mode_at], head[mode_at] & 0xCF) == (whole[:mode_at], whole[mode_at] & 0xCF)
        assert head[mode_at + 1 : tag_at] == whole[mode_at + 1 : tag_at]
        ours, theirs = head[tag_at:], whole[tag_at : len(head)]
        for field, start, end in (("frames, bytes", 0, 16), ("delay and more", 116, 152), ("nothing", 156, None)):
            assert ours[start:end] == theirs[start:end], field
        assert whole[len(head)] == 0xFF, "the next frame"
        for content in (head, whole):
            checksum = int.from_bytes(content[tag_at + 154 : tag_at + 156], "big")
            assert crc16(content[frame_at : tag_at + 154]) == checksum


def test_an_mp3_says_where_each_part_of_it_begins() -> None:
    head = mp3_header(32000, 1, 320_000, {})
    places = head[head.index(b"Info") + 16 :][:100]
    assert list(places) == sorted(places)
    assert (places[0], places[50], places[99]) == (0, 128, 253)


def test_an_mp3_with_its_head_is_as_long_as_it_was() -> None:
    """Without the head, a decoder has LAME's empty frame to go by."""
    samples = noise(1, 40_000)
    whole = encode_audio(samples, 32000, "mp3")
    head = mp3_header(32000, 1, 40_000, {})
    untagged = encode_audio(samples, 32000, "mp3", metadata={})
    ours = soundfile.read(io.BytesIO(head + untagged[len(head) :]))[0]
    assert np.array_equal(ours, soundfile.read(io.BytesIO(whole))[0])
