"""Tiny seeded checkpoints of every kind, written by transformers itself, in Hugging Face layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import (
    EncodecConfig,
    MusicgenConfig,
    MusicgenForConditionalGeneration,
    MusicgenMelodyConfig,
    MusicgenMelodyForConditionalGeneration,
    PreTrainedModel,
    T5Config,
)
from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig
from transformers.models.musicgen_melody.configuration_musicgen_melody import MusicgenMelodyDecoderConfig

CODEBOOK_SIZE = 128
GOLDEN = Path(__file__).parent / "golden"
T5_SNAPSHOT = next((GOLDEN / "audiocraft/hub/models--t5-base/snapshots").iterdir())

KINDS = {
    "text": {"melody": False, "stereo": False},
    "melody": {"melody": True, "stereo": False},
    "text-stereo": {"melody": False, "stereo": True},
    "melody-stereo": {"melody": True, "stereo": True},
}


def build(*, melody: bool, stereo: bool, seed: int = 0) -> PreTrainedModel:
    """A model of the true architecture, 64 wide, whose weights are large enough for varied codes."""
    torch.manual_seed(seed)
    text = T5Config(vocab_size=32128, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
    audio = EncodecConfig(
        sampling_rate=32000,
        audio_channels=1,
        normalize=False,
        num_filters=4,
        hidden_size=16,
        codebook_size=CODEBOOK_SIZE,
        codebook_dim=16,
        upsampling_ratios=[8, 5, 4, 4],
        use_causal_conv=False,
        use_conv_shortcut=False,
        target_bandwidths=[1.4],
    )
    decoder_class = MusicgenMelodyDecoderConfig if melody else MusicgenDecoderConfig
    decoder = decoder_class(
        vocab_size=CODEBOOK_SIZE,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        ffn_dim=160,
        num_codebooks=8 if stereo else 4,
        audio_channels=2 if stereo else 1,
        pad_token_id=CODEBOOK_SIZE,
        bos_token_id=CODEBOOK_SIZE,
    )
    config_class = MusicgenMelodyConfig if melody else MusicgenConfig
    model_class = MusicgenMelodyForConditionalGeneration if melody else MusicgenForConditionalGeneration
    config = config_class(text_encoder=text.to_dict(), audio_encoder=audio.to_dict(), decoder=decoder.to_dict())
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "decoder.embed_tokens" in name:
                parameter.normal_(std=1.0)
            elif name.startswith(("decoder.", "enc_to_dec", "audio_enc_to_dec")) and parameter.dim() > 1:
                parameter.normal_(std=0.25)
            elif name.startswith("decoder.") and "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif name.endswith(("proj.bias", "codebook.embed")):
                parameter.normal_(std=0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("codebook.embed"):
                buffer.normal_()
    model.generation_config.pad_token_id = CODEBOOK_SIZE
    model.generation_config.decoder_start_token_id = CODEBOOK_SIZE
    return model


def save(model: PreTrainedModel, folder: Path, *, max_shard_size: str = "5GB") -> Path:
    """Write `model` and the T5 tokenizer to `folder`."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(T5_SNAPSHOT / name, folder / name)
    return folder


def tune(seconds: float, sample_rate: int = 32000, first_note: int = 0) -> torch.Tensor:
    """A melody `[1, N]`: a scale of plucked harmonic tones, half a second each."""
    t = torch.arange(int(seconds * sample_rate)) / sample_rate
    note = (t * 2).long()
    steps = torch.tensor([0, 2, 4, 5, 7, 9, 11, 12, 7, 4])[(note + first_note) % 10]
    phase = 2 * torch.pi * 220 * 2 ** (steps / 12) * t
    envelope = torch.exp(-3 * (t * 2 - note) / 2)
    return (0.3 * envelope * sum(torch.sin(n * phase) / n for n in (1, 2, 3)))[None]
