"""Generation for the evaluation: pieces from the project's engine, and codes from transformers for comparison.

With greedy decoding both generate the same codes, as tests verify.
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
        texts: B non-empty prompts.
        melodies: float ``[B, samples]`` at 32 kHz, or None for no melody.
        duration_s: length of the result in seconds.
        seed: seeds the global generator, which transformers samples from.
        guidance: classifier-free guidance scale.
        top_k: number of codes kept at each step; 0 or 1 is greedy.

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
    # generate() would also decode, row by row; only its codes are needed.
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
    """Aborts transformers' generate before it decodes."""


def generate(
    model: Model,
    prompts: Sequence[str],
    melodies: Tensor,
    *,
    weights: WeightDtype = "float32",
    kv: KVDtype = "float32",
    num_threads: int = 1,
) -> Tensor:
    """Generate from prompts and melodies with the engine and MusicGen's default settings (guidance 3, top-k 250).

    Args:
        model: loaded on the CPU.
        prompts: B texts.
        melodies: float ``[B, samples]`` at 32 kHz; pieces have the same length.
        weights: type of the decoder's matrices.
        kv: dtype of keys and values.
        num_threads: of the engine.

    Returns:
        float32 ``[B, samples]``; piece i uses seed i.
    """
    engine = EngineConfig(weights=weights, cache=CacheConfig(dtype=kv), num_threads=num_threads)
    musicgen = MusicGen(model, engine)
    musicgen.set_generation_params(duration=melodies.shape[-1] / SAMPLE_RATE_HZ)
    made = musicgen.generate_with_chroma(list(prompts), melodies[:, None], SAMPLE_RATE_HZ, seed=0)
    musicgen.close()
    assert isinstance(made, Tensor)
    return made[:, 0, : melodies.shape[-1]].float()
