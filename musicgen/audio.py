"""Audio file I/O: reading every format that libsndfile supports, and audiocraft's `audio_write`.

Audio is `[C, N]` float32 in [−1, 1] everywhere. Facade of all audio functions: validation and resampling are in
`waveform.py`, levels in `loudness.py`, formats in `audio_encode.py`. Independent of models.
"""

from __future__ import annotations

import contextlib
import io
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from musicgen.arguments import checked_path
from musicgen.audio_encode import FORMATS, checked_format, encode_audio, generation_metadata
from musicgen.errors import InvalidRequestError
from musicgen.loudness import STRATEGIES, Strategy, check_strategy, measure_loudness, normalize_audio
from musicgen.waveform import (
    MAX_CHANNELS,
    MAX_SAMPLES_PER_S,
    Waveform,
    check_sample_rate,
    convert_audio,
    convert_channels,
    resample,
    to_mono,
    validate_waveform,
)

__all__ = [
    "FORMATS",
    "STRATEGIES",
    "audio_write",
    "convert_audio",
    "convert_channels",
    "encode_audio",
    "generation_metadata",
    "load_audio",
    "measure_loudness",
    "normalize_audio",
    "resample",
    "to_mono",
    "validate_waveform",
]

MAX_DURATION_S = 1800.0
_BLOCK_FRAMES = 2**16


def load_audio(source: str | os.PathLike[str] | bytes, *, max_duration_s: float = MAX_DURATION_S) -> tuple[Tensor, int]:
    """Read an audio file.

    Args:
        source: a path, or the contents of a file.
        max_duration_s: longer files are rejected before decoding, and so are files that would take more memory than
            96 kHz stereo of this duration.
    Returns:
        `[C, N]` float32, and the sample rate in Hz.
    Raises:
        InvalidRequestError: no such file, not audio, empty, too long, too many channels, NaN or infinite samples.
    """
    name = "audio data" if isinstance(source, bytes) else checked_path(source, param="audio")
    if not isinstance(source, bytes) and not Path(name).is_file():
        raise InvalidRequestError(
            "an existing audio file", f"{name}, which does not exist or is not a file", param="audio"
        )
    try:
        with _decoder(source if isinstance(source, bytes) else name) as file:
            rate, channels = int(file.samplerate), int(file.channels)
            _check_size(name, file.frames, rate, channels, max_duration_s)
            check_sample_rate(rate)
            samples = _read(file)
    except (soundfile.LibsndfileError, OSError) as error:
        message = error.strerror if isinstance(error, OSError) else error.error_string  # both without the path
        reason = str(message).rstrip(".")
        if "does not exist" in reason:  # libsndfile's message for what only begins like an mp3 file
            reason = "unrecognised format"
        hint = "supported formats include wav, flac, mp3, ogg, opus and aiff"
        raise InvalidRequestError("a readable audio file", f"{name} ({reason})", hint, param="audio") from error
    return validate_waveform(samples, "audio", name=name), rate


@contextlib.contextmanager
def _decoder(source: str | bytes) -> Iterator[soundfile.SoundFile]:
    """The audio file at a path or of these contents.

    A path is opened here, because libsndfile would trust its suffix: the mp3 decoder prints what it makes of a text.
    """
    if isinstance(source, bytes):
        with soundfile.SoundFile(io.BytesIO(source)) as file:
            yield file
    else:
        with open(source, "rb") as content, soundfile.SoundFile(content.fileno(), closefd=False) as file:
            yield file


def _read(file: soundfile.SoundFile) -> Tensor:
    """`[C, N]`, read block by block to hold the recording only once. Does not trust the length in the header."""
    num_frames = max(0, int(file.frames))
    samples = torch.empty(file.channels, num_frames)
    block = np.empty((_BLOCK_FRAMES, file.channels), dtype=np.float32)
    position = 0
    while position < num_frames and len(part := file.read(out=block)) > 0:
        part = part[: num_frames - position]
        samples[:, position : position + len(part)] = torch.from_numpy(part.T)
        position += len(part)
    return samples[:, :position]


def _check_size(name: str, num_samples: int, rate: int, channels: int, max_duration_s: float) -> None:
    if num_samples > max_duration_s * rate:
        got = f"{name} of {num_samples / rate:.0f} s"
        raise InvalidRequestError(f"at most {max_duration_s:g} s of audio", got, "trim it first", param="audio")
    if channels > MAX_CHANNELS:
        got = f"{name} with {channels}"
        raise InvalidRequestError(f"at most {MAX_CHANNELS} channels", got, "downmix it to stereo first", param="audio")
    if num_samples * channels > max_duration_s * MAX_SAMPLES_PER_S:
        expected = f"at most {max_duration_s * MAX_SAMPLES_PER_S:.0f} samples of all channels together"
        got, hint = f"{name} with {num_samples * channels}", "downmix it to stereo or resample it to a lower rate"
        raise InvalidRequestError(expected, got, hint, param="audio")


def audio_write(
    stem_name: str | os.PathLike[str],
    wav: Waveform,
    sample_rate: int,
    format: str = "wav",
    mp3_rate: int = 320,
    ogg_rate: int | None = None,
    normalize: bool = True,
    strategy: Strategy = "peak",
    peak_clip_headroom_db: float = 1,
    rms_headroom_db: float = 18,
    loudness_headroom_db: float = 14,
    loudness_compressor: bool = False,
    log_clipping: bool = True,
    make_parent_dir: bool = True,
    add_suffix: bool = True,
    *,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Normalise audio and write it to a file atomically. Names and defaults follow audiocraft.

    Args:
        stem_name: the path. The format's suffix is appended unless it is there already or `add_suffix` is false.
        wav: `[N]` or `[C, N]` float tensor or NumPy array.
        make_parent_dir: create the folder if it does not exist.
        normalize, strategy, ..., log_clipping: see `normalize_audio`; the others: see `encode_audio`.
    Returns:
        The path of the file.
    Raises:
        InvalidRequestError: bad audio, rate, format, strategy, tag or path, or a folder that cannot be written to.
    """
    stem = checked_path(stem_name, param="stem_name")
    check_strategy(strategy)
    wav = validate_waveform(wav)
    checked_format(format, wav.shape[0])
    if add_suffix and Path(stem).suffix.lower() != f".{format}":
        stem += f".{format}"
    path = Path(stem)
    levelled = normalize_audio(
        wav, normalize, strategy, peak_clip_headroom_db, rms_headroom_db, loudness_headroom_db, loudness_compressor,
        log_clipping, sample_rate, stem,
    )  # fmt: skip
    content = encode_audio(levelled, sample_rate, format, mp3_rate=mp3_rate, ogg_rate=ogg_rate, metadata=metadata)
    temporary = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        if make_parent_dir:
            path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise InvalidRequestError("a writable path", f"{path} ({error.strerror})", param="stem_name") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return path
