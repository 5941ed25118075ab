"""A request's codes follow from the request alone: never from the batch, the pages, the cutting or an interruption.

All comparisons are of whole codes, bit by bit.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from engine.fakes import Listener, run_all
from musicgen_kernels import page_bytes
from musicgen_kernels.backend import ENVIRONMENT
from musicgen_kernels.whole_step import StepByOperations
from tiny import tune
from torch import Tensor

from musicgen.conditioning import Melody, condition
from musicgen.config import CacheConfig, EngineConfig, KVDtype, SchedulerConfig, WeightDtype
from musicgen.engine.batch import ScheduledBatch
from musicgen.engine.core import EngineCore
from musicgen.generation import generate_codes, plan_windows
from musicgen.model import Model
from musicgen.types import ChunkPolicy, CodesRequest, EngineRequest, FinishReason, SamplingParams
from musicgen.weights import load_model

MAX_FRAMES, STRIDE = 30, 18
PROMPTS = ["rock", "sad jazz with a slow piano, a double bass and brushes on a snare", "calm", None]
NUM_REQUESTS = 24
QUANTISED: list[tuple[WeightDtype, KVDtype]] = [("float32", "float32"), ("int8", "float16"), ("int4", "int8")]


def new_request(
    model: Model,
    prompt: str | None,
    num_frames: int,
    sampling: SamplingParams,
    *,
    melody: Tensor | None = None,
    known: Tensor | None = None,
    max_frames: int = MAX_FRAMES,
) -> CodesRequest:
    num_known = 0 if known is None else known.shape[-1]
    windows = plan_windows(num_frames, num_known, max_frames, STRIDE)
    recording = None if melody is None else Melody(melody, 32000)
    return CodesRequest(condition(model, prompt, recording, windows), sampling, known)


def mixed_requests(model: Model, *, greedy: bool = False) -> list[CodesRequest]:
    """24 requests: every prompt, with and without melody, with and without known codes, one to three windows, no,
    plain and double guidance, all ways to draw."""
    rng = random.Random(7)
    num_codebooks = model.config.decoder.num_codebooks
    requests = []
    for i in range(NUM_REQUESTS):
        has_melody = model.chroma is not None and i % 3 != 0
        sampling = SamplingParams(
            greedy=greedy or i % 8 == 5,
            temperature=rng.choice([0.7, 1.0, 1.3]),
            top_k=rng.choice([0, 5, 50]),
            top_p=rng.choice([0.0, 0.0, 0.8]),
            guidance_scale=rng.choice([1.0, 2.0, 3.0, 3.0]),
            melody_guidance=3.0 if has_melody and i % 2 else None,
            seed=rng.randrange(2**63),
        )
        num_frames = rng.choice([1, 2, 9, 17, 30, 31, 50, 66])
        known = None
        if i % 4 == 3 and num_frames > 2:
            generator = torch.Generator().manual_seed(i)
            known = torch.randint(tiny.CODEBOOK_SIZE, (num_codebooks, num_frames // 2), generator=generator)
        melody = tune(1.0 + i % 2, first_note=i % 2) if has_melody else None
        requests.append(new_request(model, PROMPTS[i % 4], num_frames, sampling, melody=melody, known=known))
    return requests


def new_core(
    model: Model, weights: WeightDtype = "float32", kv: KVDtype = "float32", *, num_pages: int = 2000, **scheduler: int
) -> EngineCore:
    decoder = model.config.decoder
    size = page_bytes(decoder.num_layers, decoder.num_heads, decoder.head_dim, getattr(torch, kv))
    config = EngineConfig(CacheConfig(kv, num_pages * size), SchedulerConfig(**scheduler), weights, num_threads=1)
    core = EngineCore(model.lm, config)
    assert core.allocator.num_pages == num_pages
    return core


def whole(request: CodesRequest, listener: Listener, request_id: str) -> Tensor:
    """All frames, known ones first."""
    made = listener.codes(request_id)
    assert listener.chunks[request_id][0].frame_offset == request.num_known_frames
    return made if request.known_codes is None else torch.cat([request.known_codes.int(), made], -1)


def each_alone(core: EngineCore, requests: Sequence[CodesRequest]) -> list[Tensor]:
    """The codes of each request with nobody beside it (and nothing kept from before it)."""
    codes = []
    for request in requests:
        core.add(EngineRequest("alone", request))
        codes.append(whole(request, run_all(core), "alone"))
        kept = core.allocator.allocate(core.allocator.num_pages)  # evicts every page that is kept
        core.allocator.release(kept)
    return codes


class Crowd:
    """Requests that arrive at random steps, with victims between them that are cancelled at random steps."""

    def __init__(self, core: EngineCore, seed: int) -> None:
        self.core, self.rng, self.listener = core, random.Random(seed), Listener()
        self.most_waiting = self.most_running = self.num_copies = self.num_shared = 0
        run = core.runner.run

        def spy(batch: ScheduledBatch) -> np.ndarray:
            self.num_copies += len(batch.copies)
            return run(batch)

        core.runner.run = spy  # type: ignore[method-assign]

    def play(self, requests: Sequence[CodesRequest], num_victims: int = 0) -> list[Tensor]:
        self.listener = Listener()
        arrivals = [(str(i), request) for i, request in enumerate(requests)]
        for i in range(num_victims):
            request = self.rng.choice(requests)
            arrivals.append((f"victim{i}", request.with_seed(i)))
        self.rng.shuffle(arrivals)
        while arrivals or self.core.has_work:
            while arrivals and self.rng.random() < 0.4:
                self._add(*arrivals.pop())
            self.listener.take(self.core.step())
            self.core.check()
            if num_victims and self.rng.random() < 0.2:
                self.core.abort(f"victim{self.rng.randrange(num_victims)}")
            self._look()
        assert self.core.stats().pages_held == 0
        return [whole(request, self.listener, str(i)) for i, request in enumerate(requests)]

    def _add(self, request_id: str, request: CodesRequest) -> None:
        chunks = self.rng.choice([None, ChunkPolicy(1, 7), ChunkPolicy()])
        self.core.add(EngineRequest(request_id, request, tenant=self.rng.choice("ab"), chunks=chunks))

    def _look(self) -> None:
        running = self.core.scheduler.running
        self.most_waiting = max(self.most_waiting, len(self.core.scheduler.waiting))
        self.most_running = max(self.most_running, len(running))
        pages = {page for sequence in running for row in sequence.rows for page in row.pages}
        self.num_shared = max(self.num_shared, sum(self.core.allocator.num_holders(page) > 1 for page in pages))


def equal(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    wrong = [i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if not torch.equal(a, b)]
    assert not wrong, f"requests {wrong} have other codes than alone"


def test_more_likeliest_codes_than_there_are_is_all_of_them(models: dict[str, Model]) -> None:
    """And no number of them ends the engine."""
    params = [SamplingParams(top_k=k, seed=3) for k in (0, tiny.CODEBOOK_SIZE, 2**31 - 1, 2**31, 2**70)]
    requests = [new_request(models["text"], "rock", 9, sampling) for sampling in params]
    first, *others = each_alone(new_core(models["text"]), requests)
    equal(others, [first] * len(others))


@pytest.mark.parametrize(("weights", "kv"), QUANTISED)
@pytest.mark.parametrize("kind", ["text", "melody"])
def test_alone_or_in_a_crowd(kind: str, weights: WeightDtype, kv: KVDtype, models: dict[str, Model]) -> None:
    requests = mixed_requests(models[kind])
    alone = each_alone(new_core(models[kind], weights, kv), requests)
    assert all(codes.shape[-1] == request.num_frames for codes, request in zip(alone, requests, strict=True))
    assert len(torch.cat(alone, -1).unique()) > 50  # codes that vary
    crowd = Crowd(new_core(models[kind], weights, kv), seed=1)
    equal(crowd.play(requests, num_victims=8), alone)
    assert crowd.most_running >= 8
    assert any(end.reason is FinishReason.CANCELLED for end in crowd.listener.ends.values())


@pytest.mark.parametrize(
    ("kind", "prefill_tokens"), [("text", 1), ("text", 2), ("text", 7), ("melody", 7), ("melody", 64)]
)
def test_any_cut_of_the_prefill(kind: str, prefill_tokens: int, models: dict[str, Model]) -> None:
    requests = mixed_requests(models[kind])
    alone = each_alone(new_core(models[kind], "int8", "int8"), requests)
    tokens = {"prefill_tokens": prefill_tokens, "idle_prefill_tokens": 2 * prefill_tokens + 1}
    equal(Crowd(new_core(models[kind], "int8", "int8", **tokens), seed=2).play(requests), alone)


@pytest.mark.parametrize(("kind", "num_pages"), [("text", 9), ("melody", 63)])
def test_few_pages(kind: str, num_pages: int, models: dict[str, Model]) -> None:
    """Pages for hardly more than the largest request: the others wait, and every page has many owners in turn."""
    requests = mixed_requests(models[kind])
    alone = each_alone(new_core(models[kind]), requests)
    crowd = Crowd(new_core(models[kind], num_pages=num_pages), seed=3)
    equal(crowd.play(requests, num_victims=6), alone)
    assert crowd.most_waiting >= 8


@pytest.mark.parametrize("kind", ["text", "melody"])
def test_steps_too_small_for_all(kind: str, models: dict[str, Model]) -> None:
    requests = mixed_requests(models[kind])
    alone = each_alone(new_core(models[kind]), requests)
    equal(Crowd(new_core(models[kind], max_step_rows=5), seed=4).play(requests), alone)


@pytest.mark.parametrize("kind", ["text", "melody"])
def test_shared_prefixes(kind: str, models: dict[str, Model]) -> None:
    """Samples of one prompt, the same request again, a null row of the same length, the same known codes."""
    model = models[kind]
    generator = torch.Generator().manual_seed(1)
    known = torch.randint(tiny.CODEBOOK_SIZE, (4, 21), generator=generator)
    sampling = SamplingParams()
    first = new_request(model, "rock", 40, sampling, known=known)
    requests = [first.with_seed(i) for i in range(6)]
    requests += [first.with_seed(0), new_request(model, "jazz", 40, replace(sampling, seed=3), known=known)]
    requests += [new_request(model, "rock", 25, replace(sampling, seed=i)) for i in range(4)]
    alone = each_alone(new_core(model), requests)
    crowd = Crowd(new_core(model), seed=5)
    equal(crowd.play(requests, num_victims=4), alone)
    assert crowd.num_shared > 0
    assert crowd.num_copies > 0
    equal(crowd.play(requests), alone)  # now what is kept is shared


@pytest.mark.parametrize(("weights", "kv"), [("float32", "float32"), ("int4", "int8")])
@pytest.mark.parametrize("kind", ["text", "melody"])
def test_resumed_at_every_frame(kind: str, weights: WeightDtype, kv: KVDtype, models: dict[str, Model]) -> None:
    """A piece of two windows (0 to 20, 18 to 28), interrupted after every frame, goes on to the same codes."""
    model = models[kind]
    melody = tune(1.0) if model.chroma is not None else None
    piece = new_request(model, "rock", 28, SamplingParams(seed=11), melody=melody, max_frames=20)
    assert len(piece.windows) == 2
    core = new_core(model, weights, kv)
    (codes,) = each_alone(core, [piece])
    resumed = [replace(piece, known_codes=codes[:, :num_known]) for num_known in range(1, 28)]
    equal(each_alone(core, resumed), [codes] * 27)
    equal(Crowd(core, seed=6).play(resumed), [codes] * 27)


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("kind", ["text", "melody"])
def test_equal_to_one_request_at_a_time_without_an_engine(kind: str, greedy: bool, models: dict[str, Model]) -> None:
    """The model of plain operations that the goldens are held to gives the same codes.

    Its logits are rounded otherwise; so this holds as long as no two candidates are that close.
    """
    requests = mixed_requests(models[kind], greedy=greedy)
    equal(
        Crowd(new_core(models[kind]), seed=8).play(requests),
        [generate_codes(models[kind].lm, request) for request in requests],
    )


@pytest.mark.parametrize("backend", ["reference", "linear=reference"])
@pytest.mark.parametrize("kind", ["text", "melody"])
def test_without_the_one_call(
    kind: str, backend: str, models: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One operation after another, as on a GPU, and on a CPU without the compiled kernels: with cut prefills, in which
    steps decide nothing, the same codes."""
    requests = [request for request in mixed_requests(models[kind], greedy=True) if request.num_frames <= 31][:6]
    expected = each_alone(new_core(models[kind]), requests)
    monkeypatch.setenv(ENVIRONMENT, backend)
    core = new_core(models[kind], prefill_tokens=3, idle_prefill_tokens=9)
    assert isinstance(core.runner._step, StepByOperations)
    equal(Crowd(core, seed=12).play(requests), expected)


