"""Parts of a model: equal to those of the whole, read and checked by themselves, without what only others need."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, EncodecConfig, T5Config
from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig
from transformers.models.musicgen_melody.configuration_musicgen_melody import (
    MusicgenMelodyConfig,
    MusicgenMelodyDecoderConfig,
)

from musicgen import MusicGen
from musicgen.engine.packing import pack_decoder
from musicgen.errors import WeightsError
from musicgen.model import Model
from musicgen.types import Conditioning, SamplingParams
from musicgen.weights import Checkpoint, checkpoint, codec_config, huggingface, load_model, open_checkpoint

GOLDEN = tiny.GOLDEN / "audiocraft" / "text"

Load = Callable[[Checkpoint], object]
LOADERS: dict[str, Load] = {
    "language model": Checkpoint.language_model,
    "text encoder": Checkpoint.text_encoder,
    "codec": Checkpoint.codec,
}


@pytest.fixture(scope="module")
def packed(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    return MusicGen.get_pretrained(str(folders["melody"])).save_packed(folder, "int8")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the tensors that have been read from safetensors files."""
    names: set[str] = set()

    class Spy:
        def __init__(self, path: Path, framework: str) -> None:
            self._handle: Any = safe_open(path, framework)
            self.keys = self._handle.keys

        def get_tensor(self, name: str) -> torch.Tensor:
            names.add(name)
            tensor: torch.Tensor = self._handle.get_tensor(name)
            return tensor

    monkeypatch.setattr(checkpoint, "safe_open", Spy)
    return names


def tensors_of(part: object) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of what `Checkpoint`'s methods return, by name."""
    members = part if isinstance(part, tuple) else (part,)
    for index, member in enumerate(members):
        if member is None:
            continue
        holder = member.model if hasattr(member, "tokenizer") else member
        tensors = holder.state_dict() if hasattr(holder, "state_dict") else holder.tensors
        yield from ((f"{index}.{name}", tensor) for name, tensor in tensors.items())


def assert_equal(got: object, expected: object) -> None:
    ours, theirs = dict(tensors_of(got)), dict(tensors_of(expected))
    assert ours
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", ["text", "melody-stereo", "audiocraft"])
def test_parts_equal_those_of_the_whole_model(kind: str, folders: dict[str, Path]) -> None:
    name = str(GOLDEN if kind == "audiocraft" else folders[kind])
    whole, parts = load_model(name), open_checkpoint(name)
    assert parts.config == whole.config
    assert_equal(parts.language_model(), (whole.lm, whole.packed))
    assert_equal(parts.text_encoder(), whole.text_encoder)
    assert_equal(parts.codec(), (whole.codec, whole.codec_encoder))
    chroma = parts.chroma()
    assert (chroma is None) == (whole.chroma is None) == (kind != "melody-stereo")
    if chroma is not None and whole.chroma is not None:
        assert chroma.config == whole.chroma.config


HF_PREFIXES = {
    "language model": ("decoder.", "enc_to_dec_proj.", "audio_enc_to_dec_proj."),
    "text encoder": ("text_encoder.",),
    "codec": ("audio_encoder.",),
}
PACKED_PREFIXES = {
    "language model": ("lm.", "decoder."),
    "text encoder": ("text_encoder.",),
    "codec": ("codec.", "codec_encoder."),
}


@pytest.mark.parametrize("part", LOADERS)
@pytest.mark.parametrize("layout", ["one file", "shards", "packed"])
def test_only_a_parts_own_tensors_are_read(
    layout: str, part: str, folders: dict[str, Path], packed: Path, read: set[str]
) -> None:
    folder = {"one file": folders["melody"], "shards": folders["melody-stereo"], "packed": packed}[layout]
    opened = open_checkpoint(str(folder))
    opened.chroma()
    assert not read
    LOADERS[part](opened)
    prefixes = (PACKED_PREFIXES if layout == "packed" else HF_PREFIXES)[part]
    stored = {name for file in folder.glob("*.safetensors") for name in load_file(file)}
    training_only = (".inited", ".cluster_size", ".embed_avg")  # of the codec
    positions = "decoder.model.decoder.embed_positions.weights"
    own = {n for n in stored if n.startswith(prefixes) and not n.endswith(training_only) and n != positions}
    tied = {"text_encoder.encoder.embed_tokens.weight"}
    assert own
    assert read - tied == own - tied


