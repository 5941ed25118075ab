"""What a recording would take once it is decoded is known from its header, and bounded."""

from __future__ import annotations

import asyncio
import io

import numpy as np
import pytest
import soundfile
from musicgen_serving.recordings import check_recording
from musicgen_serving.settings import LimitSettings

from musicgen.errors import InvalidRequestError


def flac(rate: int, channels: int, seconds: float) -> bytes:
    """A small file that says that it is so long."""
    content = io.BytesIO()
    soundfile.write(content, np.zeros((16, channels), np.int16), rate, format="FLAC")
    said = bytearray(content.getvalue())
    said[22:26] = round(seconds * rate).to_bytes(4, "big")
    return bytes(said)


@pytest.mark.parametrize(
    ("rate", "channels", "seconds"), [(655_350, 8, 590.0), (655_350, 1, 590.0), (48_000, 8, 590.0), (655_350, 8, 23.0)]
)
def test_a_small_file_that_would_fill_the_memory_is_refused(rate: int, channels: int, seconds: float) -> None:
    with pytest.raises(InvalidRequestError, match="samples over all channels") as caught:
        asyncio.run(check_recording(flac(rate, channels, seconds), "melody", LimitSettings()))
    assert caught.value.param == "melody"


@pytest.mark.parametrize(("rate", "channels", "seconds"), [(96_000, 2, 600.0), (48_000, 8, 290.0), (655_350, 8, 21.0)])
def test_what_fits_is_taken(rate: int, channels: int, seconds: float) -> None:
    asyncio.run(check_recording(flac(rate, channels, seconds), "melody", LimitSettings()))
