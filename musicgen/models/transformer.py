"""The decoder transformer: embeddings of K codebooks → pre-norm layers → K heads.

Plain PyTorch for any device, optimised for readability: the reference that faster implementations are tested against.
Works on rows of delayed codes; guidance, sampling and the delay pattern are handled elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musicgen.config import DecoderConfig

LAYER_NORM_EPS = 1e-5


@dataclass(slots=True)
class LayerCache:
    """KV cache of one layer. `self_kv` is filled up to the state's `length`."""

    self_kv: Tensor
    """`[2, B, H, max_len, D]`."""
    cross_kv: Tensor | None
    """`[2, B, H, L, D]`, computed once from the text."""


@dataclass(slots=True)
class DecoderState:
    """State of B rows that advance together, between forward passes."""

    layers: list[LayerCache]
    length: int
    """Positions already in the cache, including the prefix."""


def sinusoidal_positions(start: int, length: int, dim: int, device: torch.device) -> Tensor:
    """Position embeddings `[length, dim]` in fp32: all cosines, then all sines.

    Angles are computed from integer positions in fp32: with 16 bits the error would reach whole radians.
    Source: audiocraft `create_sin_embedding` and transformers' sinusoidal embedding, which agree.
    """
    half = dim // 2
    inverse_period = torch.exp(torch.arange(half, device=device).float() * (-math.log(10000) / (half - 1)))
    angle = torch.arange(start, start + length, device=device).float()[:, None] * inverse_period
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Attention(nn.Module):
    """Multi-head attention without biases."""

    def __init__(self, dim: int, num_heads: int, *, cross: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        if cross:
            self.q = nn.Linear(dim, dim, bias=False)
            self.kv = nn.Linear(dim, 2 * dim, bias=False)
        else:
            self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def heads(self, x: Tensor, parts: int) -> Tensor:
        """`[B, S, parts·H·D]` → `[parts, B, H, S, D]`."""
        rows, num_new, width = x.shape
        return x.view(rows, num_new, parts, self.num_heads, width // parts // self.num_heads).permute(2, 0, 3, 1, 4)

    def merge(self, x: Tensor) -> Tensor:
        """`[B, H, S, D]` → output projection `[B, S, dim]`."""
        merged: Tensor = self.out(x.transpose(1, 2).flatten(2))
        return merged

    def self_attend(self, x: Tensor, kv: Tensor, length: int) -> Tensor:
        """Causal attention of S new positions; appends them to `kv` (mutated) at `length`."""
        num_new = x.shape[1]
        q, k, v = self.heads(self.qkv(x), 3)
        kv[0, :, :, length : length + num_new] = k
        kv[1, :, :, length : length + num_new] = v
        keys, values = kv[:, :, :, : length + num_new]
        mask = None
        if num_new > 1 and length > 0:
            mask = torch.ones(num_new, length + num_new, dtype=torch.bool, device=x.device).tril(length)
        is_causal = num_new > 1 and length == 0
        return self.merge(F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=is_causal))

    def cross_attend(self, x: Tensor, kv: Tensor) -> Tensor:
        (q,) = self.heads(self.q(x), 1)
        return self.merge(F.scaled_dot_product_attention(q, kv[0], kv[1]))


class DecoderLayer(nn.Module):
    """LN → self-attention → +; (LN → cross-attention → +;) LN → fc1, exact GELU, fc2 → +."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=LAYER_NORM_EPS)
        self.self_attn = Attention(config.dim, config.num_heads, cross=False)
        self.norm_cross: nn.LayerNorm | None = None
        self.cross_attn: Attention | None = None
        if config.cross_attention:
            self.norm_cross = nn.LayerNorm(config.dim, eps=LAYER_NORM_EPS)
            self.cross_attn = Attention(config.dim, config.num_heads, cross=True)
        self.norm2 = nn.LayerNorm(config.dim, eps=LAYER_NORM_EPS)
        self.fc1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.fc2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.fc1.weight.dtype

    def forward(self, x: Tensor, cache: LayerCache, length: int) -> Tensor:
        # The residual stream and the norms stay in fp32; matmuls use the weights' dtype.
        x = x + self.self_attn.self_attend(self.norm1(x).to(self.compute_dtype), cache.self_kv, length)
        if self.cross_attn is not None:
            assert self.norm_cross is not None
            assert cache.cross_kv is not None
            x = x + self.cross_attn.cross_attend(self.norm_cross(x).to(self.compute_dtype), cache.cross_kv)
        hidden: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(x).to(self.compute_dtype))))
        return x + hidden


class Decoder(nn.Module):
    """The language model over delayed codes.

    Parameters are fp32 except the layers' matrices, which `set_compute_dtype` can convert to 16 bits, as with
    audiocraft's autocast.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.num_codebooks * (config.codebook_size + 1), config.dim)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.out_norm = nn.LayerNorm(config.dim, eps=LAYER_NORM_EPS)
        self.heads = nn.Linear(config.dim, config.num_codebooks * config.codebook_size, bias=False)

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """Convert the matrices of the layers to `dtype`; norms, embeddings and heads stay fp32."""
        for layer in self.layers:
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    module.to(dtype)

    def start(self, num_rows: int, max_len: int, text: Tensor | None) -> DecoderState:
        """A state for `num_rows` rows of at most `max_len` positions each.

        Args:
            text: `[B, L, dim]` projected text states for cross-attention, zeros for a null row; None for models
                without cross-attention.
        """
        config, device = self.config, self.out_norm.weight.device
        caches = []
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            shape = (2, num_rows, config.num_heads, max_len, config.head_dim)
            self_kv = torch.zeros(shape, dtype=layer.compute_dtype, device=device)
            cross_kv = None
            if layer.cross_attn is not None:
                assert text is not None
                cross_kv = layer.cross_attn.heads(layer.cross_attn.kv(text.to(layer.compute_dtype)), 2)
            caches.append(LayerCache(self_kv, cross_kv))
        return DecoderState(caches, 0)

    def forward(self, codes: Tensor, state: DecoderState, prefix: Tensor | None = None) -> Tensor:
        """Advance by a prefix and S delayed steps.

        Args:
            codes: `[B, K, S]` delayed codes, including the special token.
            state: mutated: its caches and length grow by P + S.
            prefix: `[B, P, dim]` embeddings before the first step; requires an empty state.
        Returns:
            Logits `[B, S, K, V]` in fp32, for the S steps only.
        """
        num_codebooks, codebook_size = self.config.num_codebooks, self.config.codebook_size
        offsets = torch.arange(num_codebooks, device=codes.device) * (codebook_size + 1)
        x = self.embed(codes + offsets[:, None]).sum(1)
        if prefix is not None:
            x = torch.cat([prefix, x], dim=1)
        x = x + sinusoidal_positions(state.length, x.shape[1], self.config.dim, x.device)
        for layer, cache in zip(self.layers, state.layers, strict=True):
            x = layer(x, cache, state.length)
        state.length += x.shape[1]
        x = self.out_norm(x[:, -codes.shape[-1] :])
        logits: Tensor = self.heads(x)
        return logits.view(*logits.shape[:2], num_codebooks, codebook_size)
