"""Training-time forward pass over the parameters of transformers' ``MusicgenMelodyForConditionalGeneration``.

Implements a training step (prefix of chroma and text, sinusoidal positions with arbitrary start, causal transformer in
bfloat16 where the processor supports it, one loss per codebook) and the special initialisation. It uses the parameters
of the Hugging Face model, so checkpoints are unchanged; tests compare this pass with transformers'.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MusicgenMelodyForConditionalGeneration

from musicgen.demo import align
from musicgen.demo.dataset import SPECIAL, Batch
from musicgen.demo.model import CHROMA_LEN
from musicgen.demo.score import STYLES
from musicgen.demo.text import TEXT_LEN, build_tokenizer

PREFIX_LEN = CHROMA_LEN + TEXT_LEN
MAX_STEPS = 1504


def product_dtype() -> torch.dtype:
    """bfloat16 if the processor has instructions for it, else float32, which is faster without them."""
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def sinusoidal_positions(length: int, dim: int) -> Tensor:
    """``[cos, sin]`` of ``pos / 10000^(i / (dim/2 − 1))``: float32 ``[length, dim]`` (MusicGen's positions)."""
    frequencies = torch.exp(torch.arange(dim // 2) * -(math.log(10000.0) / (dim // 2 - 1)))
    phases = torch.arange(length)[:, None] * frequencies[None, :]
    return torch.cat([phases.cos(), phases.sin()], dim=1)


def initialise(model: MusicgenMelodyForConditionalGeneration, seed: int, num_fit_steps: int = 400) -> None:
    """Initialises the first layer's heads to attend to the current chroma frame, the next, recent steps and the text.

    Modifies ``model`` in place.
    """
    decoder = model.decoder.model.decoder
    dim, head_dim = decoder.config.hidden_size, decoder.config.hidden_size // decoder.config.num_attention_heads
    positions = sinusoidal_positions(PREFIX_LEN + MAX_STEPS, dim)
    targets = (
        (0, 0, align.chroma_targets(MAX_STEPS, PREFIX_LEN, CHROMA_LEN, 0.0, 0.6)),
        (0, 1, align.chroma_targets(MAX_STEPS, PREFIX_LEN, CHROMA_LEN, 2.0, 0.8)),
        (0, 2, align.recent_targets(MAX_STEPS, PREFIX_LEN, 1.0, 1.0)),
        (0, 3, align.text_targets(MAX_STEPS, PREFIX_LEN, TEXT_LEN)),
    )
    with torch.no_grad():
        # Strong enough relative to the positions, whose root mean square is 0.7.
        model.audio_enc_to_dec_proj.weight.normal_(std=0.4)
        model.enc_to_dec_proj.weight.normal_(std=0.06)
        model.audio_enc_to_dec_proj.bias.zero_()
        for table in decoder.embed_tokens:
            table.weight.normal_(std=0.1)
    for layer, head, target in targets:
        query, key, loss = align.fit_head(positions, target, head_dim, seed=seed, num_steps=num_fit_steps)
        attention, rows = decoder.layers[layer].self_attn, slice(head * head_dim, (head + 1) * head_dim)
        with torch.no_grad():
            attention.q_proj.weight[rows] = query
            attention.k_proj.weight[rows] = key
        print(f"layer {layer} head {head}: cross-entropy {loss:.3f} nats after the fit", flush=True)


def _attention(x: Tensor, attention: Any, num_heads: int) -> Tensor:
    weight = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]).to(x.dtype)
    rows, length, dim = x.shape
    qkv = F.linear(x, weight).view(rows, length, 3, num_heads, dim // num_heads).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
    return F.linear(mixed.transpose(1, 2).reshape(rows, length, dim), attention.out_proj.weight.to(x.dtype))


def _normalise(x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps).to(dtype)


def hidden_states(
    model: MusicgenMelodyForConditionalGeneration, batch: Batch, dtype: torch.dtype | None = None
) -> Tensor:
    """States after the final norm at the code steps: ``[B, S, dim]`` of ``dtype``; products run in ``dtype``.

    ``dtype`` None: ``product_dtype()``.
    """
    dtype = dtype or product_dtype()
    decoder = model.decoder.model.decoder
    text = model.text_encoder(input_ids=batch.text_ids).last_hidden_state
    text = model.enc_to_dec_proj(text) * batch.text_mask[:, None, None]
    chroma = model.audio_enc_to_dec_proj.weight.t()[batch.chroma] + model.audio_enc_to_dec_proj.bias
    tables = enumerate(decoder.embed_tokens)
    codes = torch.stack([F.embedding(batch.inputs[:, k], table.weight) for k, table in tables]).sum(dim=0)
    prefix_len, num_steps = chroma.shape[1] + text.shape[1], batch.inputs.shape[-1]
    positions = sinusoidal_positions(prefix_len + batch.offset + num_steps, decoder.config.hidden_size)
    positions = torch.cat([positions[:prefix_len], positions[prefix_len + batch.offset :]])
    x = torch.cat([chroma, text, codes], dim=1) + positions
    for layer in decoder.layers:
        normed = _normalise(x, layer.self_attn_layer_norm, dtype)
        x = x + _attention(normed, layer.self_attn, decoder.config.num_attention_heads)
        normed = _normalise(x, layer.final_layer_norm, dtype)
        inner = F.gelu(F.linear(normed, layer.fc1.weight.to(dtype)))
        x = x + F.linear(inner, layer.fc2.weight.to(dtype))
    return _normalise(x[:, prefix_len:], decoder.layer_norm, dtype)


def codebook_losses(
    model: MusicgenMelodyForConditionalGeneration, batch: Batch, dtype: torch.dtype | None = None
) -> Tensor:
    """Mean cross-entropy of each codebook in nats per code, excluding special positions: float32 ``[K]``."""
    x = hidden_states(model, batch, dtype)
    dtype = x.dtype
    losses = []
    for k, head in enumerate(model.decoder.lm_heads):
        logits = F.linear(x, head.weight.to(dtype)).float().flatten(0, 1)
        losses.append(F.cross_entropy(logits, batch.targets[:, k].flatten(), ignore_index=SPECIAL))
    return torch.stack(losses)


@torch.no_grad()
def text_separation(model: MusicgenMelodyForConditionalGeneration) -> float:
    """How well the decoder can distinguish the styles' names; 0 if two of them coincide.

    The smallest distance between two styles' projected states (averaged over the tokens), relative to their mean norm.
    """
    tokenizer = build_tokenizer()
    ids = torch.tensor([tokenizer.encode(style.names[0]).ids for style in STYLES.values()])
    means = model.enc_to_dec_proj(model.text_encoder(input_ids=ids).last_hidden_state).mean(dim=1)
    distances = torch.pdist(means)
    return float(distances.min() / means.norm(dim=1).mean())
