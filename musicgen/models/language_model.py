"""Turns a request's conditioning into decoder rows: projections and guidance rows.

A request has one to three rows with a common lifetime: conditional, melody-only (double guidance), null. Independent of
sampling.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from musicgen.config import ModelConfig
from musicgen.models.transformer import Decoder
from musicgen.types import Conditioning, SamplingParams


@dataclass(frozen=True, slots=True, eq=False)
class GuidanceRows:
    """The decoder inputs of one request's R rows, conditional first, null last."""

    prefix: Tensor | None
    """`[R, P, dim]` embeddings before the codes (melody models)."""
    text: Tensor | None
    """`[R, L, dim]` cross-attention source (text models)."""
    num_rows: int

    @property
    def prefix_len(self) -> int:
        return 0 if self.prefix is None else self.prefix.shape[1]


@dataclass(frozen=True, slots=True, eq=False)
class PlannedRows:
    """The number and lengths of rows that have not been computed yet."""

    num_rows: int
    prefix_len: int
    make: Callable[[], GuidanceRows]

    @classmethod
    def of(cls, rows: GuidanceRows) -> PlannedRows:
        """The plan of existing rows."""
        return cls(rows.num_rows, rows.prefix_len, lambda: rows)


def null_chroma(num_frames: int, num_chroma: int) -> Tensor:
    """Chroma for no melody: `[num_frames, num_chroma]` one-hot in bin 0. Source: audiocraft `ChromaStemConditioner`."""
    chroma = torch.zeros(num_frames, num_chroma)
    chroma[:, 0] = 1.0
    return chroma


def _is_guided(conditioning: Conditioning, sampling: SamplingParams) -> bool:
    is_unconditional = conditioning.text is None and conditioning.chroma is None
    return not is_unconditional and (sampling.guidance_scale != 1.0 or sampling.melody_guidance is not None)


class LanguageModel(nn.Module):
    """The decoder with its conditioning projections.

    A projection missing from a checkpoint (transformers omits it if the widths are equal) is the identity.
    """

    def __init__(self, config: ModelConfig, *, project_text: bool = True) -> None:
        super().__init__()
        self.config = config
        dim = config.decoder.dim
        self.text_proj: nn.Linear | nn.Identity = nn.Linear(config.text_dim, dim) if project_text else nn.Identity()
        self.chroma_proj = nn.Linear(config.chroma.num_chroma, dim) if config.chroma is not None else None
        self.decoder = Decoder(config.decoder)

    @property
    def device(self) -> torch.device:
        return self.decoder.out_norm.weight.device

    def guidance_rows(self, conditioning: Conditioning, sampling: SamplingParams) -> GuidanceRows:
        """The rows of a request, with the null row only if guidance has an effect.

        Raises:
            AssertionError: double guidance without a melody model (rejected earlier by the API).
        """
        text = self._project_text(conditioning.text)
        null_text = torch.zeros_like(text)
        guided = _is_guided(conditioning, sampling)
        if self.config.chroma is None:
            assert sampling.melody_guidance is None
            rows = torch.stack([text, null_text] if guided else [text])
            return GuidanceRows(None, rows, len(rows))

        null_melody = self._project_chroma(None)
        melody = null_melody if conditioning.chroma is None else self._project_chroma(conditioning.chroma)
        prefixes = [torch.cat([melody, text])]
        if guided and sampling.melody_guidance is not None:
            prefixes.append(torch.cat([melody, null_text]))
        if guided:
            prefixes.append(torch.cat([null_melody, null_text]))
        return GuidanceRows(torch.stack(prefixes), None, len(prefixes))

    def plan_rows(self, conditioning: Conditioning, sampling: SamplingParams) -> PlannedRows:
        """The plan for `guidance_rows`, which are computed later: those of a one-hour piece would take 600 MB."""
        num_rows, prefix_len = 1 + _is_guided(conditioning, sampling), 0
        if self.config.chroma is not None:
            num_rows += num_rows == 2 and sampling.melody_guidance is not None
            prefix_len = self.config.chroma.num_frames + (1 if conditioning.text is None else len(conditioning.text))
        return PlannedRows(num_rows, prefix_len, functools.partial(self.guidance_rows, conditioning, sampling))

    def _project_text(self, text: Tensor | None) -> Tensor:
        """`[L, dim]`; no text is one zero position, as long as audiocraft's empty prompt."""
        if text is None:
            return torch.zeros(1, self.config.decoder.dim, device=self.device)
        projected: Tensor = self.text_proj(text.to(self.device))
        return projected

    def _project_chroma(self, chroma: Tensor | None) -> Tensor:
        config = self.config.chroma
        assert config is not None
        assert self.chroma_proj is not None
        if chroma is None:
            chroma = null_chroma(config.num_frames, config.num_chroma)
        projected: Tensor = self.chroma_proj(chroma.to(self.device))
        return projected
