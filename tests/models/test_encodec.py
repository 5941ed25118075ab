"""The codec against transformers and audiocraft: whole decode, audio prompts, checkpoints of both layouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import EncodecConfig, EncodecModel

from musicgen.errors import InvalidRequestError, WeightsError
from musicgen.models import encodec
from musicgen.models.encodec import EncodecDecoder
from musicgen.weights import codec as weights
from musicgen.weights.codec_config import codec_config_from_audiocraft, codec_config_from_hf

GOLDEN = Path(__file__).parent.parent / "golden" / "audiocraft" / "text"

VARIANTS: dict[str, dict[str, Any]] = {
    "reflect": {"pad_mode": "reflect"},
    "constant": {"pad_mode": "constant"},
    "replicate": {"pad_mode": "replicate"},
    "deep": {"num_residual_layers": 3, "dilation_growth_rate": 3, "use_conv_shortcut": True},
    "odd": {"upsampling_ratios": [3, 2], "kernel_size": 5, "last_kernel_size": 3, "num_lstm_layers": 1},
}


def peer(variant: str) -> EncodecModel:
    """transformers' codec, tiny, with codes that differ in sound and biases that do not drown them."""
    torch.manual_seed(3)
    settings = {
        "sampling_rate": 32000, "target_bandwidths": [1.2], "num_filters": 4, "hidden_size": 16, "codebook_size": 64,
        "upsampling_ratios": [8, 5, 4, 4], "use_causal_conv": False, "use_conv_shortcut": False,
    }  # fmt: skip
    config = EncodecConfig(**{**settings, **VARIANTS[variant]})
    config.target_bandwidths = [4.5 * config.frame_rate * 6 / 1000]
    model = EncodecModel(config).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("codebook.embed"):
                tensor.normal_()
            elif "weight.original0" in name:  # the gains of the weight normalisation
                tensor.mul_(1.5)
            elif name.endswith("conv.bias"):
                tensor.mul_(0.1)
    return model


def ours(model: EncodecModel) -> tuple[EncodecDecoder, Any]:
    config = codec_config_from_hf(model.config.to_dict())
    return weights.build_codec(config, weights.codec_tensors_from_hf(model.state_dict(), config))


def peer_decode(model: EncodecModel, codes: Tensor) -> Tensor:
    with torch.no_grad():
        return model.decode(codes[None], [None]).audio_values[:, 0]


