"""Shared fixtures: tiny checkpoints of every kind, made once a session."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import tiny

from musicgen.model import Model
from musicgen.weights import load_model


@pytest.fixture(scope="session", autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reaches a network: the hub's client is offline, its cache the goldens' folder."""
    import huggingface_hub.constants as constants

    constants.HF_HUB_OFFLINE = True
    constants.HF_HUB_CACHE = str(tiny.GOLDEN / "audiocraft" / "hub")
    torch.set_num_threads(1)  # tiny tensors: a second thread only waits


@pytest.fixture(scope="session")
def peers() -> dict[str, tiny.PreTrainedModel]:
    """transformers' models, by kind."""
    return {kind: tiny.build(**options) for kind, options in tiny.KINDS.items()}


@pytest.fixture(scope="session")
def folders(peers: dict[str, tiny.PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Their checkpoints in Hugging Face layout; the stereo ones in several shards."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        kind: tiny.save(peer, root / kind, max_shard_size="2MB" if "stereo" in kind else "5GB")
        for kind, peer in peers.items()
    }


@pytest.fixture(scope="session")
def models(folders: dict[str, Path]) -> dict[str, Model]:
    """Our models, loaded from those checkpoints."""
    return {kind: load_model(str(folder), "cpu") for kind, folder in folders.items()}
