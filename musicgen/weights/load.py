"""From a model's name to a loaded model: find the folder, recognise its layout, load, move."""

from __future__ import annotations

from pathlib import Path

import torch

from musicgen.errors import InvalidRequestError, WeightsError
from musicgen.model import Model
from musicgen.weights import audiocraft, hub, huggingface, packed, registry

UNKNOWN_LICENSE = "unknown; see the model's own card"


def load_model(name: str, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Model:
    """Load a model.

    Args:
        name: a short name (`musicgen models` lists them), a Hugging Face repository id, or a local folder in
            Hugging Face or audiocraft layout.
        device: default: the GPU if there is one, else the CPU.
        dtype: of the decoder's matrices; default: fp16 on a GPU, as audiocraft, and fp32 on the CPU.
    Raises:
        InvalidRequestError: unknown name, device or dtype.
        WeightsError: the files cannot be used.
    """
    target = _device(device)
    dtype = dtype or (torch.float32 if target.type == "cpu" else torch.float16)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise InvalidRequestError("float32, float16 or bfloat16", str(dtype), param="dtype")
    folder = hub.resolve(name)
    card = registry.find(name)
    license = card.license if card else UNKNOWN_LICENSE
    return _load(folder, card.name if card else folder.name, license).to(target, dtype)


def _load(folder: Path, name: str, license: str) -> Model:
    if (folder / packed.CONFIG_FILE).is_file():
        return packed.load(folder)
    if (folder / audiocraft.LM_FILE).is_file() and not (folder / "model.safetensors").is_file():
        return audiocraft.load(folder, name, license)
    if (folder / "config.json").is_file():
        return huggingface.load(folder, name, license)
    raise WeightsError(
        f"{folder}: expected config.json (Hugging Face layout) or {audiocraft.LM_FILE} (audiocraft layout), got neither"
    )


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        got = f"{device!r} ({reason})"
        raise InvalidRequestError("a device of this machine, such as cpu", got, param="device") from error
    return target
