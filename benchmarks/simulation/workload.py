"""Workload of the simulation: kind of prompt, duration, tenant and patience of requests, and their engine sequences.

Prompts are placeholders of realistic length; equal prompts have equal contents, so pages are shared as in production.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from benchmarks.simulation.arrivals import Arrivals
from musicgen.config import ModelConfig
from musicgen.engine.sequence import Sequence
from musicgen.generation import plan_windows
from musicgen.models.language_model import GuidanceRows, PlannedRows
from musicgen.types import ChunkPolicy, CodesRequest, Conditioning, EngineRequest, SamplingParams, Window

Kind = Literal["text", "melody", "double", "continuation"]
"""double: melody with double guidance, three rows. continuation: a text and an audio prompt."""
RECENT_PROMPTS = 50
STRIDE_S = 18.0
"""Stride between windows of pieces longer than the model's window."""


@dataclass(frozen=True, slots=True)
class Tenant:
    name: str
    share: float
    """Share of all requests."""
    weight: float = 1.0
    """Fair-share weight."""


@dataclass(frozen=True, slots=True)
class Request:
    """One listener's request."""

    number: int
    arrived_s: float
    tenant: Tenant
    kind: Kind
    num_frames: int
    """Total frames, including known ones."""
    num_known: int
    text_len: int
    prompt: int
    """Requests of one kind with the same number have the same text and melody."""
    leaves_after_s: float
    """Patience: the listener disconnects this long after arriving; infinite: never."""

    @property
    def num_new(self) -> int:
        return self.num_frames - self.num_known


@dataclass(frozen=True, slots=True)
class Mix:
    """Distribution of requests.

    Args:
        kinds: share of each kind.
        durations_s: uniform between the two.
        repeat_share: share of requests that repeat one of the last fifty prompts.
        leave_share: share of listeners who disconnect, at a uniformly random time within the piece.
    """

    kinds: dict[Kind, float]
    tenants: tuple[Tenant, ...]
    durations_s: tuple[float, float] = (5.0, 30.0)
    known_s: tuple[float, float] = (2.0, 10.0)
    text_lens: tuple[int, int] = (4, 24)
    repeat_share: float = 0.1
    leave_share: float = 0.05

    def draw(self, num: int, arrivals: Arrivals, config: ModelConfig, seed: int) -> list[Request]:
        """`num` requests in order of arrival; the same seed yields the same requests at any rate, only denser."""
        times = arrivals.times(num, np.random.default_rng((seed, 0)))
        rng = np.random.default_rng((seed, 1))
        kinds = list(self.kinds)
        kind_of = rng.choice(len(kinds), num, p=_shares(self.kinds.values()))
        tenant_of = rng.choice(len(self.tenants), num, p=_shares(t.share for t in self.tenants))
        durations = rng.uniform(*self.durations_s, num)
        known = rng.uniform(*self.known_s, num)
        text_lens = rng.integers(self.text_lens[0], self.text_lens[1] + 1, num)
        repeats = np.where(rng.random(num) < self.repeat_share, rng.integers(1, RECENT_PROMPTS + 1, num), 0)
        leaves = np.where(rng.random(num) < self.leave_share, rng.random(num), np.inf)
        prompts = np.arange(num)
        requests = []
        for i in range(num):
            prompts[i] = prompts[max(0, i - repeats[i])]
            num_frames = max(1, config.num_frames(float(durations[i])))
            kind = kinds[kind_of[i]]
            num_known = int(min(known[i] * config.frame_rate_hz, num_frames // 2)) if kind == "continuation" else 0
            requests.append(
                Request(
                    number=i,
                    arrived_s=float(times[i]),
                    tenant=self.tenants[tenant_of[i]],
                    kind=kind,
                    num_frames=num_frames,
                    num_known=num_known,
                    text_len=int(text_lens[prompts[i]]),
                    prompt=int(prompts[i]),
                    leaves_after_s=float(leaves[i]) * num_frames / config.frame_rate_hz,
                )
            )
        return requests


def _shares(values: object) -> np.ndarray:
    shares = np.array(list(values), dtype=np.float64)  # type: ignore[call-overload]
    return np.asarray(shares / shares.sum())


def num_rows(kind: Kind) -> int:
    return 3 if kind == "double" else 2


def guidance_rows(request: Request, config: ModelConfig) -> GuidanceRows:
    """The rows that the language model would create, of width 1: conditional, melody-only, null."""
    text = torch.full((request.text_len, 1), float(request.prompt + 1))
    if config.chroma is None:
        return GuidanceRows(None, torch.stack([text, torch.zeros_like(text)]), 2)
    null = torch.zeros(config.chroma.num_frames, 1)
    melody = null + (request.prompt + 1 if request.kind in ("melody", "double") else 0)
    rows = [torch.cat([melody, text])]
    if request.kind == "double":
        rows.append(torch.cat([melody, torch.zeros_like(text)]))
    rows.append(torch.cat([null, torch.zeros_like(text)]))
    return GuidanceRows(torch.stack(rows), None, len(rows))


def engine_request(request: Request, config: ModelConfig, chunks: ChunkPolicy) -> EngineRequest:
    """The engine request, with empty conditioning: `guidance_rows` replaces the model's."""
    known = None
    if request.num_known:
        codes = np.random.default_rng(request.number).integers(0, 2048, (4, request.num_known), dtype=np.int32)
        known = torch.from_numpy(codes)
    conditioning = Conditioning(None, None)
    windows = plan_windows(
        request.num_frames,
        request.num_known,
        config.num_frames(config.max_duration_s),
        config.num_frames(STRIDE_S),
    )
    sampling = SamplingParams(melody_guidance=5.0 if request.kind == "double" else None)
    codes_request = CodesRequest(tuple((window, conditioning) for window in windows), sampling, known)
    tenant = request.tenant
    return EngineRequest(str(request.number), codes_request, tenant=tenant.name, weight=tenant.weight, chunks=chunks)


def new_sequence(request: Request, config: ModelConfig, chunks: ChunkPolicy, now: float) -> Sequence:
    """A sequence as created by the engine core."""
    engine = engine_request(request, config, chunks)
    rows = PlannedRows.of(guidance_rows(request, config))
    windows: list[tuple[Window, PlannedRows]] = [
        (window, rows) for window, _ in engine.codes.windows if window.end > request.num_known
    ]
    return Sequence(engine, config, windows, now)
