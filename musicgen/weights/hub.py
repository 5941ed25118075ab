"""Resolves a model name to a folder on disk: a local folder, the bundled demo, or a Hugging Face snapshot.

Downloads (resumable, with progress) use huggingface_hub and honour `HF_HOME`, `HF_HUB_CACHE` and `HF_HUB_OFFLINE`.
huggingface_hub is imported only to look up a repository. Independent of the contents of the files.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from musicgen.errors import InvalidRequestError, WeightsError
from musicgen.weights.registry import DEMO_MODEL, MODELS, find

SAFE_FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]
AUDIOCRAFT_FILES = ["state_dict.bin", "compression_state_dict.bin"]


def demo_checkpoint() -> Path:
    """The folder of the bundled demo model."""
    return Path(str(files("musicgen").joinpath("demo", "checkpoint")))


def resolve(name: str) -> Path:
    """The local folder of a model, downloaded if necessary.

    Args:
        name: a short name, a Hugging Face repository id, or a local folder.
    Raises:
        InvalidRequestError: unknown name.
        WeightsError: the files are not cached and could not be downloaded.
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
    """Whether a repository's configuration is in the local cache (usually with its weights)."""
    from huggingface_hub import try_to_load_from_cache

    names = ("config.json", *AUDIOCRAFT_FILES)
    return any(isinstance(try_to_load_from_cache(repo_id, name), str) for name in names)


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=SAFE_FILES))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(repo_id, allow_patterns=[*SAFE_FILES, *AUDIOCRAFT_FILES]))
    except RepositoryNotFoundError as error:
        raise InvalidRequestError(
            "an existing model on the Hugging Face hub", repr(repo_id), "see `musicgen models`", param="model"
        ) from error
    except HFValidationError as error:
        raise InvalidRequestError(
            "a Hugging Face repository id, such as facebook/musicgen-small", repr(repo_id), param="model"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise WeightsError(
            f"{repo_id}: expected its files in the local cache or on the Hugging Face hub, got neither "
            f"({type(error).__name__}); check the network, HF_HOME and HF_HUB_OFFLINE, or use `--model demo`"
        ) from error
    except HTTPError as error:  # of the HTTP client, in the middle of a download
        raise WeightsError(
            f"{repo_id}: the download was interrupted ({type(error).__name__}); run the same command again to resume it"
        ) from error
    return folder
