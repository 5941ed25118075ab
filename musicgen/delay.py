"""The delay pattern: how K parallel codebooks become one sequence of steps.

At step `s` codebook `k` holds the code of frame `s - 1 - delay[k]`; step 0 and every place without a frame hold the
special token. So T frames take S = T + max_delay + 1 steps, and frame `t` is complete once step `t + 1 + max_delay` is.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

UNKNOWN_CODE = -1
"""Marks a place of a delayed sequence that is still to be sampled."""


@dataclass(frozen=True, slots=True)
class DelayPattern:
    """The delays of K codebooks, in steps.

    Source: MusicGen (Copet et al. 2023), section 2.2; the stereo order pairs left and right codebooks.
    """

    delays: tuple[int, ...]
    max_delay: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_delay", max(self.delays))  # asked for at every step

    @classmethod
    @functools.cache  # asked for at every step
    def for_codebooks(cls, num_codebooks: int, audio_channels: int) -> DelayPattern:
        """Mono: 0, 1, 2, ...; stereo, in the order 1L 1R 2L 2R ...: 0, 0, 1, 1, 2, 2, ..."""
        return cls(tuple(k // audio_channels for k in range(num_codebooks)))

    @property
    def num_codebooks(self) -> int:
        return len(self.delays)

    def num_steps(self, num_frames: int) -> int:
        """Steps of a delayed sequence that holds `num_frames` frames, step 0 included."""
        return num_frames + self.max_delay + 1

    def num_complete_frames(self, num_steps: int) -> int:
        """Frames of which every codebook is known once `num_steps` steps are (step 0 included)."""
        return max(0, num_steps - 1 - self.max_delay)

    def first_step_after(self, num_prompt_frames: int) -> int:
        """First step with something to sample when `num_prompt_frames` frames are given."""
        return num_prompt_frames + 1

    def apply(self, codes: Tensor, special_token: int) -> Tensor:
        """Delay codes.

        Args:
            codes: `[..., K, T]` integers; `UNKNOWN_CODE` stays as it is.
            special_token: what places without a frame hold.
        Returns:
            `[..., K, S]` of the same dtype, S = `num_steps(T)`.
        """
        num_frames = codes.shape[-1]
        delayed = codes.new_full((*codes.shape[:-1], self.num_steps(num_frames)), special_token)
        for k, delay in enumerate(self.delays):
            delayed[..., k, 1 + delay : 1 + delay + num_frames] = codes[..., k, :]
        return delayed

    def undo(self, delayed: Tensor) -> Tensor:
        """The frames that are complete in a delayed sequence, or in the beginning of one.

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