@pytest.mark.parametrize("layout", ["hugging face", "audiocraft", "packed"])
def test_t5s_embeddings_are_held_once(layout: str, folders: dict[str, Path], packed: Path) -> None:
    """They are a fifth of T5-base. Moved to a device, one parameter stays one."""
    folder = {"hugging face": folders["melody"], "audiocraft": GOLDEN, "packed": packed}[layout]
    model = open_checkpoint(str(folder)).text_encoder().model
    assert model.shared.weight is model.encoder.embed_tokens.weight


def test_shards_of_other_parts_need_not_be_there(
    folders: dict[str, Path], models: dict[str, Model], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["text-stereo"], tmp_path / "model"))
    shard_of = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {shard for name, shard in shard_of.items() if name.startswith("audio_encoder.")}
    others = set(shard_of.values()) - needed
    assert others
    for shard in others:
        (folder / shard).unlink()
    whole = models["text-stereo"]
    assert_equal(open_checkpoint(str(folder)).codec(), (whole.codec, whole.codec_encoder))
    with pytest.raises(WeightsError, match="expected model-0"):
        open_checkpoint(str(folder)).language_model()


def test_an_index_that_does_not_fit_its_shards_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["text-stereo"], tmp_path / "model"))
    index = folder / "model.safetensors.index.json"
    shard = folder / json.loads(index.read_text())["weight_map"]["decoder.lm_heads.3.weight"]
    save_file(load_file(shard) | {"decoder.unheard_of": torch.zeros(1)}, shard)
    with pytest.raises(WeightsError, match=r"decoder\.unheard_of"):
        open_checkpoint(str(folder)).language_model()
    index.write_text('{"weight_map": 3}')
    with pytest.raises(WeightsError, match="weight_map"):
        open_checkpoint(str(folder))


DAMAGED = {
    "language model": "decoder.model.decoder.layers.1.fc1.weight",
    "text encoder": "text_encoder.encoder.final_layer_norm.weight",
    "codec": "audio_encoder.decoder.layers.0.conv.bias",
}


@pytest.mark.parametrize("damaged", DAMAGED)
@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_each_part_checks_its_own_tensors(damaged: str, damage: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["text"], tmp_path / "model"))
    tensors, name = load_file(folder / "model.safetensors"), DAMAGED[damaged]
    if damage == "missing":
        del tensors[name]
    elif damage == "extra":
        name += "_of_nothing"
        tensors[name] = torch.zeros(1)
    else:
        tensors[name] = torch.zeros(3, 5)
    save_file(tensors, folder / "model.safetensors")
    opened = open_checkpoint(str(folder))
    told = name.removeprefix("text_encoder.").removeprefix("audio_encoder.").replace(".", r"\.")
    for part, load in LOADERS.items():
        if part == damaged:
            with pytest.raises(WeightsError, match=told):
                load(opened)
        else:
            load(opened)
    with pytest.raises(WeightsError, match=told):
        load_model(str(folder))


def _edit_bin(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    content = torch.load(path, weights_only=True)
    state = dict(content["best_state"])
    change(state)
    torch.save(content | {"best_state": state}, path)


def test_audiocrafts_files_are_needed_each_for_its_part(tmp_path: Path) -> None:
    """Each part loads although the tensors of the other file are gone."""
    projection, whole = "condition_provider.conditioners.description.output_proj.weight", load_model(str(GOLDEN))

    def strip(state: dict[str, torch.Tensor]) -> None:
        for name in set(state) - {projection}:
            del state[name]

    folder = Path(shutil.copytree(GOLDEN, tmp_path / "codec"))
    _edit_bin(folder / "state_dict.bin", strip)
    opened = open_checkpoint(str(folder))
    assert_equal(opened.codec(), (whole.codec, whole.codec_encoder))
    assert_equal(opened.text_encoder(), whole.text_encoder)
    with pytest.raises(WeightsError, match=r"emb\.0\.weight"):
        opened.language_model()

    folder = Path(shutil.copytree(GOLDEN, tmp_path / "lm"))
    _edit_bin(folder / "compression_state_dict.bin", strip)
    opened = open_checkpoint(str(folder))
    assert_equal(opened.language_model(), (whole.lm, None))
    assert_equal(opened.text_encoder(), whole.text_encoder)
    with pytest.raises(WeightsError, match=r"missing decoder\.layers"):
        opened.codec()


def test_audiocrafts_text_encoder_must_fit(tmp_path: Path) -> None:
    name = "condition_provider.conditioners.description.output_proj.weight"
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "model"))
    _edit_bin(folder / "state_dict.bin", lambda state: state.update({name: torch.zeros(64, 5)}))
    with pytest.raises(WeightsError, match="of width 5"):
        open_checkpoint(str(folder)).text_encoder()
    _edit_bin(folder / "state_dict.bin", lambda state: state.__delitem__(name))
    with pytest.raises(WeightsError, match=name):
        open_checkpoint(str(folder))


