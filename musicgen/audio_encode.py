"""Encodes audio as wav, flac, mp3, ogg or opus, with metadata.

Defines the limits of each format and the metadata of generated files. Paths and levels are handled elsewhere.
"""

from __future__ import annotations

import io
import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import soundfile
from torch import Tensor

from musicgen.arguments import checked_float
from musicgen.errors import InvalidRequestError
from musicgen.types import SamplingParams
from musicgen.waveform import MAX_CHANNELS, Waveform, check_sample_rate, resample, validate_waveform

SOFTWARE = "musicgen-serve"
MACHINE_MADE = "Machine-made music"
_TAGS = ("title", "artist", "album", "date", "genre", "copyright", "license", "comment", "software")
_MAX_TAG_CHARS = 1000
_DEFAULT_SAMPLING = SamplingParams()
_WRITE_BLOCK = 65536
"""Samples per write: the stack use of libsndfile's Vorbis encoder grows with it, and can overflow on long pieces."""


PCM_16 = "PCM_16"


@dataclass(frozen=True, slots=True)
class FileFormat:
    """How libsndfile writes a format."""

    container: str
    subtype: str
    sample_rates: tuple[int, ...] = ()
    """Supported rates in Hz; empty: any."""
    max_channels: int = MAX_CHANNELS

    def rate_for(self, sample_rate: int) -> int:
        """The rate in Hz to encode `sample_rate` at: the next higher supported one, or else the highest."""
        if not self.sample_rates or sample_rate in self.sample_rates:
            return sample_rate
        return min((rate for rate in self.sample_rates if rate >= sample_rate), default=max(self.sample_rates))


FORMATS: Mapping[str, FileFormat] = {
    "wav": FileFormat("WAV", PCM_16),
    "flac": FileFormat("FLAC", PCM_16),
    "mp3": FileFormat("MP3", "MPEG_LAYER_III", (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000), 2),
    "ogg": FileFormat("OGG", "VORBIS"),
    "opus": FileFormat("OGG", "OPUS", (48000,), 2),
}


def generation_metadata(
    model: str, seed: int, *, settings: Mapping[str, object] | None = None, license: str = "", prompt: str = ""
) -> dict[str, str]:
    """Metadata of a generated file: that it was generated, by which model, and from what.

    Args:
        settings: what else reproduces the piece, by name; see `changed_sampling`.
    """
    parts = [MACHINE_MADE, f"model: {model}", f"seed: {seed}"]
    parts += [f"{name}: {value}" for name, value in (settings or {}).items()]
    parts += [f"licence of the weights: {license}"] if license else []
    parts += [f"prompt: {prompt}"] if prompt else []
    return {"comment": "; ".join(parts), "software": SOFTWARE}


def changed_sampling(sampling: SamplingParams) -> dict[str, object]:
    """The parameters that are not MusicGen's defaults, except for the seed."""
    names = [field.name for field in fields(SamplingParams) if field.name != "seed"]
    return {name: value for name in names if (value := getattr(sampling, name)) != getattr(_DEFAULT_SAMPLING, name)}


