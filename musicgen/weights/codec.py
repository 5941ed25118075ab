"""EnCodec checkpoints in Hugging Face and audiocraft format: one name map each.

Both formats are converted to a common one: Hugging Face's names, weight normalisation folded in, float32. It provides
the state of `EncodecDecoder` and of the transformers encoder. Handles names and shapes; files are read elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from musicgen.config import CodecConfig
from musicgen.errors import WeightsError
from musicgen.weights.checkpoint import MAX_NAMES_SHOWN

if TYPE_CHECKING:
    from musicgen.models.encodec import EncodecDecoder
    from musicgen.models.encodec_encoder import EncodecEncoder

_TRAINING_ONLY = (".inited", ".cluster_size", ".embed_avg")
_AUDIOCRAFT_TO_HF = (
    (re.compile(r"^(encoder|decoder)\.model\."), r"\1.layers."),
    (re.compile(r"\.conv\.conv\."), ".conv."),
    (re.compile(r"\.convtr\.convtr\."), ".conv."),
    (re.compile(r"^quantizer\.vq\.layers\.(\d+)\._codebook\."), r"quantizer.layers.\1.codebook."),
)
_NORM_PARTS = (("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1"))

CodecTensors = Mapping[str, Tensor]


def codec_tensors_from_hf(tensors: CodecTensors, config: CodecConfig) -> dict[str, Tensor]:
    """Validate the tensors of transformers' `EncodecModel` and fold their weight normalisation.

    Args:
        tensors: its state dict, with either naming of the normalisation, or already folded; any float dtype.
    Returns:
        The tensors of `codec_shapes(config)`, float32.
    Raises:
        WeightsError: lists missing, unexpected or mis-shaped tensors.
    """
    names = tensors.keys()
    folded = _fold_weight_norm({name: tensors[name] for name in names if not name.endswith(_TRAINING_ONLY)})
    wanted = codec_shapes(config)
    problems = [f"missing {name}" for name in sorted(wanted.keys() - folded.keys())]
    problems += [f"unexpected {name}" for name in sorted(folded.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & folded.keys()):
        if tuple(folded[name].shape) != wanted[name]:
            problems.append(f"{name}: expected {wanted[name]}, got {tuple(folded[name].shape)}")
    if problems:
        more = f" and {len(problems) - MAX_NAMES_SHOWN} more" if len(problems) > MAX_NAMES_SHOWN else ""
        listed = "; ".join(problems[:MAX_NAMES_SHOWN]) + more
        raise WeightsError(
            f"codec: the tensors do not fit the configuration: {listed}; check that both belong to the same model"
        )
    return folded


def codec_tensors_from_audiocraft(tensors: CodecTensors, config: CodecConfig) -> dict[str, Tensor]:
    """Like `codec_tensors_from_hf`, for `best_state` of a `compression_state_dict.bin`."""
    renamed = {}
    for name in tensors:
        new_name = name
        for pattern, replacement in _AUDIOCRAFT_TO_HF:
            new_name = pattern.sub(replacement, new_name)
        renamed[new_name] = tensors[name]
    return codec_tensors_from_hf(renamed, config)


def build_codec(config: CodecConfig, tensors: Mapping[str, Tensor]) -> tuple[EncodecDecoder, EncodecEncoder]:
    """The decoder, and the encoder, which is built on first use.

    Args:
        tensors: the result of one of the `codec_tensors_from_*`; further codebooks are dropped.
    """
    from musicgen.models.encodec import EncodecDecoder
    from musicgen.models.encodec_encoder import EncodecEncoder

    tensors = {name: tensors[name] for name in codec_shapes(config)}
    decoder = EncodecDecoder(config)
    decoder.load_state_dict(decoder_state(config, tensors))
    return decoder.eval(), EncodecEncoder(config, tensors)


def decoder_state(config: CodecConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `EncodecDecoder`: convolutions as `[kernel, in, out]`, transposed ones as the two halves
    `[2, in, ratio · out]` of their kernel."""
    layers = (f"quantizer.layers.{k}.codebook.embed" for k in range(config.num_codebooks))
    state = {"codebooks": torch.stack([tensors[name] for name in layers])}
    for ours, theirs in decoder_name_map(config).items():
        weight = tensors[f"{theirs}.weight"]
        if ours.startswith("upsamples"):
            in_dim, out_dim, kernel_size = weight.shape
            halves = weight.view(in_dim, out_dim, 2, kernel_size // 2).permute(2, 0, 3, 1)
            weight = halves.reshape(2, in_dim, out_dim * kernel_size // 2)
        else:
            weight = weight.permute(2, 1, 0)
        state[f"{ours}.weight"] = weight.contiguous()
        state[f"{ours}.bias"] = tensors[f"{theirs}.bias"]
    lstm = "decoder.layers.1.lstm."
    state |= {f"lstm.{n.removeprefix(lstm)}": tensor for n, tensor in tensors.items() if n.startswith(lstm)}
    return state


def decoder_name_map(config: CodecConfig) -> dict[str, str]:
    """Convolutions of `EncodecDecoder` → those of transformers' `EncodecModel` (where ELUs count as layers)."""
    names = {"conv_in": "decoder.layers.0"}
    index = 2  # after the LSTM
    for stage in range(len(config.upsampling_ratios)):
        names[f"upsamples.{stage}"] = f"decoder.layers.{index + 1}"
        index += 2
        for j in range(config.num_residual_layers):
            block = f"decoder.layers.{index}"
            names[f"residuals.{stage}.{j}.conv"] = f"{block}.block.1"
            names[f"residuals.{stage}.{j}.project"] = f"{block}.block.3"
            if config.conv_shortcut:
                names[f"residuals.{stage}.{j}.shortcut"] = f"{block}.shortcut"
            index += 1
    names["conv_out"] = f"decoder.layers.{index + 1}"
    return {ours: f"{theirs}.conv" for ours, theirs in names.items()}


def codec_shapes(config: CodecConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name and shape of every tensor of the codec, with weight normalisation folded."""
    top = config.num_filters * 2 ** len(config.upsampling_ratios)
    shapes: dict[str, tuple[int, ...]] = {
        f"quantizer.layers.{k}.codebook.embed": (config.codebook_size, config.codebook_dim)
        for k in range(config.num_codebooks)
    }
    for name, shape in (*_encoder_layers(config), *_decoder_layers(config)):
        if name.endswith(".lstm"):
            for layer in range(config.num_lstm_layers):
                shapes |= {f"{name}.weight_{part}_l{layer}": (4 * top, top) for part in ("ih", "hh")}
                shapes |= {f"{name}.bias_{part}_l{layer}": (4 * top,) for part in ("ih", "hh")}
        else:
            shapes[f"{name}.weight"] = shape
            # A transposed convolution's weight is [in, out, kernel]; its out is half its in.
            shapes[f"{name}.bias"] = (shape[1] if name in _transposed(config) else shape[0],)
    return shapes


_Layer = tuple[str, tuple[int, ...]]


def _encoder_layers(config: CodecConfig) -> Iterator[_Layer]:
    dim, index = config.num_filters, 1
    yield "encoder.layers.0.conv", (dim, 1, config.kernel_size)
    for ratio in reversed(config.upsampling_ratios):
        for _ in range(config.num_residual_layers):
            yield from _residual_layers(config, f"encoder.layers.{index}", dim)
            index += 1
        yield f"encoder.layers.{index + 1}.conv", (2 * dim, dim, 2 * ratio)
        dim, index = 2 * dim, index + 2
    yield f"encoder.layers.{index}.lstm", ()
    yield f"encoder.layers.{index + 2}.conv", (config.hidden_size, dim, config.last_kernel_size)


def _decoder_layers(config: CodecConfig) -> Iterator[_Layer]:
    names = decoder_name_map(config)
    dim = config.num_filters * 2 ** len(config.upsampling_ratios)
    yield names["conv_in"], (dim, config.hidden_size, config.kernel_size)
    yield "decoder.layers.1.lstm", ()
    for stage, ratio in enumerate(config.upsampling_ratios):
        yield names[f"upsamples.{stage}"], (dim, dim // 2, 2 * ratio)
        dim //= 2
        for j in range(config.num_residual_layers):
            block = names[f"residuals.{stage}.{j}.conv"].removesuffix(".block.1.conv")
            yield from _residual_layers(config, block, dim)
    yield names["conv_out"], (1, dim, config.last_kernel_size)


def _residual_layers(config: CodecConfig, block: str, dim: int) -> Iterator[_Layer]:
    hidden = dim // config.compress
    yield f"{block}.block.1.conv", (hidden, dim, config.residual_kernel_size)
    yield f"{block}.block.3.conv", (dim, hidden, 1)
    if config.conv_shortcut:
        yield f"{block}.shortcut.conv", (dim, dim, 1)


def _transposed(config: CodecConfig) -> set[str]:
    return {theirs for ours, theirs in decoder_name_map(config).items() if ours.startswith("upsamples")}


def _fold_weight_norm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """w = g · v / ‖v‖, with the norm over all axes but the first, for each pair; the other tensors in float32."""
    folded = {name: tensor.float() for name, tensor in tensors.items()}
    for gain_name, direction_name in _NORM_PARTS:
        for name in [name for name in folded if name.endswith("." + direction_name)]:
            base = name.removesuffix(direction_name)
            if base + gain_name in folded:
                gain, direction = folded.pop(base + gain_name), folded.pop(name)
                if gain.shape != (direction.shape[0],) + (1,) * (direction.ndim - 1):
                    raise WeightsError(f"codec: {base + gain_name}: expected one gain per row, got {tuple(gain.shape)}")
                folded[base + "weight"] = torch._weight_norm(direction, gain, 0)
    return folded
