"""A listener's player at real time: what it hears when, and where it falls silent. Knows frames and seconds only."""

from __future__ import annotations

from dataclasses import dataclass

LOOKAHEAD_FRAMES = 4
"""Frames that the codec must have seen before it gives a frame's samples, except at the end of a piece."""
RESOLUTION_S = 1e-6
"""Less silence than this is rounding, not an under-run."""


@dataclass(frozen=True, slots=True)
class Heard:
    """How one stream went for its listener."""

    first_audio_s: float
    """When the first sound was heard, on the simulation's clock."""
    underrun_s: float
    """Silence within the piece."""
    num_underruns: int


def play(
    ready_s: list[float],
    num_frames: list[int],
    *,
    frame_rate_hz: float,
    is_complete: bool = True,
    codec_s: float = 0.0,
    prebuffer_s: float = 0.0,
    lookahead_frames: int = LOOKAHEAD_FRAMES,
) -> Heard | None:
    """Play a stream whose codes come in chunks; None if the player never begins.

    Args:
        ready_s: when each chunk's codes are there, ascending.
        num_frames: frames of each chunk.
        is_complete: the last chunk ends the piece, so nothing is held back for the look-ahead.
        codec_s: from a chunk's codes to its samples at the player.
        prebuffer_s: sound that the player collects before it starts; less if the piece is shorter.
    """
    audible, total = [], 0
    for frames in num_frames:
        total += frames
        audible.append(max(0, total - lookahead_frames))
    if is_complete and audible:
        audible[-1] = total
    wanted = max(1.0, prebuffer_s * frame_rate_hz)
    if is_complete:
        wanted = min(wanted, total)
    first = next((i for i, frames in enumerate(audible) if frames >= wanted), None)
    if first is None:
        return None
    start = ready_s[first] + codec_s
    silent_at = start + audible[first] / frame_rate_hz
    underrun_s, num_underruns = 0.0, 0
    for i in range(first + 1, len(audible)):
        arrives = ready_s[i] + codec_s
        if arrives > silent_at + RESOLUTION_S and audible[i] > audible[i - 1]:
            underrun_s += arrives - silent_at
            num_underruns += 1
            silent_at = arrives
        silent_at += (audible[i] - audible[i - 1]) / frame_rate_hz
    return Heard(start, underrun_s, num_underruns)
