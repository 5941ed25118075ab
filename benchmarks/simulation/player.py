"""Simulated real-time player: start of playback and underruns. Deals in frames and seconds only."""

from __future__ import annotations

from dataclasses import dataclass

LOOKAHEAD_FRAMES = 4
"""Lookahead of the codec in frames, except at the end of a piece."""
RESOLUTION_S = 1e-6
"""Shorter silence is rounding, not an underrun."""


@dataclass(frozen=True, slots=True)
class Heard:
    """Playback of one stream."""

    first_audio_s: float
    """Start of playback, on the simulation's clock."""
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
    """Play a stream whose codes arrive in chunks; None if playback never starts.

    Args:
        ready_s: when each chunk's codes are complete, ascending.
        num_frames: frames of each chunk.
        is_complete: whether the last chunk ends the piece, so that nothing is held back for the lookahead.
        codec_s: from a chunk's codes to its samples at the player.
        prebuffer_s: audio that the player buffers before it starts; less if the piece is shorter.
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
