"""What kills replicas is not tried on all of them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from musicgen_serving.components import LostError
from musicgen_serving.errors import ReplicaLostError
from musicgen_serving.pipeline import Pipeline
from musicgen_serving.settings import FailoverSettings
from musicgen_serving.types import GenerationRequest, Piece

from musicgen.weights import open_checkpoint


class Mortal:
    """Parts of which every call is the last."""

    def __init__(self) -> None:
        self.num_calls = 0

    async def _die(self, *_: object) -> Any:
        self.num_calls += 1
        raise LostError("killed")

    encode_text = extract_chroma = encode_prompt = _die


@pytest.mark.parametrize(
    ("fields", "num_calls"),
    [({"melody": b"a bomb"}, 2), ({"prompt_audio": b"a bomb"}, 2), ({"pieces": (Piece("a text", 1),)}, 8)],
    ids=["melody", "prompt", "text"],
)
def test_a_recording_that_kills_a_replica_is_tried_on_one_more(fields: dict[str, Any], num_calls: int) -> None:
    request = GenerationRequest(
        **{"request_id": "r", "model": "demo", "pieces": (Piece(None, 1),), "duration_s": 1.0} | fields
    )
    parts = Mortal()
    pipeline = Pipeline(parts, FailoverSettings(backoff_s=0.001))  # type: ignore[arg-type]
    with pytest.raises(ReplicaLostError):
        asyncio.run(pipeline.prepare(request, open_checkpoint("demo").config))
    assert parts.num_calls == num_calls
