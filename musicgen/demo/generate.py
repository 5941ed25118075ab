"""Generation with a Hugging Face checkpoint through transformers, for the evaluation.

Owns nothing but the call: chroma in, audio out.  The project's own engine is not used here, so a figure of the model
never depends on it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import MusicgenMelodyForConditionalGeneration, PreTrainedTokenizerFast

from musicgen.demo.tokenise import decode
from musicgen.metrics import chromagram, one_hot_chroma

FRAME_RATE_HZ = 50


@torch.no_grad()
def generate_codes(
    model: MusicgenMelodyForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    melodies: Tensor | None,
    duration_s: float,
    *,
    seed: int,
    guidance: float = 3.0,
    top_k: int = 250,
) -> Tensor:
    """Sampled codes for prompts and melodies of one length.

    Args:
        model: float32 or bfloat16, on the CPU, in eval mode.
        tokenizer: of the same checkpoint.
        texts: B prompts, none of them empty.
        melodies: float ``[B, samples]`` at 32 kHz, or None for no melody.
        duration_s: length of the result in seconds.
        seed: of the global generator that transformers samples from.
        guidance: scale of classifier-free guidance.
        top_k: number of codes kept at each step; 0 or 1 takes the likeliest.

    Returns:
        int64 ``[B, K, T]``.
    """
    torch.manual_seed(seed)
    num_frames = round(duration_s * FRAME_RATE_HZ)
    tokens = tokenizer(list(texts), return_tensors="pt", padding=True)
    chroma = None if melodies is None else one_hot_chroma(chromagram(melodies)).to(model.dtype)
    num_codebooks = model.config.decoder.num_codebooks
    batch_size = len(texts)
    captured: list[Tensor] = []
    # generate() would decode as well, row by row; only its codes are wanted.
    original = model.audio_encoder.decode

    def keep(audio_codes: Tensor, *_: object, **__: object) -> object:
        captured.append(audio_codes[0])
        raise _CodesReadyError

    model.audio_encoder.decode = keep
    try:
        model.generate(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            input_features=chroma,
            do_sample=top_k > 1,
            top_k=top_k if top_k > 1 else None,
            guidance_scale=guidance,
            max_new_tokens=num_frames + num_codebooks - 1,
        )
    except _CodesReadyError:
        pass
    finally:
        model.audio_encoder.decode = original
    return captured[0].reshape(batch_size, num_codebooks, -1)[:, :, :num_frames]


class _CodesReadyError(Exception):
    """Leaves transformers' generate before it decodes."""


def generate(
    model: MusicgenMelodyForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    melodies: Tensor | None,
    duration_s: float,
    *,
    seed: int,
    guidance: float = 3.0,
    top_k: int = 250,
) -> Tensor:
    """As ``generate_codes``, decoded: float32 ``[B, samples]`` at 32 kHz."""
    codes = generate_codes(model, tokenizer, texts, melodies, duration_s, seed=seed, guidance=guidance, top_k=top_k)
    return decode(model.audio_encoder, codes)
