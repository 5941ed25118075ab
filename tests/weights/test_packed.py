"""Packed checkpoints: the same model from fewer bytes, without the original."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from musicgen_kernels import pack_linear
from tiny import tune

from musicgen import MusicGen
from musicgen.config import WeightDtype
from musicgen.errors import InvalidRequestError, WeightsError
from musicgen.weights import open_checkpoint


@pytest.mark.parametrize("kind", ["text", "melody-stereo"])
@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
def test_a_packed_model_makes_the_same_music(
    kind: str, weights: WeightDtype, folders: dict[str, Path], tmp_path: Path
) -> None:
    MusicGen.get_pretrained(str(folders[kind])).save_packed(tmp_path / "packed", weights)
    direct = MusicGen.get_pretrained(str(folders[kind]), weights=weights)
    loaded = MusicGen.get_pretrained(str(tmp_path / "packed"))
    assert loaded.model.config == direct.model.config
    pieces = []
    for model in (direct, loaded):
        model.set_generation_params(duration=0.6)
        pieces.append(model.generate_continuation(tune(0.2), 32000, ["rock"], seed=3))
    assert torch.equal(pieces[0], pieces[1])


def test_it_is_smaller(folders: dict[str, Path], tmp_path: Path) -> None:
    model = MusicGen.get_pretrained(str(folders["text"]))
    sizes = [
        sum(f.stat().st_size for f in model.save_packed(tmp_path / w, w).glob("*.safetensors"))
        for w in ("float32", "bfloat16", "int8", "int4")
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


def test_packed_weights_are_not_packed_again(folders: dict[str, Path], tmp_path: Path) -> None:
    MusicGen.get_pretrained(str(folders["text"])).save_packed(tmp_path / "packed", "int8")
    with pytest.raises(WeightsError, match="original"):
        MusicGen.get_pretrained(str(tmp_path / "packed")).save_packed(tmp_path / "again", "int4")
    used = MusicGen.get_pretrained(str(folders["text"]))
    used.set_generation_params(duration=0.1)
    used.generate(["rock"])
    with pytest.raises(WeightsError, match=r"original.* before the first generate\(\) or start\(\)"):
        used.save_packed(tmp_path / "again", "int4")


def test_packed_weights_are_of_one_kind(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = str(MusicGen.get_pretrained(str(folders["text"])).save_packed(tmp_path / "packed", "int8"))
    MusicGen.get_pretrained(folder, weights="int8")
    with pytest.raises(InvalidRequestError, match="expected int8"):
        MusicGen.get_pretrained(folder, weights="int4")


@pytest.fixture
def packed_elsewhere(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a GPU would have packed."""
    monkeypatch.setattr("musicgen.engine.packing.pack_linear", partial(pack_linear, order="rows"))
    return MusicGen.get_pretrained(str(folders["melody"])).save_packed(tmp_path / "rows", "int8")


def _undeclare(folder: Path) -> None:
    content = json.loads((folder / "musicgen.json").read_text())
    del content["order"]
    (folder / "musicgen.json").write_text(json.dumps(content))


@pytest.mark.parametrize("declared", [True, False])
def test_what_a_gpu_packed_goes_to_a_gpu(packed_elsewhere: Path, declared: bool) -> None:
    """The meta device stands for one."""
    if not declared:
        _undeclare(packed_elsewhere)
    lm, weights = open_checkpoint(str(packed_elsewhere), "meta").language_model()
    assert weights is not None
    assert (weights.heads.order, lm.device.type) == ("rows", "meta")
    block = weights.blocks[0]
    tensors = [weights.heads.data, weights.embeddings, weights.sinusoids, block.qkv.data, block.self_norm.weight]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {tensor.device.type for tensor in (lm.text_proj.weight, lm.get_parameter("chroma_proj.bias"))} == {"meta"}
    with pytest.raises(WeightsError, match=r"packed on a GPU.*device='cpu'"):
        open_checkpoint(str(packed_elsewhere), "cpu").language_model()


@pytest.mark.parametrize("declared", [True, False])
def test_what_a_cpu_packed_stays_on_cpus(declared: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = MusicGen.get_pretrained(str(folders["text"])).save_packed(tmp_path / "tiles", "int8")
    if not declared:
        _undeclare(folder)
    with pytest.raises(WeightsError, match=r"packed on a CPU.*--device cpu"):
        open_checkpoint(str(folder), "meta").language_model()
    _, weights = open_checkpoint(str(folder), "cpu").language_model()
    assert weights is not None
    assert weights.heads.order == "tiles"


def test_damage_is_told(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = MusicGen.get_pretrained(str(folders["text"])).save_packed(tmp_path / "packed", "int8")
    content = json.loads((folder / "musicgen.json").read_text())
    (folder / "musicgen.json").write_text(json.dumps(content | {"version": 99}))
    with pytest.raises(WeightsError, match="99"):
        MusicGen.get_pretrained(str(folder))
    del content["model"]["codec"]
    (folder / "musicgen.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="codec"):
        MusicGen.get_pretrained(str(folder))
    (folder / "packed.safetensors").unlink()
    with pytest.raises(WeightsError):
        MusicGen.get_pretrained(str(folder))
