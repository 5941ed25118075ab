"""The shipped checkpoint: complete, small, loadable, and its output depends on both conditions."""

import json

import pytest
import torch
from transformers import AutoTokenizer, MusicgenMelodyForConditionalGeneration

from musicgen.demo import checkpoint_path
from musicgen.demo.generate import generate_codes
from musicgen.demo.model import load_codec
from musicgen.demo.text import build_tokenizer
from musicgen.demo.tokenise import decode, encode

pytestmark = pytest.mark.filterwarnings("ignore")


def test_files() -> None:
    folder = checkpoint_path()
    names = {path.name for path in folder.iterdir()}
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"}
    assert wanted | {"generation_config.json", "README.md"} <= names
    assert sum(path.stat().st_size for path in folder.iterdir()) < 25e6
    assert "_name_or_path" not in (folder / "config.json").read_text()
    config = json.loads((folder / "config.json").read_text())
    assert config["chroma_length"] == 235
    assert config["decoder"]["hidden_size"] // config["decoder"]["num_attention_heads"] == 64


def test_shipped_tokenizer_is_the_recipes() -> None:
    tokenizer, recipe = AutoTokenizer.from_pretrained(checkpoint_path()), build_tokenizer()
    for text in ("Happy rock", "an 80s pop track with bassy drums and synth", " "):
        assert tokenizer(text).input_ids == recipe.encode(text).ids


def test_codes_depend_on_melody_and_text() -> None:
    model = MusicgenMelodyForConditionalGeneration.from_pretrained(checkpoint_path(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    time = torch.arange(32000) / 32000
    low, high = (torch.sin(2 * torch.pi * hz * time)[None] for hz in (440.0, 622.0))

    def codes(text: str, melody: torch.Tensor) -> torch.Tensor:
        return generate_codes(model, tokenizer, [text], melody, 0.2, seed=0, top_k=1)

    first = codes("happy rock", low)
    assert first.shape == (1, 4, 10)
    assert int(first.max()) < 1024
    assert torch.equal(first, codes("happy rock", low))
    assert not torch.equal(first, codes("sad jazz", low))
    assert not torch.equal(first, codes("happy rock", high))


@pytest.mark.parametrize("hz", [466.2, 523.3, 830.6, 987.8])  # none of them a multiple of the 50 Hz frame rate
def test_the_codec_keeps_a_tone_at_its_own_pitch(hz: float) -> None:
    time = torch.arange(64000) / 32000
    tone = sum(0.2 * torch.sin(2 * torch.pi * hz * n * time) / n for n in range(1, 8))
    codec = load_codec(checkpoint_path())
    decoded = decode(codec, encode(codec, tone[None]))[0]
    middle = decoded[16000:48000] * torch.hann_window(32000)  # a second: bins of 1 Hz
    near = torch.fft.rfft(middle).abs()[round(hz) - 40 : round(hz) + 41]
    assert abs(int(near.argmax()) - 40) <= 2
