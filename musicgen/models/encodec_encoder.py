"""EnCodec's encoder: samples to codes, using transformers' model.

Needed only for audio prompts, so it is built on first use. Encodes one mono signal at a time, because batch padding
would change the codes of shorter signals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from musicgen.config import CodecConfig
from musicgen.errors import InvalidRequestError, WeightsError


class EncodecEncoder:
    """Encodes audio prompts.

    Args:
        config: codec configuration.
        tensors: codec tensors with transformers' names and weight normalisation folded (`weights/codec.py`); only those
            of the encoder and the quantiser are kept.
    """

    def __init__(self, config: CodecConfig, tensors: Mapping[str, Tensor]) -> None:
        self.config = config
        self._tensors = {n: t for n, t in tensors.items() if n.startswith(("encoder.", "quantizer."))}
        self._model: Any = None
        self._device = torch.device("cpu")

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Its tensors, with transformers' names."""
        return self._tensors

    def to(self, device: torch.device | str) -> EncodecEncoder:
        """Move to `device` (mutates this object)."""
        self._device = torch.device(device)
        if self._model is not None:
            self._model.to(self._device)
        return self

    @torch.no_grad()
    def encode(self, samples: Tensor) -> Tensor:
        """Encode one signal.

        Args:
            samples: `[N]` or `[C, N]` float, at the codec's sample rate, N ≥ 1; stereo channels are encoded separately.
        Returns:
            `[K · C, T]` int64, T = ⌈N / hop_length⌉; for C = 2 in the order 1L 1R 2L 2R and so on.
        Raises:
            InvalidRequestError: wrong shape, or no samples.
        """
        channels = samples[None] if samples.ndim == 1 else samples
        if channels.ndim != 2 or channels.shape[0] not in (1, 2) or channels.shape[1] == 0:
            raise InvalidRequestError("samples [N], [1, N] or [2, N], N ≥ 1", str(list(samples.shape)), param="prompt")
        if self._model is None:
            self._model = self._build()
        batch = channels.to(self._device, torch.float32)[:, None]
        codes = self._model.encode(batch, bandwidth=self._model.config.target_bandwidths[0]).audio_codes[0]
        return torch.as_tensor(codes).transpose(0, 1).flatten(0, 1).cpu()

    def _build(self) -> Any:
        from transformers import EncodecModel

        model = EncodecModel(_hf_config(self.config))
        model.decoder = nn.Identity()
        for module in model.modules():
            if parametrize.is_parametrized(module):
                parametrize.remove_parametrizations(module, "weight")
        result = model.load_state_dict(self._tensors, strict=False)
        missing = [n for n in result.missing_keys if not n.endswith((".inited", ".cluster_size", ".embed_avg"))]
        if missing or result.unexpected_keys:
            raise WeightsError(
                f"codec encoder: expected the tensors of EncodecModel, got missing {missing[:8]} and unexpected "
                f"{result.unexpected_keys[:8]}; this version of transformers may have renamed them"
            )
        return model.eval().to(self._device)


def _hf_config(config: CodecConfig) -> Any:
    from transformers import EncodecConfig

    bits = math.log2(config.codebook_size)
    if bits != int(bits):
        raise WeightsError(f"codec encoder: expected a power of 2 as codebook_size, got {config.codebook_size}")
    # transformers derives the number of codebooks from a bandwidth by rounding down: add half a codebook.
    kbps = (config.num_codebooks + 0.5) * math.ceil(config.frame_rate_hz) * bits / 1000
    return EncodecConfig(
        sampling_rate=config.sample_rate, target_bandwidths=[kbps], hidden_size=config.hidden_size,
        codebook_dim=config.codebook_dim, codebook_size=config.codebook_size, num_filters=config.num_filters,
        upsampling_ratios=list(config.upsampling_ratios), num_residual_layers=config.num_residual_layers,
        num_lstm_layers=config.num_lstm_layers, kernel_size=config.kernel_size,
        last_kernel_size=config.last_kernel_size, residual_kernel_size=config.residual_kernel_size,
        dilation_growth_rate=config.dilation_growth_rate, compress=config.compress,
        use_conv_shortcut=config.conv_shortcut, use_causal_conv=False, pad_mode=config.pad_mode,
    )  # fmt: skip
