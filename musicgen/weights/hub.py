"""Resolves a model name to a folder on disk: a local folder, the bundled demo, or a Hugging Face snapshot.

Downloads (resumable, with progress) use huggingface_hub and honour `HF_HOME`, `HF_HUB_CACHE` and `HF_HUB_OFFLINE`.
huggingface_hub is imported only to look up a repository. Independent of the contents of the files.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from musicgen.errors import InvalidRequestError, WeightsError
from musicgen.weights.formats import found_instead
from musicgen.weights.registry import DEMO_MODEL, MODELS, UNSUPPORTED, find

SAFE_FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]
AUDIOCRAFT_FILES = ["state_dict.bin", "compression_state_dict.bin"]
CONFIG_FILES = ("config.json", "musicgen.json", "state_dict.bin")
"""A folder with one of them holds a checkpoint: in Hugging Face layout, packed, or in audiocraft layout."""

EXPECTED_NAME = "a short name, a Hugging Face repository id or a local folder"
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def demo_checkpoint() -> Path:
    """The folder of the bundled demo model."""
    return Path(str(files("musicgen").joinpath("demo", "checkpoint")))


def resolve(name: str) -> Path:
    """The local folder of a model, downloaded if necessary.

    Args:
        name: a short name, a Hugging Face repository id, or a local folder, which precedes a repository of that name.
            `@` and a branch, tag or commit after the first two select a revision.
    Raises:
        InvalidRequestError: unknown or unsupported name, or unknown revision.
        WeightsError: the files are not cached and could not be downloaded.
    """
    if name == DEMO_MODEL:
        return demo_checkpoint()
    repo_id, _, revision = name.partition("@")
    card, path = find(name), Path(name).expanduser()
    if name and repo_id not in MODELS and path.is_dir() and (card is None or _holds_checkpoint(path)):
        return path
    if card is not None:
        repo_id = card.repo_id
    if repo_id.count("/") != 1 or repo_id.startswith((".", "/", "~")):
        raise InvalidRequestError(
            EXPECTED_NAME,
            repr(name),
            f"{_did_you_mean(repo_id)}short names: {', '.join(MODELS)}",
            param="model",
        )
    if reason := UNSUPPORTED.get(repo_id):
        got, hint = f"{repo_id}: {reason}", f"choose one of {', '.join(MODELS)}"
        raise InvalidRequestError("a MusicGen model for text or melodies", got, hint, param="model")
    return _download(repo_id, revision or None)


def _did_you_mean(name: str) -> str:
    similar = get_close_matches(name, MODELS, n=1)
    return f"did you mean {similar[0]}? " if similar else ""


def _holds_checkpoint(folder: Path) -> bool:
    return any((folder / name).is_file() for name in CONFIG_FILES)


def is_cached(repo_id: str) -> bool:
    """Whether a repository's configuration is in the local cache (usually with its weights)."""
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(repo_id, name), str) for name in CONFIG_FILES)


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=SAFE_FILES))
        if not any(folder.glob("*.safetensors")):
            patterns = [*SAFE_FILES, *AUDIOCRAFT_FILES]
            folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
            if not (folder / AUDIOCRAFT_FILES[0]).is_file():
                found = found_instead(list_repo_files(repo_id, revision=revision))
                raise WeightsError(f"{repo_id}: expected safetensors files or {AUDIOCRAFT_FILES[0]}, {found}")
    except GatedRepoError as error:
        raise WeightsError(
            f"{repo_id}: expected access to this gated repository, got a refusal; accept its terms at "
            f"https://huggingface.co/{repo_id}, and {LOG_IN}"
        ) from error
    except RepositoryNotFoundError as error:  # also what the hub says of private ones
        hint = f"see `musicgen models`; if the repository is private, {LOG_IN}"
        raise InvalidRequestError(
            "an existing model on the Hugging Face hub", repr(repo_id), hint, param="model"
        ) from error
    except RevisionNotFoundError as error:
        expected = f"an existing branch, tag or commit of {repo_id}"
        raise InvalidRequestError(expected, repr(revision), param="model") from error
    except HFValidationError as error:
        raise InvalidRequestError(
            "a Hugging Face repository id, such as facebook/musicgen-small", repr(repo_id), param="model"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if (status := _http_status(error) or _http_status(error.__cause__)) in (401, 403):
            raise WeightsError(
                f"{repo_id}: expected access to the repository, got HTTP status {status}: the access token is invalid "
                f"or lacks the right to read it; {LOG_IN}"
            ) from error
        raise WeightsError(
            f"{repo_id}: expected its files in the local cache or on the Hugging Face hub, got neither "
            f"({type(error).__name__}); check the network, HF_HOME and HF_HUB_OFFLINE, or use `--model demo`"
        ) from error
    except HTTPError as error:  # of the HTTP client, in the middle of a download
        raise WeightsError(
            f"{repo_id}: the download was interrupted ({type(error).__name__}); run the same command again to resume it"
        ) from error
    return folder


def _http_status(error: BaseException | None) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
