"""The delay pattern: round trip, layout, stereo order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from musicgen.delay import UNKNOWN_CODE, DelayPattern

SPECIAL = 2048


@given(
    channels=st.sampled_from([1, 2]),
    books=st.integers(1, 4),
    num_frames=st.integers(0, 40),
    seed=st.integers(0, 2**16),
)
def test_undo_reverses_apply(channels: int, books: int, num_frames: int, seed: int) -> None:
    pattern = DelayPattern.for_codebooks(books * channels, channels)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, SPECIAL, (3, books * channels, num_frames), generator=generator)
    delayed = pattern.apply(codes, SPECIAL)
    assert delayed.shape[-1] == pattern.num_steps(num_frames)
    assert torch.equal(pattern.undo(delayed), codes)


@given(num_frames=st.integers(0, 30), num_steps=st.integers(0, 40))
def test_a_beginning_gives_the_complete_frames(num_frames: int, num_steps: int) -> None:
    pattern = DelayPattern.for_codebooks(4, 1)
    num_steps = min(num_steps, pattern.num_steps(num_frames))
    codes = torch.arange(4 * num_frames).reshape(4, num_frames)
    frames = pattern.undo(pattern.apply(codes, SPECIAL)[:, :num_steps])
    assert frames.shape[-1] == max(0, num_steps - 4)
    assert torch.equal(frames, codes[:, : frames.shape[-1]])


def test_layout_of_the_paper() -> None:
    codes = torch.tensor([[10, 11], [20, 21], [30, 31], [40, 41]])
    delayed = DelayPattern.for_codebooks(4, 1).apply(codes, SPECIAL)
    s = SPECIAL
    assert delayed.tolist() == [
        [s, 10, 11, s, s, s],
        [s, s, 20, 21, s, s],
        [s, s, s, 30, 31, s],
        [s, s, s, s, 40, 41],
    ]


def test_unknown_codes_stay_unknown() -> None:
    codes = torch.full((4, 3), UNKNOWN_CODE)
    delayed = DelayPattern.for_codebooks(4, 1).apply(codes, SPECIAL)
    assert (delayed == UNKNOWN_CODE).sum() == 12


@pytest.mark.parametrize(("channels", "delays"), [(1, (0, 1, 2, 3)), (2, (0, 0, 1, 1, 2, 2, 3, 3))])
def test_delays(channels: int, delays: tuple[int, ...]) -> None:
    assert DelayPattern.for_codebooks(4 * channels, channels).delays == delays