def encode_audio(
    wav: Waveform,
    sample_rate: int,
    format: str = "wav",
    *,
    mp3_rate: int = 320,
    ogg_rate: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """The contents of an audio file.

    Args:
        wav: `[N]` or `[C, N]` float tensor or NumPy array; clipped to [−1, 1] (see `normalize_audio`).
        sample_rate: in Hz; resampled if the format does not support it (opus: 48 kHz).
        format: a name in `FORMATS`; wav and flac have 16 bits.
        mp3_rate: kbit/s of mp3. ogg_rate: approximate kbit/s of ogg; the default leaves it to the encoder. Both: the
            nearest that the encoder supports.
        metadata: tags (title, artist, album, date, genre, copyright, license, comment, software), as far as the
            format supports them; None only marks the file as generated; empty writes none.
    Raises:
        InvalidRequestError: invalid audio, sample rate, bit rate, format or tag.
    """
    wav = validate_waveform(wav)
    sample_rate = check_sample_rate(sample_rate)
    target = checked_format(format, wav.shape[0])
    file_rate = target.rate_for(sample_rate)
    samples = to_frames(resample(wav.detach().cpu(), sample_rate, file_rate), target.subtype)
    buffer = io.BytesIO()
    with open_encoder(
        buffer, file_rate, wav.shape[0], format, mp3_rate=mp3_rate, ogg_rate=ogg_rate, metadata=metadata
    ) as file:
        for start in range(0, len(samples), _WRITE_BLOCK):
            file.write(samples[start : start + _WRITE_BLOCK])
    return buffer.getvalue()


def open_encoder(
    sink: Any,
    sample_rate: int,
    channels: int,
    format: str,
    *,
    mp3_rate: int = 320,
    ogg_rate: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> soundfile.SoundFile:
    """Open an audio file for writing frames from `to_frames`.

    Args:
        sink: a binary file, or an object with its `write`, `seek`, `tell` and `read`.
        sample_rate: one that the format supports. For the others see `encode_audio`.
    Raises:
        InvalidRequestError: invalid bit rate, format or tag.
    """
    target = checked_format(format, channels)
    tags = _checked_tags(metadata, ascii_only=format == "mp3")
    quality = _quality(format, sample_rate, mp3_rate, ogg_rate)
    file = soundfile.SoundFile(sink, "w", sample_rate, channels, target.subtype, format=target.container, **quality)
    for tag, value in tags.items():
        setattr(file, tag, value)
    return file


def to_frames(wav: Tensor, subtype: str) -> np.ndarray[tuple[int, ...], np.dtype[Any]]:
    """`[C, N]` float → `[N, C]` for libsndfile: clipped to [−1, 1], and rounded to 16 bits where the subtype is.

    libsndfile itself would round 16-bit samples down in wav but to nearest in flac.
    """
    samples = np.ascontiguousarray(wav.clamp(-1, 1).numpy().T)
    if subtype != PCM_16:
        return samples
    return np.clip(np.rint(samples.astype(np.float64) * 32768), -32768, 32767).astype(np.int16)


def checked_format(format: str, channels: int) -> FileFormat:
    if format not in FORMATS:
        raise InvalidRequestError("one of " + ", ".join(FORMATS), repr(format), param="format")
    if channels > FORMATS[format].max_channels:
        expected = f"at most {FORMATS[format].max_channels} channels for {format}"
        raise InvalidRequestError(expected, str(channels), "choose flac or wav", param="format")
    return FORMATS[format]


def _checked_tags(metadata: Mapping[str, str] | None, *, ascii_only: bool) -> dict[str, str]:
    tags = {}
    given = {"comment": MACHINE_MADE, "software": SOFTWARE} if metadata is None else metadata
    for tag, value in given.items():
        if tag not in _TAGS:
            raise InvalidRequestError("a tag of " + ", ".join(_TAGS), repr(tag), param="metadata")
        text = " ".join(str(value).replace("\0", " ").split())[:_MAX_TAG_CHARS]
        if ascii_only:  # libsndfile writes mp3 tags in Latin-1 but passes UTF-8 through
            text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
        tags[tag] = text
    return tags


def _quality(format: str, sample_rate: int, mp3_rate: int, ogg_rate: int | None) -> dict[str, Any]:
    """libsndfile's compression level, 0 (best) to 1 (smallest), for a bit rate.

    mp3: linear between the standard's highest and lowest rates. ogg: by the nominal rates of Vorbis' quality levels.
    """
    if format == "mp3":
        high, low = (320, 32) if sample_rate >= 32000 else (160, 8)
        rate = _checked_bit_rate(mp3_rate, "mp3_rate")
        level = (high - min(max(rate, low), high)) / (high - low)
        return {"bitrate_mode": "CONSTANT", "compression_level": min(level, 0.999)}  # libsndfile refuses 1
    if format == "ogg" and ogg_rate is not None:
        nominal = (64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 500)
        rate = _checked_bit_rate(ogg_rate, "ogg_rate")
        return {"compression_level": 1 - float(np.interp(rate, nominal, np.linspace(0, 1, len(nominal))))}
    return {}


def _checked_bit_rate(rate: object, param: str) -> float:
    return checked_float(rate, lambda x: 0 < x < math.inf, "a positive number of kbit/s", param=param)
