"""Request validation before admission: rejects requests that the model could not compute. Ignores capacity."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from musicgen.config import ModelConfig
from musicgen.errors import InvalidRequestError
from musicgen.models.t5 import MAX_TEXT_TOKENS
from musicgen.types import CodesRequest, Conditioning, EngineRequest, Window


def check_request(request: EngineRequest, config: ModelConfig) -> None:
    """Reject requests that the model of `config` cannot generate, or with invalid scheduling parameters.

    Raises:
        InvalidRequestError: names the offending field.
    """
    if not 0 < request.weight < math.inf:
        raise InvalidRequestError("a finite number > 0", repr(request.weight), param="weight")
    if isinstance(request.priority, bool) or not isinstance(request.priority, int):
        raise InvalidRequestError("an integer", repr(request.priority), param="priority")
    for name in ("deadline_s", "lease_s"):
        seconds = getattr(request, name)
        if seconds is not None and not seconds > 0:
            raise InvalidRequestError("seconds > 0, or None", repr(seconds), param=name)
    codes = request.codes
    _check_windows([window for window, _ in codes.windows], config)
    for _, conditioning in codes.windows:
        _check_text(conditioning, config)
        _check_melody(conditioning, config)
    if codes.sampling.melody_guidance is not None and config.chroma is None:
        raise InvalidRequestError(
            "None for models without melody conditioning", repr(codes.sampling.melody_guidance), param="melody_guidance"
        )
    _check_known(codes, config)


def _check_windows(windows: list[Window], config: ModelConfig) -> None:
    if not windows:
        raise InvalidRequestError("at least one window", "none", param="windows")
    max_frames = config.num_frames(config.max_duration_s)
    for window in windows:
        if not (window.start >= 0 and 0 < window.end - window.start <= max_frames):
            got = f"frames {window.start} to {window.end}"
            raise InvalidRequestError(f"windows of 1 to {max_frames} frames", got, param="windows")
    for before, after in itertools.pairwise(windows):
        if not (before.start <= after.start <= before.end < after.end):
            got = f"frames {before.start} to {before.end}, then {after.start} to {after.end}"
            raise InvalidRequestError("windows in order, without gaps", got, param="windows")


def _check_text(conditioning: Conditioning, config: ModelConfig) -> None:
    text = conditioning.text
    if text is None:
        return
    if text.dim() != 2 or text.shape[1] != config.text_dim or not 1 <= text.shape[0] <= MAX_TEXT_TOKENS:
        expected = f"states [1 to {MAX_TEXT_TOKENS}, {config.text_dim}]"
        raise InvalidRequestError(expected, str(list(text.shape)), param="text")
    _check_finite(text, "text")


def _check_melody(conditioning: Conditioning, config: ModelConfig) -> None:
    chroma = conditioning.chroma
    if chroma is None:
        return
    if config.chroma is None:
        raise InvalidRequestError(
            "None for models without melody conditioning", str(list(chroma.shape)), param="chroma"
        )
    expected = (config.chroma.num_frames, config.chroma.num_chroma)
    if tuple(chroma.shape) != expected:
        raise InvalidRequestError(f"chroma {list(expected)}", str(list(chroma.shape)), param="chroma")
    _check_finite(chroma, "chroma")


def _check_finite(states: Tensor, param: str) -> None:
    if not states.is_floating_point() or not bool(torch.isfinite(states).all()):
        raise InvalidRequestError("finite floating-point numbers", f"{states.dtype} with others", param=param)


def _check_known(codes: CodesRequest, config: ModelConfig) -> None:
    """Reject known codes of the wrong shape, range or length."""
    num_codebooks, size = config.decoder.num_codebooks, config.decoder.codebook_size
    known = codes.known_codes
    if known is not None:
        is_integer = not (known.is_floating_point() or known.is_complex() or known.dtype == torch.bool)
        if known.dim() != 2 or known.shape[0] != num_codebooks or not is_integer:
            expected = f"integers [{num_codebooks}, frames]"
            raise InvalidRequestError(expected, f"{known.dtype} {list(known.shape)}", param="known_codes")
        if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < size:
            got = f"codes from {int(known.min())} to {int(known.max())}"
            raise InvalidRequestError(f"codes in [0, {size})", got, param="known_codes")
    if codes.num_known_frames >= codes.num_frames:
        raise InvalidRequestError(
            f"fewer known frames than the {codes.num_frames} of the piece",
            str(codes.num_known_frames),
            param="known_codes",
        )
    following = next(window for window, _ in codes.windows if window.end > codes.num_known_frames)
    if following.start > codes.num_known_frames:
        raise InvalidRequestError(
            f"known codes up to at least frame {following.start}",
            f"{codes.num_known_frames} frames",
            param="known_codes",
        )
