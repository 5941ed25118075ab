"""GPUs and models as the simulation sees them: rates, sizes, bytes and FLOPs. Independent of clocks and requests.

Rates are the vendors' dense peaks; the achievable fraction of them is an assumption of `step_time`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from musicgen_kernels import PAGE_LEN, page_bytes

from musicgen.config import ChromaConfig, CodecConfig, DecoderConfig, KVDtype, ModelConfig, WeightDtype

GIGA = 1e9
NUM_CODEBOOKS, CODEBOOK_SIZE = 4, 2048


@dataclass(frozen=True, slots=True)
class Gpu:
    """Peak rates of one device."""

    name: str
    bytes_s: float
    flops_s: float
    """Dense bfloat16 on tensor cores; 8-bit and 4-bit weights are assumed to be dequantized to it."""
    float32_flops_s: float
    memory_bytes: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H100", 3350 * GIGA, 989e12, 67e12, 80 * GIGA),
        Gpu("A100", 2039 * GIGA, 312e12, 19.5e12, 80 * GIGA),
        Gpu("L4", 300 * GIGA, 121e12, 30.3e12, 24 * GIGA),
    )
}
"""H100 SXM, A100 SXM 80 GB and L4, from NVIDIA's data sheets."""

WEIGHT_BYTES: dict[WeightDtype, float] = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "int8": 1.0 + 2 / 128,  # one 16-bit scale per group of 128
    "int4": 0.5 + 2 / 32,  # one per group of 32
}
"""Bytes per matrix weight, including scales."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """Dimensions of a decoder, for counting bytes and FLOPs."""

    name: str
    num_layers: int
    dim: int
    num_heads: int
    melody: bool
    """True: chroma and text as a prefix. False: text through cross-attention."""

    @property
    def num_weights(self) -> float:
        """Matrix weights that a step reads: attention, feed-forward, heads.

        For cross-attention, a step reads the query and output matrices; keys and values are computed once per request.
        """
        per_layer = 12 if self.melody else 14
        return self.num_layers * per_layer * self.dim**2 + NUM_CODEBOOKS * CODEBOOK_SIZE * self.dim

    @property
    def num_resident_weights(self) -> float:
        """Weights held in memory."""
        return self.num_weights + (0 if self.melody else self.num_layers * 2 * self.dim**2)

    @property
    def token_flops(self) -> float:
        """Matrix FLOPs per position and row."""
        return 2 * self.num_weights

    @property
    def attended_flops(self) -> float:
        """Attention FLOPs (QK and PV) per position and row, for each attended position."""
        return 4.0 * self.num_layers * self.dim

    def kv_bytes(self, dtype: KVDtype) -> float:
        """KV bytes per position and row over all layers, including scales."""
        return self.page_bytes(dtype) / PAGE_LEN

    def page_bytes(self, dtype: KVDtype) -> int:
        head_dim = self.dim // self.num_heads
        return page_bytes(self.num_layers, self.num_heads, head_dim, getattr(torch, dtype))

    @property
    def num_kernels(self) -> int:
        """Kernel launches per step: about eight fused ones per layer (eleven with cross-attention) plus sixteen."""
        return self.num_layers * (8 if self.melody else 11) + 16

    def num_pages(self, gpu: Gpu, weights: WeightDtype, kv: KVDtype, memory_share: float) -> int:
        """Pages that fit next to the weights into a share of the device's memory (0: the weights do not fit)."""
        embeddings = NUM_CODEBOOKS * (CODEBOOK_SIZE + 1) * self.dim * 4.0
        resident = self.num_resident_weights * WEIGHT_BYTES[weights] + embeddings
        return max(0, int((gpu.memory_bytes * memory_share - resident) // self.page_bytes(kv)))


MODELS = {
    shapes.name: shapes
    for shapes in (
        Shapes("small", 24, 1024, 16, melody=False),
        Shapes("medium", 48, 1536, 24, melody=False),
        Shapes("melody", 48, 1536, 24, melody=True),
        Shapes("large", 48, 2048, 32, melody=False),
        Shapes("melody-large", 48, 2048, 32, melody=True),
    )
}
"""Sizes of the released models."""


def model_config(shapes: Shapes) -> ModelConfig:
    """The configuration for the scheduler and its sequences: real lengths, embeddings of width 1.

    Widths only affect the contents of page keys, and a width of 1 keeps keys distinct and cheap.
    """
    codec = CodecConfig(
        sample_rate=32000,
        num_codebooks=NUM_CODEBOOKS,
        codebook_size=CODEBOOK_SIZE,
        codebook_dim=128,
        hidden_size=128,
        num_filters=64,
        upsampling_ratios=(8, 5, 4, 4),
        num_residual_layers=1,
        num_lstm_layers=2,
        kernel_size=7,
        last_kernel_size=7,
        residual_kernel_size=3,
        dilation_growth_rate=2,
        compress=2,
        conv_shortcut=False,
        pad_mode="reflect",
    )
    decoder = DecoderConfig(shapes.num_layers, 1, 1, 4, NUM_CODEBOOKS, CODEBOOK_SIZE, not shapes.melody)
    chroma = ChromaConfig() if shapes.melody else None
    return ModelConfig(shapes.name, decoder, codec, 1, chroma, audio_channels=1, license="none")
