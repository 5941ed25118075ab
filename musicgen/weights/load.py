"""Loads a model by name: resolves the folder, detects its layout, loads the requested components onto a device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

import torch
from musicgen_kernels.step import DecoderWeights

from musicgen.arguments import checked_path
from musicgen.config import ModelConfig
from musicgen.errors import InvalidRequestError, WeightsError
from musicgen.model import Model
from musicgen.models.chroma import ChromaExtractor
from musicgen.models.encodec import EncodecDecoder
from musicgen.models.encodec_encoder import EncodecEncoder
from musicgen.models.language_model import LanguageModel
from musicgen.models.t5 import TextEncoder
from musicgen.weights import audiocraft, hub, huggingface, packed, registry
from musicgen.weights.formats import found_instead

UNKNOWN_LICENSE = "unknown; see the model card"


class Layout(Protocol):
    """A checkpoint layout: the configuration, and each component as loaded from disk, in fp32 on the CPU.

    Each method reads only the tensors of its component and rejects missing, unexpected or mis-shaped ones.
    """

    config: ModelConfig

    def language_model(self) -> tuple[LanguageModel, DecoderWeights | None]: ...

    def text_encoder(self) -> TextEncoder: ...

    def codec(self) -> tuple[EncodecDecoder, EncodecEncoder]: ...


class Checkpoint:
    """A model on disk. Each call loads only its component, without caching; all methods may raise WeightsError.

    Args:
        device: target device.
        dtype: of the decoder's matrices, to run the language model itself; None leaves its layers in host memory for
            the engine to pack.
    """

    def __init__(self, layout: Layout, device: torch.device, dtype: torch.dtype | None) -> None:
        self._layout, self._device, self._dtype = layout, device, dtype

    @property
    def config(self) -> ModelConfig:
        return self._layout.config

    def language_model(self) -> tuple[LanguageModel, DecoderWeights | None]:
        """The language model, and its packed decoder if the checkpoint holds only that (see `Model`).

        Raises:
            WeightsError: also if the decoder was packed for another type of device.
        """
        lm, packed_decoder = self._layout.language_model()
        if packed_decoder is not None:
            return lm, packed_decoder
        if self._dtype is None:
            for part in (lm.text_proj, lm.chroma_proj, lm.decoder.out_norm):  # out_norm determines the model's device
                if part is not None:
                    part.to(self._device)
        else:
            lm.to(self._device)
            lm.decoder.set_compute_dtype(self._dtype)
        return lm, None

    def text_encoder(self) -> TextEncoder:
        """The text encoder. The only component whose loading imports transformers."""
        encoder = self._layout.text_encoder()
        encoder.to(self._device)
        return encoder

    def chroma(self) -> ChromaExtractor | None:
        """The melody feature extractor, on the CPU; None for models without melody conditioning."""
        return None if self.config.chroma is None else ChromaExtractor(self.config.chroma)

    def codec(self) -> tuple[EncodecDecoder, EncodecEncoder]:
        """The codec's decoder and encoder."""
        decoder, encoder = self._layout.codec()
        return decoder.to(self._device), encoder.to(self._device)

    def model(self) -> Model:
        """All components."""
        lm, packed_decoder = self.language_model()
        codec_decoder, codec_encoder = self.codec()
        return Model(
            self.config, lm, self.text_encoder(), self.chroma(), codec_decoder, codec_encoder, packed=packed_decoder
        )


def open_checkpoint(
    name: str | os.PathLike[str], device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> Checkpoint:
    """Resolve a model and read its configuration, to load only some components; otherwise like `load_model`."""
    name = checked_path(name, hub.EXPECTED_NAME, param="model")
    target = _device(device)
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise InvalidRequestError("float32, float16 or bfloat16", str(dtype), param="dtype")
    folder = hub.resolve(name)
    card = registry.find(name)
    license = card.license if card else UNKNOWN_LICENSE
    return Checkpoint(_load(folder, card.name if card else folder.name, license, target), target, dtype)


def load_model(
    name: str | os.PathLike[str], device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> Model:
    """Load a model.

    Args:
        name: a short name (`musicgen models` lists them), a Hugging Face repository id, or a local folder in
            Hugging Face or audiocraft layout. The first two may end in a revision, as in `small@main`.
        device: default: the GPU if available, else the CPU.
        dtype: of the decoder's matrices, to run the language model itself on the device. By default its layers stay in
            host memory in fp32, from where the engine packs them onto the device one by one.
    Raises:
        InvalidRequestError: unknown name, device or dtype.
        WeightsError: the files cannot be used.
    """
    return open_checkpoint(name, device, dtype).model()


def _load(folder: Path, name: str, license: str, device: torch.device) -> Layout:
    if (folder / packed.CONFIG_FILE).is_file():
        return packed.PackedCheckpoint(folder, device)
    is_audiocraft = (folder / audiocraft.LM_FILE).is_file()
    if is_audiocraft and not any((folder / file).is_file() for file in huggingface.WEIGHT_FILES):
        return audiocraft.AudiocraftCheckpoint(folder, name, license)
    if (folder / "config.json").is_file():
        return huggingface.HuggingFaceCheckpoint(folder, name, license)
    found = found_instead(entry.name for entry in folder.iterdir())
    raise WeightsError(
        f"{folder}: expected config.json (Hugging Face layout) or {audiocraft.LM_FILE} (audiocraft layout), {found}"
    )


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        got = f"{device!r} ({reason})"
        raise InvalidRequestError("an available device, such as cpu", got, param="device") from error
    return target
