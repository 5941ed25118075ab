"""Checkpoints of both layouts: equality of twins, shards, pointers, and errors that name the tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file

from musicgen.errors import InvalidRequestError, WeightsError
from musicgen.model import Model
from musicgen.weights import checkpoint, load_model
from musicgen.weights.registry import MODELS


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def make(kind: str) -> Path:
        return Path(shutil.copytree(folders[kind], tmp_path / kind))

    return make


def _edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _audiocraft_twin(folder: Path, source: Path, *, melody: bool, stereo: bool) -> Path:
    """The language model of an HF checkpoint, written as audiocraft writes it; the codec by pointer."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(source.glob("*.safetensors")):
        tensors |= load_file(shard)
    config = json.loads((source / "config.json").read_text())
    decoder, body = config["decoder"], "decoder.model.decoder"
    state: dict[str, torch.Tensor] = {}
    conditioners = {"description": "enc_to_dec_proj"} | ({"self_wav": "audio_enc_to_dec_proj"} if melody else {})
    for theirs, ours in conditioners.items():
        for kind in ("weight", "bias"):
            state[f"condition_provider.conditioners.{theirs}.output_proj.{kind}"] = tensors[f"{ours}.{kind}"]
    if melody:
        state["condition_provider.conditioners.self_wav.chroma.spec.window"] = torch.hann_window(16384)
    for k in range(decoder["num_codebooks"]):
        state[f"emb.{k}.weight"] = tensors[f"{body}.embed_tokens.{k}.weight"]
        state[f"linears.{k}.weight"] = tensors[f"decoder.lm_heads.{k}.weight"]
    for i in range(decoder["num_hidden_layers"]):
        theirs, ours = f"transformer.layers.{i}", f"{body}.layers.{i}"
        blocks = {"self_attn": "self_attn"} | ({} if melody else {"cross_attention": "encoder_attn"})
        for their_block, our_block in blocks.items():
            fused = torch.cat([tensors[f"{ours}.{our_block}.{p}_proj.weight"] for p in "qkv"])
            state[f"{theirs}.{their_block}.in_proj_weight"] = fused
            state[f"{theirs}.{their_block}.out_proj.weight"] = tensors[f"{ours}.{our_block}.out_proj.weight"]
        state[f"{theirs}.linear1.weight"] = tensors[f"{ours}.fc1.weight"]
        state[f"{theirs}.linear2.weight"] = tensors[f"{ours}.fc2.weight"]
        norms = {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"}
        if not melody:
            norms["norm_cross"] = "encoder_attn_layer_norm"
        for their_norm, our_norm in norms.items():
            for kind in ("weight", "bias"):
                state[f"{theirs}.{their_norm}.{kind}"] = tensors[f"{ours}.{our_norm}.{kind}"]
    for kind in ("weight", "bias"):
        state[f"out_norm.{kind}"] = tensors[f"{body}.layer_norm.{kind}"]

    codec_folder = folder / "codec"
    codec_folder.mkdir(parents=True)
    (codec_folder / "config.json").write_text(json.dumps(config["audio_encoder"]))
    prefix = "audio_encoder."
    codec = {n.removeprefix(prefix): t.contiguous() for n, t in tensors.items() if n.startswith(prefix)}
    save_file(codec, codec_folder / "model.safetensors")

    text_folder = folder / "t5"
    text_folder.mkdir()
    (text_folder / "config.json").write_text(json.dumps(config["text_encoder"]))
    prefix = "text_encoder."
    save_file(
        {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)},
        text_folder / "model.safetensors",
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, text_folder / name)

    reference = torch.load(tiny.GOLDEN / "audiocraft/text/state_dict.bin", weights_only=True)
    cfg = yaml.safe_load(reference["xp.cfg"])
    cfg["transformer_lm"] |= {
        "dim": decoder["hidden_size"],
        "num_heads": decoder["num_attention_heads"],
        "num_layers": decoder["num_hidden_layers"],
        "hidden_scale": decoder["ffn_dim"] / decoder["hidden_size"],
        "n_q": decoder["num_codebooks"],
        "card": decoder["vocab_size"],
    }
    cfg["conditioners"]["description"]["t5"]["name"] = str(text_folder)
    if melody:
        cfg["conditioners"]["self_wav"] = {
            "model": "chroma_stem",
            "chroma_stem": {"duration": 30.0, "n_chroma": 12, "radix2_exp": 14, "argmax": True},
        }
        cfg["fuser"] |= {"cross": [], "prepend": ["self_wav", "description"]}
    if stereo:
        cfg["interleave_stereo_codebooks"] = {"use": True, "per_timestep": False}
        cfg["codebooks_pattern"]["delay"]["delays"] = [0, 0, 1, 1, 2, 2, 3, 3]
    torch.save({"best_state": state, "xp.cfg": yaml.safe_dump(cfg), "version": "1"}, folder / "state_dict.bin")
    torch.save({"pretrained": str(codec_folder)}, folder / "compression_state_dict.bin")
    return folder


