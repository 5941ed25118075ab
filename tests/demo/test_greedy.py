"""The embedded model is the same model to transformers and to the engine."""

from __future__ import annotations

import pytest
import torch
from tiny import tune
from transformers import AutoTokenizer, MusicgenMelodyForConditionalGeneration

from musicgen import MusicGen
from musicgen.demo import checkpoint_path

NUM_FRAMES = 100


@pytest.mark.parametrize("prompt", ["happy rock", "sad jazz"])
def test_greedy_codes_equal_transformers(prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = MusicGen.get_pretrained("demo")
    ours.set_generation_params(duration=NUM_FRAMES / 50, use_sampling=False)
    melody = tune(10.0)
    result = ours.generate_with_chroma([prompt], melody, 32000, return_tokens=True)
    assert isinstance(result, tuple)

    peer = MusicgenMelodyForConditionalGeneration.from_pretrained(checkpoint_path(), dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    decode = peer.audio_encoder.decode

    def spy(audio_codes: torch.Tensor, *args: object, **kwargs: object) -> object:
        seen.append(audio_codes[0, 0])
        return decode(audio_codes, *args, **kwargs)

    monkeypatch.setattr(peer.audio_encoder, "decode", spy)
    ids = torch.tensor([AutoTokenizer.from_pretrained(checkpoint_path()).encode(prompt)])
    assert ours.model.chroma is not None
    (chroma,) = ours.model.chroma([(melody, 32000)])
    with torch.no_grad():
        wav = peer.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            input_features=chroma[None],
            do_sample=False,
            guidance_scale=3.0,
            max_new_tokens=NUM_FRAMES + 3,
        )
    assert torch.equal(result[1][0], seen[0])
    torch.testing.assert_close(result[0][0], wav[0], atol=1e-4, rtol=0)