def draw_codes(model: EncodecModel, batch: int, num_frames: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_frames)
    return torch.randint(0, 64, (batch, model.config.num_quantizers, num_frames), generator=generator)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_decode_equals_transformers(variant: str, batch: int) -> None:
    """One signal goes through other products than several."""
    model = peer(variant)
    decoder, _ = ours(model)
    for num_frames in (1, 2, 3, 4, 5, 49, 50, 51, 120):
        codes = draw_codes(model, batch, num_frames)
        expected = peer_decode(model, codes)
        got = decoder.decode_whole(codes)
        assert got.shape == expected.shape == (batch, num_frames * decoder.config.hop_length)
        assert expected.std() > 0.01
        assert (got - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("variant", ["reflect", "odd"])
def test_the_lstm_of_wide_codecs_equals_transformers(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encodec, "_FUSED_LSTM_SIZE", 0)
    model = peer(variant)
    codes = draw_codes(model, 2, 31)
    decoder, _ = ours(model)
    assert (decoder.decode_whole(codes) - peer_decode(model, codes)).abs().max() <= 1e-5
    begin, state = decoder.decode(codes[..., :9], decoder.initial_state(2), last=False)
    end, _ = decoder.decode(codes[..., 9:], state, last=True)
    assert (torch.cat([begin, end], -1) - peer_decode(model, codes)).abs().max() <= 1e-5


def test_every_pad_mode_sounds_different_at_the_ends() -> None:
    """Otherwise the tests of the modes could not tell them apart."""
    model = peer("reflect")
    codes = draw_codes(model, 1, 20)
    decoder, _ = ours(model)
    reference = decoder.decode_whole(codes)
    for mode in ("constant", "replicate"):
        other = EncodecDecoder(replace(decoder.config, pad_mode=mode))  # type: ignore[arg-type]
        other.load_state_dict(decoder.state_dict())
        difference = (other.decode_whole(codes) - reference).abs()[0]
        assert difference[:640].max() > 1e-4
        assert difference[-640:].max() > 1e-4


def test_fewer_codebooks_decode_as_in_transformers() -> None:
    model = peer("reflect")
    codes = draw_codes(model, 1, 12)[:, :2]
    assert (ours(model)[0].decode_whole(codes) - peer_decode(model, codes)).abs().max() <= 1e-5


@pytest.mark.parametrize("variant", ["reflect", "constant", "deep"])
@pytest.mark.parametrize("num_samples", [1, 640, 641, 20_001])
def test_audio_prompt_gives_transformers_codes(variant: str, num_samples: int) -> None:
    model = peer(variant)
    _, encoder = ours(model)
    samples = 0.3 * torch.sin(torch.arange(num_samples) * 0.05) + 0.01 * torch.randn(num_samples)
    with torch.no_grad():
        expected = model.encode(samples[None, None], bandwidth=model.config.target_bandwidths[0]).audio_codes[0, 0]
    codes = encoder.encode(samples)
    assert codes.shape == (4, -(-num_samples // 640))
    assert codes.dtype == torch.int64
    assert torch.equal(codes, expected)
    right = samples.flip(0)
    stereo = encoder.encode(torch.stack([samples, right]))
    assert torch.equal(stereo[0::2], codes)
    assert torch.equal(stereo[1::2], encoder.encode(right))


def test_tensor_names_and_shapes_are_those_of_transformers() -> None:
    for variant in VARIANTS:
        model = peer(variant)
        for module in model.modules():
            if torch.nn.utils.parametrize.is_parametrized(module):
                torch.nn.utils.parametrize.remove_parametrizations(module, "weight")
        names = {n: tuple(t.shape) for n, t in model.state_dict().items()
                 if not n.endswith(("inited", "cluster_size", "embed_avg"))}  # fmt: skip
        assert weights.codec_shapes(codec_config_from_hf(model.config.to_dict())) == names


def test_both_spellings_of_the_weight_norm_and_half_precision_load() -> None:
    model = peer("reflect")
    config = codec_config_from_hf(model.config.to_dict())
    reference = weights.codec_tensors_from_hf(model.state_dict(), config)
    old = {
        name.replace("parametrizations.weight.original0", "weight_g")
        .replace("parametrizations.weight.original1", "weight_v"): tensor
        for name, tensor in model.state_dict().items()
    }  # fmt: skip
    assert any(name.endswith("weight_g") for name in old)
    for name, tensor in weights.codec_tensors_from_hf(old, config).items():
        assert torch.equal(tensor, reference[name])
    halves = {name: tensor.half() for name, tensor in old.items()}
    for name, tensor in weights.codec_tensors_from_hf(halves, config).items():
        assert tensor.dtype == torch.float32
        assert torch.allclose(tensor, reference[name], atol=2e-3)


def golden_codec() -> tuple[dict[str, Any], EncodecDecoder, Any]:
    file = torch.load(GOLDEN / "compression_state_dict.bin", weights_only=True)
    config = codec_config_from_audiocraft(file["xp.cfg"])
    decoder, encoder = weights.build_codec(config, weights.codec_tensors_from_audiocraft(file["best_state"], config))
    return file, decoder, encoder


@pytest.mark.parametrize("name", ["text0", "text1", "cfg1.5", "cont", "uncond"])
def test_audiocraft_checkpoint_decodes_to_audiocrafts_waveform(name: str) -> None:
    _, decoder, _ = golden_codec()
    golden = np.load(GOLDEN / "golden.npz")
    got = decoder.decode_whole(torch.from_numpy(golden[f"{name}_tokens"]))
    expected = torch.from_numpy(golden[f"{name}_wav"])[:, 0]
    assert decoder.config.pad_mode == "constant"
    assert (got - expected).abs().max() <= 1e-4


def test_audiocraft_prompt_gives_audiocrafts_codes() -> None:
    golden = np.load(GOLDEN / "golden.npz")
    codes = golden_codec()[2].encode(torch.from_numpy(golden["prompt_wav"])[0])
    assert torch.equal(codes, torch.from_numpy(golden["cont_tokens"])[0, :, : codes.shape[1]])
    assert codes.shape == (4, 50)


def test_wrong_tensors_are_named() -> None:
    file, _, _ = golden_codec()
    config = codec_config_from_audiocraft(file["xp.cfg"])
    state = dict(file["best_state"])
    bias = state.pop("decoder.model.3.convtr.convtr.bias")
    state["decoder.model.99.bias"] = bias
    state["quantizer.vq.layers.1._codebook.embed"] = torch.zeros(5, 16)
    with pytest.raises(WeightsError) as caught:
        weights.codec_tensors_from_audiocraft(state, config)
    message = str(caught.value)
    assert "missing decoder.layers.3.conv.bias" in message
    assert "unexpected decoder.layers.99.bias" in message
    assert "quantizer.layers.1.codebook.embed: expected (128, 16), got (5, 16)" in message
    state = dict(file["best_state"])
    state["encoder.model.0.conv.conv.weight_g"] = torch.ones(3, 1, 1)
    with pytest.raises(WeightsError, match=r"encoder\.layers\.0\.conv\.weight_g"):
        weights.codec_tensors_from_audiocraft(state, config)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("use_causal_conv", True), ("norm_type", "time_group_norm"), ("normalize", True), ("audio_channels", 2),
     ("chunk_length_s", 1.0), ("pad_mode", "circular")],
)  # fmt: skip
def test_codecs_of_another_kind_are_refused(setting: str, value: object) -> None:
    settings = peer("reflect").config.to_dict() | {setting: value}
    with pytest.raises(WeightsError, match=setting):
        codec_config_from_hf(settings)


def test_audiocraft_settings_are_read_and_checked() -> None:
    text = golden_codec()[0]["xp.cfg"]
    config = codec_config_from_audiocraft(text.replace("  sample_rate: 32000", "  sample_rate: ${sample_rate}"))
    assert (config.sample_rate, config.upsampling_ratios, config.num_codebooks) == (32000, (8, 5, 4, 4), 4)
    assert (config.codebook_size, config.num_lstm_layers, config.conv_shortcut) == (128, 2, False)
    for old, new, name in (
        ("renormalize: false", "renormalize: true", "encodec.renormalize"),
        ("final_activation: null", "final_activation: Tanh", "seanet.decoder"),
        ("norm: weight_norm", "norm: none", "seanet.norm"),
        ("  n_filters: 4\n", "", "seanet.n_filters"),
        ("pad_mode: constant", "pad_mode: circular", "pad_mode"),
        ("  sample_rate: 32000", "  sample_rate: ${encodec.sample_rate}", "circular"),
    ):
        assert old in text
        with pytest.raises(WeightsError, match=name):
            codec_config_from_audiocraft(text.replace(old, new))
    with pytest.raises(WeightsError, match="YAML"):
        codec_config_from_audiocraft("a: [")


@pytest.mark.parametrize(
    "codes",
    [torch.zeros(4, 5, dtype=torch.long), torch.zeros(1, 5, 5, dtype=torch.long), torch.zeros(1, 4, 5),
     torch.full((1, 4, 5), 64), torch.full((1, 4, 5), -1)],
)  # fmt: skip
def test_bad_codes_are_refused(codes: Tensor) -> None:
    with pytest.raises(InvalidRequestError, match="codes"):
        ours(peer("reflect"))[0].decode_whole(codes)


@pytest.mark.parametrize("samples", [torch.zeros(0), torch.zeros(3, 100), torch.zeros(1, 1, 100)])
def test_bad_prompts_are_refused(samples: Tensor) -> None:
    with pytest.raises(InvalidRequestError, match="prompt"):
        ours(peer("reflect"))[1].encode(samples)
