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

KINDS = {
    "text": {"melody": False, "stereo": False},
    "melody": {"melody": True, "stereo": False},
    "text-stereo": {"melody": False, "stereo": True},
    "melody-stereo": {"melody": True, "stereo": True},
}


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
    return {kind: tiny.build(**options) for kind, options in KINDS.items()}


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
    return {kind: load_model(str(folder)) for kind, folder in folders.items()}


def tune(seconds: float, sample_rate: int = 32000, first_note: int = 0) -> torch.Tensor:
    """A melody `[1, N]`: a scale of plucked harmonic tones, half a second each."""
    t = torch.arange(int(seconds * sample_rate)) / sample_rate
    note = (t * 2).long()
    steps = torch.tensor([0, 2, 4, 5, 7, 9, 11, 12, 7, 4])[(note + first_note) % 10]
    phase = 2 * torch.pi * 220 * 2 ** (steps / 12) * t
    envelope = torch.exp(-3 * (t * 2 - note) / 2)
    return (0.3 * envelope * sum(torch.sin(n * phase) / n for n in (1, 2, 3)))[None]