@pytest.mark.parametrize("kind", ["text-stereo", "melody-stereo"])
def test_stereo_equals_one_request_at_a_time(kind: str, models: dict[str, Model]) -> None:
    requests = mixed_requests(models[kind], greedy=True)[:6]
    equal(
        Crowd(new_core(models[kind]), seed=9).play(requests),
        [generate_codes(models[kind].lm, request) for request in requests],
    )


def test_goldens_of_audiocraft_through_the_engine() -> None:
    folder = tiny.GOLDEN / "audiocraft" / "text"
    model = load_model(str(folder))
    with np.load(folder / "golden.npz") as file:
        golden = {
            name: torch.from_numpy(file[f"{name}_tokens"][0]).int()
            for name in ("text0", "text1", "cfg1.5", "uncond", "cont")
        }
    pop = "80s pop track with bassy drums and synth"

    def greedy(prompt: str | None, seconds: int, guidance: float = 3.0, known: Tensor | None = None) -> CodesRequest:
        sampling = SamplingParams(greedy=True, guidance_scale=guidance)
        return new_request(model, prompt, seconds * 50, sampling, known=known, max_frames=1500)

    requests = {
        "text0": greedy(pop, 2),
        "text1": greedy("sad jazz", 2),
        "cfg1.5": greedy(pop, 1, 1.5),
        "uncond": greedy(None, 1),
        "cont": greedy("sad jazz", 2, known=golden["cont"][:, :50]),
    }
    got = Crowd(new_core(model), seed=10).play(list(requests.values()))
    equal(got, [golden[name] for name in requests])
