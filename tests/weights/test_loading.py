"""Checkpoints of both layouts: equality of twins, shards, pointers, and errors that name the tensor."""

from __future__ import annotations

import copy as copying
import fnmatch
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file

from musicgen.errors import InvalidRequestError, WeightsError
from musicgen.model import Model
from musicgen.weights import checkpoint, load_model, open_checkpoint, registry
from musicgen.weights.registry import MODELS

MELODY_CONDITIONS: dict[str, Any] = {
    "classifier_free_guidance": {"training_dropout": 0.2, "inference_coef": 3.0},
    "attribute_dropout": {"args": {"active_on_eval": False}, "text": {}, "wav": {"self_wav": 0.5}},
    "fuser": {
        "cross_attention_pos_emb": False,
        "cross_attention_pos_emb_scale": 1,
        "sum": [],
        "prepend": ["self_wav", "description"],
        "cross": [],
        "input_interpolate": [],
    },
    "conditioners": {
        "self_wav": {
            "model": "chroma_stem",
            "chroma_stem": {
                "sample_rate": "${sample_rate}",
                "n_chroma": 12,
                "radix2_exp": 14,
                "argmax": True,
                "match_len_on_eval": False,
                "eval_wavs": None,
                "n_eval_wavs": 100,
                "cache_path": None,
            },
        },
        "description": {
            "model": "t5",
            "t5": {"name": "t5-base", "finetune": False, "word_dropout": 0.2, "normalize_text": False},
        },
    },
}
"""What audiocraft's `config/conditioner/chroma2music.yaml` sets, with its references as files hold them: unresolved."""


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
    if melody:
        cfg |= copying.deepcopy(MELODY_CONDITIONS)
    cfg["conditioners"]["description"]["t5"]["name"] = str(text_folder)
    cfg |= {"interleave_stereo_codebooks": {"use": stereo, "per_timestep": False}, "compression_model_n_q": None}
    if stereo:
        cfg["channels"] = 2
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