def test_parts_go_where_they_are_told(folders: dict[str, Path], packed: Path) -> None:
    """The meta device stands for a GPU."""
    opened = open_checkpoint(str(folders["text"]), "meta", torch.float16)
    lm, _ = opened.language_model()
    assert {tensor.device.type for tensor in lm.state_dict().values()} == {"meta"}
    assert lm.decoder.layers[0].fc1.weight.dtype == torch.float16
    assert opened.codec()[0].codebooks.device.type == "meta"
    assert next(opened.text_encoder().model.parameters()).device.type == "meta"
    elsewhere = open_checkpoint(str(packed), "meta")
    assert elsewhere.codec()[0].codebooks.device.type == "meta"
    with pytest.raises(WeightsError, match="cpu"):
        elsewhere.language_model()


@pytest.mark.parametrize("kind", ["text", "melody"])
def test_the_engine_packs_from_full_precision(
    kind: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta device stands for a GPU: layers wait in host memory, each goes there when it is packed."""
    packed_from: set[tuple[str, torch.dtype]] = set()

    def pack(weight: torch.Tensor, kind: str) -> torch.Tensor:
        packed_from.add((weight.device.type, weight.dtype))
        return weight

    monkeypatch.setattr("musicgen.engine.packing.pack_linear", pack)
    lm, _ = open_checkpoint(str(folders[kind]), "meta").language_model()
    waiting = lm.decoder.layers.state_dict().values()
    assert {(tensor.device.type, tensor.dtype) for tensor in waiting} == {("cpu", torch.float32)}
    weights = pack_decoder(lm.decoder, "int8", 64)
    assert packed_from == {("meta", torch.float32)}
    norms = [norm for block in weights.blocks for norm in (block.self_norm, block.ffn_norm)]
    rest = [weights.embeddings, weights.sinusoids, *(norm.weight for norm in [*norms, weights.final_norm])]
    assert {(tensor.device.type, tensor.dtype) for tensor in rest} == {("meta", torch.float32)}
    assert lm.device.type == "meta"
    rows = lm.guidance_rows(Conditioning(torch.zeros(3, lm.config.text_dim), None), SamplingParams())
    given = rows.text if kind == "text" else rows.prefix
    assert given is not None
    assert given.device.type == "meta"


# --- configurations, which are read without transformers ---


def test_defaults_are_those_of_transformers() -> None:
    tables = (
        (huggingface.DECODER_DEFAULTS, MusicgenDecoderConfig()),
        (huggingface.DECODER_DEFAULTS, MusicgenMelodyDecoderConfig()),
        (huggingface.MELODY_DEFAULTS, MusicgenMelodyConfig()),
        (huggingface.TEXT_DEFAULTS, T5Config()),
        (codec_config.HF_DEFAULTS, EncodecConfig()),
    )
    for defaults, config in tables:
        for name, value in defaults.items():
            theirs = getattr(config, name)
            assert (list(theirs) if isinstance(theirs, tuple) else theirs) == value, name


@pytest.mark.parametrize("kind", ["text", "melody-stereo"])
def test_what_a_configuration_leaves_out_is_as_in_transformers(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders[kind], tmp_path / "model"))
    raw = json.loads((folder / "config.json").read_text())
    for section, names in {
        "decoder": ("num_hidden_layers", "hidden_size", "ffn_dim", "num_attention_heads", "vocab_size"),
        "text_encoder": ("d_model",),
        "audio_encoder": ("codebook_dim", "num_filters", "upsampling_ratios"),
    }.items():
        for name in names:
            del raw[section][name]
    raw["audio_encoder"] |= {"target_bandwidths": [5.0], "codebook_size": 2048}  # 4 codebooks at 100 Hz
    raw.pop("num_chroma", None)
    (folder / "config.json").write_text(json.dumps(raw))
    theirs, ours = AutoConfig.from_pretrained(str(folder)), open_checkpoint(str(folder)).config
    decoder, audio = theirs.decoder, theirs.audio_encoder
    assert ours.decoder.num_layers == decoder.num_hidden_layers
    assert (ours.decoder.dim, ours.decoder.num_heads) == (decoder.hidden_size, decoder.num_attention_heads)
    assert (ours.decoder.ffn_dim, ours.decoder.codebook_size) == (decoder.ffn_dim, decoder.vocab_size)
    assert (ours.decoder.num_codebooks, ours.audio_channels) == (decoder.num_codebooks, decoder.audio_channels)
    assert ours.text_dim == theirs.text_encoder.d_model
    assert ours.codec.codebook_dim == audio.codebook_dim == 16
    assert ours.codec.num_codebooks == audio.num_quantizers
    assert ours.codec.upsampling_ratios == tuple(audio.upsampling_ratios)
    assert (ours.codec.num_filters, ours.codec.codebook_size) == (audio.num_filters, audio.codebook_size)
    if ours.chroma is not None:
        assert (ours.chroma.num_chroma, ours.chroma.num_frames) == (theirs.num_chroma, theirs.chroma_length)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("decoder", "num_hidden_layers", "3"),
        ("decoder", "num_codebooks", 0),
        ("decoder", "scale_embedding", True),
        ("text_encoder", "d_model", None),
        ("text_encoder", "model_type", "bert"),
        ("audio_encoder", "sampling_rate", 32000.5),
        ("audio_encoder", "upsampling_ratios", [8, 0]),
        ("audio_encoder", "upsampling_ratios", []),
        ("audio_encoder", "target_bandwidths", [1e-3]),
        ("audio_encoder", "codebook_size", 1),
        ("audio_encoder", "codebook_dim", "16"),
    ],
)
def test_settings_that_cannot_be_are_named(
    section: str, name: str, value: object, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["text"], tmp_path / "model"))
    raw = json.loads((folder / "config.json").read_text())
    raw[section][name] = value
    (folder / "config.json").write_text(json.dumps(raw))
    told = "bandwidth" if name in ("target_bandwidths", "codebook_size") else name
    with pytest.raises(WeightsError, match=told):
        open_checkpoint(str(folder))
    del raw[section]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(WeightsError, match=section):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("section", "changes", "told"),
    [
        ("decoder", {"num_codebooks": 8}, "got a language model for 8 codebooks of 128"),
        ("decoder", {"audio_channels": 2}, "expected 8 codebooks of 128 at 32000 Hz, which the codec has, one set per"),
        ("decoder", {"audio_channels": 4, "num_codebooks": 16}, "1 or 2 audio channels, got 4"),
        ("decoder", {"num_attention_heads": 3}, "divisible by 3 heads, got 64"),
        ("decoder", {"vocab_size": 64}, "got a language model for 4 codebooks of 64"),
        ("audio_encoder", {"target_bandwidths": [2.1]}, "expected 6 codebooks of 128"),
        ("audio_encoder", {"codebook_size": 256}, "expected 3 codebooks of 256"),
        ("audio_encoder", {"upsampling_ratios": [8, 5, 4, 2]}, "expected 2 codebooks of 128"),
        ("audio_encoder", {"audio_channels": 2}, "audio_channels"),
    ],
)
def test_a_codec_must_fit_its_language_model(
    section: str, changes: dict[str, object], told: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["text"], tmp_path / "model"))
    raw = json.loads((folder / "config.json").read_text())
    raw[section] |= changes
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(WeightsError, match=told):
        open_checkpoint(str(folder))


# --- what a process imports ---

IMPORTED = """
import sys
{}
print(*sorted({{"transformers", "torch._dynamo", "huggingface_hub"}} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    "statement",
    [
        "import musicgen.conditioning, musicgen.inputs, musicgen.api, musicgen.weights, musicgen.weights.load",
        "from musicgen.weights import open_checkpoint as o; o('demo').codec(); o('demo').chroma()",
        "from musicgen.weights import open_checkpoint as o; o('demo').language_model()",
    ],
)
def test_only_a_text_encoder_needs_transformers(statement: str) -> None:
    assert _imported(statement) == []


def test_imports_are_seen() -> None:
    """Otherwise the test above could not fail."""
    assert "transformers" in _imported("import transformers")


def _imported(statement: str) -> list[str]:
    command = [sys.executable, "-c", IMPORTED.format(statement)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.split()
