"""Generation for the evaluation: pieces by the project's engine, and codes by transformers to hold against them.

Owns nothing but the calls.  Both make the same codes where they take the likeliest one; the tests show it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import MusicgenMelodyForConditionalGeneration, PreTrainedTokenizerFast

from musicgen import MusicGen
from musicgen.config import CacheConfig, EngineConfig, KVDtype, WeightDtype
from musicgen.metrics import chromagram, one_hot_chroma
from musicgen.model import Model

FRAME_RATE_HZ, SAMPLE_RATE_HZ = 50, 32000


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
    model: Model,
    prompts: Sequence[str],
    melodies: Tensor,
    *,
    weights: WeightDtype = "float32",
    kv: KVDtype = "float32",
    num_threads: int = 1,
) -> Tensor:
    """What the engine makes of prompts and melodies with MusicGen's own settings (guidance 3, top-k 250).

    Args:
        model: loaded on the CPU.
        prompts: B texts.
        melodies: float ``[B, samples]`` at 32 kHz; the pieces get their length.
        weights: kind of the decoder's matrices.
        kv: kind of the keys and values.
        num_threads: of the engine.

    Returns:
        float32 ``[B, samples]``; piece i is drawn with seed i.
    """
    engine = EngineConfig(weights=weights, cache=CacheConfig(dtype=kv), num_threads=num_threads)
    musicgen = MusicGen(model, engine)
    musicgen.set_generation_params(duration=melodies.shape[-1] / SAMPLE_RATE_HZ)
    made = musicgen.generate_with_chroma(list(prompts), melodies[:, None], SAMPLE_RATE_HZ, seed=0)
    musicgen.close()
    assert isinstance(made, Tensor)
    return made[:, 0, : melodies.shape[-1]].float()
