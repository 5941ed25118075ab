"""The nouns of the project. Each field says who sets it.

A request travels as: a user's call → `Conditioning` → `CodesRequest` → codes `[K, T]` → samples `[C, N]`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from musicgen.errors import InvalidRequestError

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request draws its codes. Set by the caller; checked here, once.

    Defaults are MusicGen's own. Source of the semantics: audiocraft `LMModel._sample_next_token`.
    """

    greedy: bool = False
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 250
    """Keep every code at least as likely as the k-th; 0 keeps all."""
    top_p: float = 0.0
    """If > 0, keep the most likely codes up to this mass, and ignore `top_k`."""
    guidance_scale: float = 3.0
    """How far to move from the unconditional towards the conditional prediction; 1 turns guidance off."""
    melody_guidance: float | None = None
    """Double guidance: how far to move from the melody-only towards the melody-and-text prediction, before
    `guidance_scale` is applied (audiocraft's `cfg_coef_beta`)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InvalidRequestError("a number ≥ 0", repr(self.temperature), param="temperature")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise InvalidRequestError("an integer ≥ 0", repr(self.top_k), "0 turns it off", param="top_k")
        if not 0.0 <= self.top_p <= 1.0:
            raise InvalidRequestError("a number in [0, 1]", repr(self.top_p), "0 turns it off", param="top_p")
        for name in ("guidance_scale", "melody_guidance"):
            value = getattr(self, name)
            if value is not None and not abs(value) < 1e4:
                raise InvalidRequestError("a finite number below 10000", repr(value), param=name)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed <= MAX_SEED:
            raise InvalidRequestError("an integer in [0, 2^63)", repr(self.seed), param="seed")


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """What the language model is conditioned on: the outputs of the text encoder and the chroma extractor."""

    text: Tensor | None
    """`[L, text_dim]` states of the text encoder, of this prompt alone, unpadded; None for no text."""
    chroma: Tensor | None
    """`[num_frames, num_chroma]` one-hot chroma, cut or repeated to the model's length; None for no melody."""


@dataclass(frozen=True, slots=True)
class Window:
    """Frames that the model sees at once. Set by `plan_windows`."""

    start: int
    """First frame, in frames of the whole piece."""
    end: int
    """One past the last frame."""


@dataclass(frozen=True, slots=True, eq=False)
class CodesRequest:
    """One request to the language model. Set by the API from a user's call, with everything resolved."""

    windows: tuple[tuple[Window, Conditioning], ...]
    """One window up to the model's longest duration; overlapping ones, in order, beyond it."""
    sampling: SamplingParams
    prompt_codes: Tensor | None = None
    """`[K, P]` codes that the result starts with, fewer frames than the result."""

    def with_seed(self, seed: int) -> CodesRequest:
        """The same request drawn another way."""
        return replace(self, sampling=replace(self.sampling, seed=seed))
