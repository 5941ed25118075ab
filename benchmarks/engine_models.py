"""Models of the real sizes with random weights, ours and transformers', for timing only.

Speed does not depend on the weights' values, as long as they are finite and not denormal. Ours are created in packed
form, so that the 1.5 B model never exists in fp32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from musicgen_kernels import PackedLinear, pack_linear, sinusoid_table
from musicgen_kernels.packing import HEADER, TILE, Kind, unpack_header
from musicgen_kernels.step import BlockWeights, CrossWeights, DecoderWeights, Norm
from torch import Tensor, nn

from musicgen.config import ChromaConfig, CodecConfig, DecoderConfig, ModelConfig
from musicgen.models.encodec import EncodecDecoder
from musicgen.models.language_model import LanguageModel
from musicgen.types import CodesRequest, Conditioning, SamplingParams, Window

TEXT_DIM = 768
TEXT_LEN = 16
"""Tokens of a prompt; the model card's examples have 4 to 20."""
SIZES = {"small": (24, 1024, 16), "melody": (48, 1536, 24)}
"""Layers, width, heads."""
CODEC = CodecConfig(
    sample_rate=32000,
    num_codebooks=4,
    codebook_size=2048,
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


def model_config(size: str) -> ModelConfig:
    """`small`: text by cross-attention; `melody`: chroma and text as a prefix."""
    layers, dim, heads = SIZES[size]
    decoder = DecoderConfig(layers, dim, heads, 4 * dim, 4, 2048, cross_attention=size != "melody")
    chroma = ChromaConfig() if size == "melody" else None
    return ModelConfig(size, decoder, CODEC, TEXT_DIM, chroma, audio_channels=1, license="none")


def fill(module: nn.Module) -> nn.Module:
    """Fill parameters and buffers (mutated) with random values of a trained model's magnitude."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                bound = tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 1.0
                tensor.uniform_(-bound, bound)
    return module.requires_grad_(False)


def language_model(size: str) -> LanguageModel:
    """The projections and embeddings; the layers stay on the meta device, `packed_weights` replaces them."""
    torch.manual_seed(0)
    with torch.device("meta"):
        lm = LanguageModel(model_config(size))
    for module in (lm.text_proj, lm.chroma_proj):
        if module is not None:
            fill(module.to_empty(device="cpu"))
    fill(lm.decoder.out_norm.to_empty(device="cpu"))
    return lm


def packed_weights(config: ModelConfig, kind: Kind, max_positions: int) -> DecoderWeights:
    """Random decoder weights in the packed form of `kind`."""
    torch.manual_seed(0)
    decoder = config.decoder
    dim, books = decoder.dim, decoder.num_codebooks
    return DecoderWeights(
        embeddings=torch.rand(books, decoder.codebook_size + 1, dim) - 0.5,
        sinusoids=sinusoid_table(max_positions, dim),
        blocks=tuple(_block(decoder, kind) for _ in range(decoder.num_layers)),
        final_norm=_norm(dim),
        heads=_packed(books * decoder.codebook_size, dim, kind),
        num_heads=decoder.num_heads,
    )


def _block(decoder: DecoderConfig, kind: Kind) -> BlockWeights:
    dim, ffn = decoder.dim, decoder.ffn_dim
    cross = None
    if decoder.cross_attention:
        square = [_packed(dim, dim, kind) for _ in range(2)]
        cross = CrossWeights(_norm(dim), square[0], _packed(2 * dim, dim, kind), square[1])
    return BlockWeights(
        self_norm=_norm(dim),
        qkv=_packed(3 * dim, dim, kind),
        out=_packed(dim, dim, kind),
        cross=cross,
        ffn_norm=_norm(dim),
        fc1=_packed(ffn, dim, kind),
        fc2=_packed(dim, ffn, kind),
    )


def _norm(dim: int) -> Norm:
    return Norm(torch.rand(dim) + 0.5, torch.rand(dim) - 0.5)


def _packed(num_outputs: int, num_inputs: int, kind: Kind) -> PackedLinear:
    """Packs one random block of 16 outputs and repeats it: fast, and every weight still has its own memory."""
    tile = pack_linear((torch.rand(TILE, num_inputs) - 0.5) * 2 * num_inputs**-0.5, kind, order="tiles")
    parts = [tile.codes.repeat(num_outputs // TILE)]
    if tile.group_len:
        parts.append(tile.scales.view(torch.uint8).flatten().repeat(num_outputs // TILE))
    whole = replace(tile, out_features=num_outputs)
    header = tile.data[: HEADER.size].clone()
    fields = list(HEADER.unpack(bytes(header.numpy())))
    fields[4], fields[-1] = num_outputs, whole.scales_offset
    header = torch.frombuffer(bytearray(HEADER.pack(*fields)), dtype=torch.uint8)
    return unpack_header(torch.cat([header, *parts]))


def codec_decoder() -> EncodecDecoder:
    """EnCodec's decoder at 32 kHz with random weights."""
    torch.manual_seed(0)
    return cast(EncodecDecoder, fill(EncodecDecoder(CODEC)))


def codes_request(size: str, num_frames: int, seed: int, *, text_len: int = TEXT_LEN) -> CodesRequest:
    """A guided request of one window, with a random melody if the model supports it."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(text_len, TEXT_DIM, generator=generator)
    chroma: Tensor | None = None
    if (config := model_config(size).chroma) is not None:
        notes = torch.randint(config.num_chroma, (config.num_frames,), generator=generator)
        chroma = nn.functional.one_hot(notes, config.num_chroma).float()
    window = (Window(0, num_frames), Conditioning(text, chroma))
    return CodesRequest((window,), SamplingParams(seed=seed))


def transformers_decoder(size: str) -> Any:
    """transformers' decoder of the same shape in fp32, with its default attention."""
    from transformers import MusicgenForCausalLM, MusicgenMelodyForCausalLM
    from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig
    from transformers.models.musicgen_melody.configuration_musicgen_melody import MusicgenMelodyDecoderConfig

    layers, dim, heads = SIZES[size]
    melody = size == "melody"
    config = (MusicgenMelodyDecoderConfig if melody else MusicgenDecoderConfig)(
        vocab_size=2048,
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ffn_dim=4 * dim,
        num_codebooks=4,
        pad_token_id=2048,
        bos_token_id=2048,
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = (MusicgenMelodyForCausalLM if melody else MusicgenForCausalLM)(config)
    return fill(model.to_empty(device="cpu")).eval()
