"""Checks that the settings of a checkpoint fit each other, for every layout."""

from __future__ import annotations

from musicgen.config import ModelConfig
from musicgen.errors import WeightsError


def check_parts_fit(config: ModelConfig, origin: str, *, sample_rate: int | None = None) -> None:
    """Require whole attention heads, and a codec that decodes the language model's codes.

    Args:
        origin: source of the configuration, for error messages.
        sample_rate: of the language model's training, in Hz; None: not recorded.
    Raises:
        WeightsError: they do not fit.
    """
    decoder, codec, channels = config.decoder, config.codec, config.audio_channels
    if decoder.dim % decoder.num_heads:
        raise WeightsError(f"{origin}: expected a width divisible by {decoder.num_heads} heads, got {decoder.dim}")
    if channels not in (1, 2):
        raise WeightsError(f"{origin}: expected 1 or 2 audio channels, got {channels}")
    theirs = (codec.num_codebooks * channels, codec.codebook_size, codec.sample_rate)
    ours = (decoder.num_codebooks, decoder.codebook_size, sample_rate or codec.sample_rate)
    if ours != theirs:
        expected, got = ("{} codebooks of {} at {} Hz".format(*part) for part in (theirs, ours))
        in_stereo = ", one set per channel" if channels == 2 else ""
        raise WeightsError(
            f"{origin}: expected {expected}, which the codec has{in_stereo}, got a language model for {got}; "
            "check that both belong to the same model"
        )