@pytest.mark.parametrize("kind", ["text", "text-stereo"])
def test_hugging_faces_files_go_first(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Facebook's repositories hold both layouts; the stereo model's is in shards."""
    folder = Path(shutil.copytree(folders[kind], tmp_path / "model"))
    for name in ("state_dict.bin", "compression_state_dict.bin"):
        (folder / name).write_bytes(b"not to be read")
    assert load_model(str(folder)).config.audio_channels == (2 if kind == "text-stereo" else 1)


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
    assert "unexpected: decoder.model.decoder.layers.9.fc1.weight" in message
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


@pytest.fixture(scope="module")
def twins(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The text and the melody model in audiocraft's layout; the text model's codec is a file, not a pointer."""
    root = tmp_path_factory.mktemp("audiocraft")
    made = {
        kind: _audiocraft_twin(root / kind, folders[kind], melody=kind == "melody", stereo=False)
        for kind in ("text", "melody")
    }
    shutil.copy(tiny.GOLDEN / "audiocraft/text/compression_state_dict.bin", made["text"])
    return made


def _xp_cfg(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(torch.load(file, weights_only=True)["xp.cfg"])
    return content


def _with_xp_cfg(twin: Path, folder: Path, cfg: object, file: str = "state_dict.bin") -> str:
    """A copy of the checkpoint in `folder`, with another configuration."""
    shutil.copytree(twin, folder, dirs_exist_ok=True)
    content = torch.load(folder / file, weights_only=True)
    torch.save(content | {"xp.cfg": cfg if isinstance(cfg, str) else yaml.safe_dump(cfg)}, folder / file)
    return str(folder)


def _changed(cfg: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy of `cfg` with another value at `path`; a KeyError takes it away."""
    changed = copying.deepcopy(cfg)
    *parents, last = path.split(".")
    section = changed
    for parent in parents:
        section = section.setdefault(parent, {})
    if value is KeyError:
        del section[last]
    else:
        section[last] = value
    return changed


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("text", "transformer_lm.qk_layer_norm", True),
        ("text", "transformer_lm.positional_scale", 2.0),
        ("text", "transformer_lm.max_period", 1000),
        ("text", "fuser.cross_attention_pos_emb", True),
        ("text", "codebooks_pattern.modeling", "parallel"),
        ("text", "codebooks_pattern.delay.delays", [0, 0, 0, 0]),
        ("text", "codebooks_pattern.delay.flatten_first", 1),
        ("text", "conditioners.description.t5.normalize_text", True),
        ("text", "lm_model", "transformer_lm_magnet"),
        ("text", "transformer_lm.card", 64),
        ("text", "transformer_lm.num_heads", 3),
        ("text", "compression_model_n_q", 5),
        ("text", "compression_model_n_q", 3),
        ("text", "sample_rate", 16000),
        ("text", "channels", 2),
        ("melody", "conditioners.self_wav.model", "style"),
        ("melody", "conditioners.self_wav.chroma_stem.argmax", False),
        ("melody", "conditioners.self_wav.chroma_stem.winhop", 1024),
        ("melody", "fuser.prepend", ["description", "self_wav"]),
        ("melody", "interleave_stereo_codebooks", {"use": True, "per_timestep": True}),
    ],
)
def test_audiocraft_options_that_change_the_architecture_are_refused(
    kind: str, path: str, value: object, twins: dict[str, Path], tmp_path: Path
) -> None:
    cfg = _changed(_xp_cfg(twins[kind] / "state_dict.bin"), path, value)
    told = {
        "interleave_stereo_codebooks": "per_timestep",
        "transformer_lm.card": "got a language model for 4 codebooks of 64 at 32000 Hz",
        "transformer_lm.num_heads": "divisible by 3 heads, got 64",
        "sample_rate": "16000",
    }.get(path, "3 codebooks" if value == 3 else path)
    with pytest.raises(WeightsError, match=told):
        open_checkpoint(_with_xp_cfg(twins[kind], tmp_path / "twin", cfg))


def test_a_codec_is_used_as_far_as_the_language_model_goes(twins: dict[str, Path], tmp_path: Path) -> None:
    """`compression_model_n_q`: the first codebooks of a codec that has more."""
    cfg = _xp_cfg(twins["text"] / "state_dict.bin")
    for path, value in (
        ("compression_model_n_q", 3),
        ("transformer_lm.n_q", 3),
        ("codebooks_pattern.delay.delays", [0, 1, 2]),
    ):
        cfg = _changed(cfg, path, value)
    limited = open_checkpoint(_with_xp_cfg(twins["text"], tmp_path / "twin", cfg))
    assert limited.config.codec.num_codebooks == 3
    (decoder, encoder), (whole_decoder, whole_encoder) = limited.codec(), open_checkpoint(str(twins["text"])).codec()
    assert torch.equal(decoder.codebooks, whole_decoder.codebooks[:3])
    wav = tiny.tune(0.2)
    assert torch.equal(encoder.encode(wav), whole_encoder.encode(wav)[:3])


def _without(section: str, *names: str) -> dict[str, object]:
    return {f"{section}.{name}": KeyError for name in names}


OTHER_VERSIONS: dict[str, tuple[str, dict[str, object]]] = {
    "the first release names the pattern beside the transformer": (
        "text",
        {"codebooks_pattern": {"modeling": None}, "transformer_lm.q_modeling": "delay"},
    ),
    "options that later versions added": (
        "text",
        _without("transformer_lm", "two_step_cfg", "qk_layer_norm_cross", "kv_repeat", "xpos", "norm")
        | {"interleave_stereo_codebooks": KeyError, "compression_model_n_q": KeyError},
    ),
    "arguments of all conditioners": ("melody", {"conditioners.args": {"merge_text_conditions_p": 0.25}}),
    "a length that is no whole number": ("melody", {"dataset.segment_duration": 30.0}),
    "references": ("melody", {"dataset.segment_duration": "${window.length}", "window": {"length": "${a}"}, "a": 30}),
}


@pytest.mark.parametrize("name", OTHER_VERSIONS)
def test_configurations_of_other_versions_of_audiocraft(
    name: str, models: dict[str, Model], twins: dict[str, Path], tmp_path: Path
) -> None:
    kind, changes = OTHER_VERSIONS[name]
    cfg = _xp_cfg(twins[kind] / "state_dict.bin")
    for path, value in changes.items():
        cfg = _changed(cfg, path, value)
    config = open_checkpoint(_with_xp_cfg(twins[kind], tmp_path / "twin", cfg)).config
    assert (config.decoder, config.chroma) == (models[kind].config.decoder, models[kind].config.chroma)
    assert config.max_duration_s == 30.0


def _paths(cfg: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in cfg.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{name}.")


@pytest.mark.parametrize("file", ["state_dict.bin", "compression_state_dict.bin"])
def test_a_damaged_audiocraft_configuration_is_a_weights_error(
    file: str, twins: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is missing or of another kind: it opens all the same, or what was expected is told."""
    twin = twins["melody" if file == "state_dict.bin" else "text"]
    contents = {f: torch.load(twin / f, weights_only=True) for f in ("state_dict.bin", "compression_state_dict.bin")}
    whole, refused, parse = _xp_cfg(twin / file), set(), functools.cache(yaml.safe_load)
    contents[file]["xp.cfg"] = "changed"  # what it says is given below, without the time that YAML takes
    monkeypatch.setattr("musicgen.weights.audiocraft.load_bin", lambda path: contents[path.name])
    monkeypatch.setattr("yaml.safe_load", lambda text: cfg if text == "changed" else parse(text))
    for path in _paths(whole):
        for value in (KeyError, "???", None, [], {}, -1, [1], "${nowhere}"):
            cfg = _changed(whole, path, value)
            try:
                open_checkpoint(str(twin))
            except WeightsError:
                refused.add(path)
    needed = {"encodec.sample_rate", "rvq.bins", "seanet.ratios"}
    if file == "state_dict.bin":
        needed = {"conditioners", "dataset.segment_duration", "fuser.cross", "transformer_lm.num_layers"}
    assert needed <= refused


@pytest.mark.parametrize("text", ["a: [", "3", ""])
def test_an_audiocraft_configuration_that_is_none(text: str, twins: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"xp\.cfg"):
        open_checkpoint(_with_xp_cfg(twins["text"], tmp_path / "twin", text))


@pytest.mark.parametrize("name", ["no-such-model", "./nowhere", "a/b/c", ""])
def test_unknown_names(name: str) -> None:
    with pytest.raises(InvalidRequestError, match="short names: demo"):
        load_model(name)


def test_known_model_offline_says_what_to_do() -> None:
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE"):
        load_model("melody")


def test_an_invalid_repository_id_is_refused() -> None:
    for name in ("facebook/musicgen-small:main", "demo@main"):
        with pytest.raises(InvalidRequestError, match="repository id"):
            load_model(name)


class _Hub:
    """Stands for huggingface_hub: a repository with these files, of which `snapshot_download` fetches what is asked."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, *files: str) -> None:
        self._root, self._files = root, files
        self.asked: list[tuple[str, str | None]] = []
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo_id, revision: list(files))

    def snapshot_download(self, repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((repo_id, revision))
        for name in self._files:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (self._root / name).write_text('{"model_type": "musicgen", "text_encoder": {}}')
        return str(self._root)


UNREADABLE = {
    "pickled": (["config.json", "pytorch_model.bin"], r"got pytorch_model\.bin; pickled .* load and save them with"),
    "a variant": (["config.json", "model.fp16.safetensors"], r"got model\.fp16\.safetensors; .* variant='fp16'"),
    "no index": (["config.json", "model-00001-of-00002.safetensors"], r"got model-00001-of-00002.*download it again"),
    "of other libraries": (["config.json", "model.onnx"], r"got model\.onnx"),
    "none": (["config.json", "README.md"], "got no weights"),
    "without a configuration": (["model.safetensors"], r"expected config\.json .*got model\.safetensors"),
}


@pytest.mark.parametrize("case", UNREADABLE)
@pytest.mark.parametrize("local", [True, False])
def test_weights_that_are_not_read_are_named(
    case: str, local: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, told = UNREADABLE[case]
    hub = _Hub(tmp_path, monkeypatch, *files)
    if local:
        hub.snapshot_download("", revision=None, allow_patterns=["*"])
    with pytest.raises(WeightsError, match=told):
        load_model(str(tmp_path) if local else "someone/some-model")


def _refusal(kind: type[Exception], status: int) -> Exception:
    request = httpx2.Request("GET", "https://huggingface.co/api/models/someone/some-model")
    error: Exception = kind("refused", response=httpx2.Response(status, request=request))
    return error


def _unreachable(cause: Exception) -> Exception:
    error = huggingface_hub.errors.LocalEntryNotFoundError("not cached")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (_refusal(huggingface_hub.errors.GatedRepoError, 403), WeightsError, "gated.*accept its terms .*hf auth login"),
        (_refusal(huggingface_hub.errors.RepositoryNotFoundError, 401), InvalidRequestError, "private, log in with"),
        (_refusal(huggingface_hub.errors.HfHubHTTPError, 401), WeightsError, "status 401: the access token"),
        (_unreachable(_refusal(huggingface_hub.errors.HfHubHTTPError, 403)), WeightsError, "status 403.*HF_TOKEN"),
        (_unreachable(_refusal(huggingface_hub.errors.HfHubHTTPError, 503)), WeightsError, "check the network"),
        (_refusal(huggingface_hub.errors.RevisionNotFoundError, 404), InvalidRequestError, "commit of someone.*'v9'"),
    ],
)
def test_a_refusal_of_the_hub_says_what_to_do(
    error: Exception, kind: type[Exception], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    with pytest.raises(kind, match=told):
        load_model("someone/some-model@v9")


def test_the_style_model_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequestError, match=r"musicgen-style: its style conditioner .*choose one of demo, small"):
        load_model("facebook/musicgen-style")


def test_a_folder_with_a_checkpoint_precedes_a_repository(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "facebook/musicgen-small"
    Path(name).mkdir(parents=True)
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE"):
        open_checkpoint(name)
    shutil.copytree(folders["melody"], name, dirs_exist_ok=True)
    assert open_checkpoint(name).config.chroma is not None
    shutil.copytree(folders["melody"], "small")
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE"):
        open_checkpoint("small")  # a short name is never a folder


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("small", ("facebook/musicgen-small", None)),
        ("small@v1", ("facebook/musicgen-small", "v1")),
        ("someone/model@refs/pr/3", ("someone/model", "refs/pr/3")),
    ],
)
def test_a_revision_follows_the_name(
    name: str, asked: tuple[str, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = _Hub(tmp_path, monkeypatch, "config.json", "model.safetensors")
    with pytest.raises(WeightsError):  # the files are not those of a model
        open_checkpoint(name)
    assert hub.asked == [asked]
    assert registry.find("small@v1") is MODELS["small"]


def test_an_interrupted_download_can_be_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> str:
        raise httpx2.RemoteProtocolError("peer closed connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", interrupted)
    with pytest.raises(WeightsError, match="resume"):
        load_model("melody")


def test_a_missing_tokenizer_is_refused(copy: Callable[[str], Path]) -> None:
    """transformers would build an empty one, to which every word is unknown."""
    folder = copy("text")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(WeightsError, match="tokenizer"):
        load_model(str(folder), "cpu")


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
