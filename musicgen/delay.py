"""The delay pattern, which interleaves K parallel codebooks into one sequence of steps.

At step `s`, codebook `k` holds the code of frame `s - 1 - delay[k]`; step 0 and every position without a frame hold
the special token. T frames therefore take S = T + max_delay + 1 steps, and frame `t` is complete after step
`t + 1 + max_delay`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

UNKNOWN_CODE = -1
"""Marks a position of a delayed sequence that is still to be sampled."""


@dataclass(frozen=True, slots=True)
class DelayPattern:
    """The delays of K codebooks, in steps.

    Source: MusicGen (Copet et al. 2023), section 2.2; the stereo order pairs left and right codebooks.
    """

    delays: tuple[int, ...]
    max_delay: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_delay", max(self.delays))  # needed at every step

    @classmethod
    @functools.cache  # needed at every step
    def for_codebooks(cls, num_codebooks: int, audio_channels: int) -> DelayPattern:
        """Mono: 0, 1, 2, ...; stereo, in the order 1L 1R 2L 2R ...: 0, 0, 1, 1, 2, 2, ..."""
        return cls(tuple(k // audio_channels for k in range(num_codebooks)))

    @property
    def num_codebooks(self) -> int:
        return len(self.delays)

    def num_steps(self, num_frames: int) -> int:
        """Length in steps of a delayed sequence of `num_frames` frames, including step 0."""
        return num_frames + self.max_delay + 1

    def num_complete_frames(self, num_steps: int) -> int:
        """Frames that are complete in all codebooks after `num_steps` steps (including step 0)."""
        return max(0, num_steps - 1 - self.max_delay)

    def first_step_after(self, num_prompt_frames: int) -> int:
        """First step that samples anything after a prompt of `num_prompt_frames` frames."""
        return num_prompt_frames + 1

    def apply(self, codes: Tensor, special_token: int) -> Tensor:
        """Delay codes.

        Args:
            codes: `[..., K, T]` integers; `UNKNOWN_CODE` is kept.
            special_token: fills positions without a frame.
        Returns:
            `[..., K, S]` of the same dtype, S = `num_steps(T)`.
        """
        num_frames = codes.shape[-1]
        delayed = codes.new_full((*codes.shape[:-1], self.num_steps(num_frames)), special_token)
        for k, delay in enumerate(self.delays):
            delayed[..., k, 1 + delay : 1 + delay + num_frames] = codes[..., k, :]
        return delayed

    def undo(self, delayed: Tensor) -> Tensor:
        """The complete frames of a delayed sequence or of a prefix of one.

        Args:
            delayed: `[..., K, S']`, S' ≤ S.
        Returns:
            `[..., K, T']`, T' = `num_complete_frames(S')`.
        """
        num_frames = self.num_complete_frames(delayed.shape[-1])
        codes = delayed.new_empty((*delayed.shape[:-1], num_frames))
        for k, delay in enumerate(self.delays):
            codes[..., k, :] = delayed[..., k, 1 + delay : 1 + delay + num_frames]
        return codes
