"""Where a checkpoint lies on disk: a local folder, the embedded demo, or a Hugging Face snapshot.

Downloads (with progress, resumed after a break) are huggingface_hub's; `HF_HOME`, `HF_HUB_CACHE` and
`HF_HUB_OFFLINE` mean what they mean there. It is imported when a repository is looked for; folders need none. Knows
nothing of what is in the files.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from musicgen.errors import InvalidRequestError, WeightsError
from musicgen.weights.registry import DEMO_MODEL, MODELS, find

SAFE_FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]
AUDIOCRAFT_FILES = ["state_dict.bin", "compression_state_dict.bin"]


def demo_checkpoint() -> Path:
    """The folder of the embedded demo model."""
    return Path(str(files("musicgen").joinpath("demo", "checkpoint")))


def resolve(name: str) -> Path:
    """The local folder of a model, downloaded if need be.

    Args:
        name: a short name, a Hugging Face repository id, or a local folder.
    Raises:
        InvalidRequestError: nothing goes by that name.
        WeightsError: the name is known, but its files are not here and could not be fetched.
    """
    if name == DEMO_MODEL:
        return demo_checkpoint()
    card = find(name)
    if card is not None:
        return _download(card.repo_id)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InvalidRequestError(
            "a short name, a Hugging Face repository id or a local folder",
            repr(name),
            f"short names: {', '.join(MODELS)}",
            param="model",
        )
    return _download(name)


def is_cached(repo_id: str) -> bool:
    """Whether a repository's configuration is in the local cache (its weights then usually are)."""
    from huggingface_hub import try_to_load_from_cache

    names = ("config.json", *AUDIOCRAFT_FILES)
    return any(isinstance(try_to_load_from_cache(repo_id, name), str) for name in names)


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=SAFE_FILES))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(repo_id, allow_patterns=[*SAFE_FILES, *AUDIOCRAFT_FILES]))
    except RepositoryNotFoundError as error:
        raise InvalidRequestError(
            "a model that exists on the Hugging Face hub", repr(repo_id), "see `musicgen models`", param="model"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise WeightsError(
            f"{repo_id}: expected its files in the local cache or from the Hugging Face hub, got neither "
            f"({type(error).__name__}); check the network, or HF_HOME and HF_HUB_OFFLINE, or use `--model demo`"
        ) from error
    return folder
