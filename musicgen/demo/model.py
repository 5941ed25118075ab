"""The demo model's configuration, and its checkpoint in Hugging Face layout.

Defines a small version of MusicGen's melody architecture and the contents of a checkpoint folder. Independent of
training.
"""

import json
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    EncodecModel,
    GenerationConfig,
    MusicgenMelodyConfig,
    MusicgenMelodyDecoderConfig,
    MusicgenMelodyFeatureExtractor,
    MusicgenMelodyForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
)

from musicgen.demo.text import END, PAD, UNKNOWN, build_tokenizer

CODEBOOK_SIZE, NUM_CODEBOOKS = 1024, 4
CHROMA_LEN = 235
"""Chroma frames of the prefix: 30 s of melody, as in MusicGen; shorter melodies are repeated."""
HIDDEN_SIZE, NUM_LAYERS, NUM_HEADS = 256, 4, 4
INITIALISER_STD = 0.02


def model_config(codec: EncodecModel, vocabulary_size: int) -> MusicgenMelodyConfig:
    """Configuration of the language model and text encoder around a codec."""
    decoder = MusicgenMelodyDecoderConfig(
        vocab_size=CODEBOOK_SIZE,
        num_codebooks=NUM_CODEBOOKS,
        hidden_size=HIDDEN_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        ffn_dim=4 * HIDDEN_SIZE,
        max_position_embeddings=2048,
        dropout=0.0,
        initializer_factor=INITIALISER_STD,
        pad_token_id=CODEBOOK_SIZE,
        bos_token_id=CODEBOOK_SIZE,
        audio_channels=1,
    )
    text = T5Config(
        vocab_size=vocabulary_size,
        d_model=128,
        d_ff=256,
        d_kv=64,
        num_heads=2,
        num_layers=2,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    audio = {name: value for name, value in codec.config.to_dict().items() if name != "_name_or_path"}
    return MusicgenMelodyConfig(
        text_encoder=text.to_dict(),
        audio_encoder=audio,
        decoder=decoder.to_dict(),
        num_chroma=12,
        chroma_length=CHROMA_LEN,
    )


def load_codec(folder: Path) -> EncodecModel:
    """The codec from a folder with an ``EncodecModel`` or a whole checkpoint, in float32 and eval mode."""
    if AutoConfig.from_pretrained(folder).model_type == "musicgen_melody":
        whole = MusicgenMelodyForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        return whole.audio_encoder.eval()
    return EncodecModel.from_pretrained(folder, dtype=torch.float32).eval()


def build_model(codec: EncodecModel, seed: int) -> MusicgenMelodyForConditionalGeneration:
    """A freshly initialised float32 model around a trained codec; the codec's parameters do not require gradients."""
    torch.manual_seed(seed)
    model = MusicgenMelodyForConditionalGeneration(model_config(codec, build_tokenizer().get_vocab_size()))
    model.audio_encoder.load_state_dict(codec.state_dict())
    model.audio_encoder.requires_grad_(False)
    return model


def wrap_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer wrapped for transformers."""
    return PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(), pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=512
    )


def save_checkpoint(model: MusicgenMelodyForConditionalGeneration, folder: Path) -> None:
    """Writes model (float16, one file), tokenizer, feature extractor and generation settings into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    half = MusicgenMelodyForConditionalGeneration(model.config)
    half.half().load_state_dict(state)
    half.generation_config = GenerationConfig(
        bos_token_id=CODEBOOK_SIZE,
        pad_token_id=CODEBOOK_SIZE,
        decoder_start_token_id=CODEBOOK_SIZE,
        do_sample=True,
        guidance_scale=3.0,
        top_k=250,
        max_length=1500,
    )
    half.save_pretrained(folder)
    wrap_tokenizer().save_pretrained(folder)
    # The name supported by all transformers releases.
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)
    MusicgenMelodyFeatureExtractor().save_pretrained(folder)