@pytest.mark.parametrize("kind", ["text", "melody", "text-stereo", "melody-stereo"])
def test_audiocraft_twin_is_the_same_model(
    kind: str, folders: dict[str, Path], models: dict[str, Model], tmp_path: Path
) -> None:
    melody, stereo = "melody" in kind, "stereo" in kind
    twin = load_model(str(_audiocraft_twin(tmp_path / kind, folders[kind], melody=melody, stereo=stereo)))
    model = models[kind]
    assert twin.config.decoder == model.config.decoder
    assert twin.config.codec == model.config.codec
    assert twin.config.chroma == model.config.chroma
    assert twin.config.audio_channels == model.config.audio_channels
    for ours, theirs in (
        (model.lm, twin.lm),
        (model.codec, twin.codec),
        (model.text_encoder.model, twin.text_encoder.model),
    ):
        expected, got = ours.state_dict(), theirs.state_dict()
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_missing_extra_and_misshaped_tensors_are_named(copy: Callable[[str], Path]) -> None:
    folder = copy("text")

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["decoder.model.decoder.layers.1.fc1.weight"]
        tensors["decoder.model.decoder.layers.9.fc1.weight"] = torch.zeros(2, 2)
        tensors["decoder.lm_heads.2.weight"] = torch.zeros(7, 64)

    _edit(folder, damage)
    with pytest.raises(WeightsError) as error:
        load_model(str(folder))
    message = str(error.value)
    assert "missing: decoder.model.decoder.layers.1.fc1.weight" in message
    assert "not known: decoder.model.decoder.layers.9.fc1.weight" in message
    assert "decoder.lm_heads.2.weight" in message
    assert "got" in message


def test_missing_codec_tensor_is_named(copy: Callable[[str], Path]) -> None:
    folder = copy("text")
    _edit(folder, lambda tensors: tensors.__delitem__("audio_encoder.decoder.layers.0.conv.bias"))
    with pytest.raises(WeightsError, match=r"decoder\.layers\.0\.conv\.bias"):
        load_model(str(folder))


def test_missing_shard_is_named(copy: Callable[[str], Path]) -> None:
    folder = copy("text-stereo")
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(WeightsError, match=shard.name):
        load_model(str(folder))


def test_damaged_file_is_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("text")
    (folder / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(WeightsError, match="damaged"):
        load_model(str(folder))


class _Bomb:
    """Pickles to a call of a function that leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("legacy", [False, True])
def test_bin_files_execute_nothing(tmp_path: Path, legacy: bool) -> None:
    mark, path = tmp_path / "mark", tmp_path / "state_dict.bin"
    torch.save({"best_state": _Bomb(mark)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(WeightsError, match="plain tensors"):
        checkpoint.load_bin(path)
    assert not mark.exists()
    torch.save({"x": torch.ones(2)}, path, _use_new_zipfile_serialization=not legacy)
    assert "x" in checkpoint.load_bin(path)


def test_audiocraft_options_that_change_the_architecture_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = _audiocraft_twin(tmp_path / "twin", folders["text"], melody=False, stereo=False)
    content = torch.load(folder / "state_dict.bin", weights_only=True)
    cfg = yaml.safe_load(content["xp.cfg"])
    cfg["transformer_lm"]["qk_layer_norm"] = True
    torch.save(content | {"xp.cfg": yaml.safe_dump(cfg)}, folder / "state_dict.bin")
    with pytest.raises(WeightsError, match="qk_layer_norm"):
        load_model(str(folder))


@pytest.mark.parametrize("name", ["no-such-model", "./nowhere", "a/b/c", ""])
def test_unknown_names(name: str) -> None:
    with pytest.raises(InvalidRequestError, match="short names: demo"):
        load_model(name)


def test_known_model_offline_says_what_to_do() -> None:
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE"):
        load_model("melody")


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"config\.json"):
        load_model(str(tmp_path))


def test_other_model_type(copy: Callable[[str], Path]) -> None:
    folder = copy("text")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "bert"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="not a MusicGen checkpoint"):
        load_model(str(folder))


@pytest.mark.parametrize(("device", "dtype"), [("nowhere", None), ("cpu", torch.int8)])
def test_unknown_device_or_dtype(device: str, dtype: torch.dtype | None) -> None:
    with pytest.raises(InvalidRequestError):
        load_model("demo", device, dtype)


def test_every_released_model_has_a_short_name_and_a_licence() -> None:
    sizes = ["small", "medium", "melody", "large", "melody-large"]
    assert set(MODELS) == {"demo", *sizes, *(f"stereo-{size}" for size in sizes)}
    assert all(card.license == "CC-BY-NC-4.0" for name, card in MODELS.items() if name != "demo")
