"""An engine without a model: a runner whose pages hold one number a position, and a clock that tests turn.

The runner computes as a real one does, in integers: every position's number follows from the row's inputs, decided
codes follow from everything that the pages of a request hold. So a page that is shared wrongly, copied too late or
handed to two rows shows as wrong codes, or at once as an AssertionError.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np
import torch
from musicgen_kernels import PAGE_LEN
from musicgen_kernels.errors import KernelArgumentError

from musicgen.config import ChromaConfig, CodecConfig, DecoderConfig, EngineConfig, ModelConfig, SchedulerConfig
from musicgen.delay import UNKNOWN_CODE
from musicgen.engine.batch import RowChunk, ScheduledBatch
from musicgen.engine.core import EngineCore
from musicgen.engine.sequence import Sequence
from musicgen.generation import plan_windows
from musicgen.models.language_model import GuidanceRows, PlannedRows
from musicgen.types import (
    CodeChunk,
    CodesRequest,
    Conditioning,
    EndOfRequest,
    EngineEvent,
    EngineRequest,
    SamplingParams,
    Window,
)

CODEBOOK_SIZE = 64
MAX_FRAMES = 40
STRIDE = 24
NUM_CHROMA_FRAMES = 2

CONFIG = ModelConfig(
    name="fake",
    decoder=DecoderConfig(
        num_layers=1, dim=1, num_heads=1, ffn_dim=1, num_codebooks=2, codebook_size=CODEBOOK_SIZE, cross_attention=False
    ),
    codec=CodecConfig(
        sample_rate=1000,
        num_codebooks=2,
        codebook_size=CODEBOOK_SIZE,
        codebook_dim=1,
        hidden_size=1,
        num_filters=1,
        upsampling_ratios=(20,),
        num_residual_layers=1,
        num_lstm_layers=1,
        kernel_size=7,
        last_kernel_size=7,
        residual_kernel_size=3,
        dilation_growth_rate=2,
        compress=2,
        conv_shortcut=False,
        pad_mode="reflect",
    ),
    text_dim=1,
    chroma=ChromaConfig(num_frames=NUM_CHROMA_FRAMES, num_chroma=12),
    audio_channels=1,
    license="none",
    max_duration_s=MAX_FRAMES / 50,
)


class VirtualClock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeLanguageModel:
    """Makes rows as the melody model does: the text is the prefix, the null row's is zero."""

    config = CONFIG
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.made: list[weakref.ref[torch.Tensor]] = []
        """The prefixes of windows that have opened."""

    def guidance_rows(self, conditioning: Conditioning, sampling: SamplingParams) -> GuidanceRows:
        text = torch.zeros(1, 1) if conditioning.text is None else conditioning.text
        melody = torch.zeros(NUM_CHROMA_FRAMES, 1)
        rows = [torch.cat([melody, text])]
        if conditioning.text is not None and sampling.melody_guidance is not None:
            melody_row = melody + int(text[0, 0]) % 2  # without a melody it is equal to the null row
            rows.append(torch.cat([melody_row, torch.zeros_like(text)]))
        if conditioning.text is not None and sampling.guidance_scale != 1.0:
            rows.append(torch.cat([melody, torch.zeros_like(text)]))
        return GuidanceRows(torch.stack(rows), None, len(rows))

    def plan_rows(self, conditioning: Conditioning, sampling: SamplingParams) -> PlannedRows:
        rows = self.guidance_rows(conditioning, sampling)
        return PlannedRows(rows.num_rows, rows.prefix_len, lambda: self._made(conditioning, sampling))

    def _made(self, conditioning: Conditioning, sampling: SamplingParams) -> GuidanceRows:
        rows = self.guidance_rows(conditioning, sampling)
        assert rows.prefix is not None
        self.made.append(weakref.ref(rows.prefix))
        return rows


def _mix(*values: np.ndarray | int) -> np.ndarray:
    """Scramble integers into one, elementwise (64 bits, wrapping)."""
    mixed = np.uint64(0x9E3779B97F4A7C15) + np.zeros(1, np.uint64)
    for value in values:
        mixed = (mixed ^ np.asarray(value).astype(np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(29)
    return mixed


class RunnerError(Exception):
    """What a runner that is told to fail raises."""


@dataclass
class _Open:
    """What the runner knows of a sequence."""

    sequence: Sequence
    codes: np.ndarray
    """`[K, S]` the delayed sequence of the piece up to the window's end."""


class FakeRunner:
    """The interface of `ModelRunner`: `num_pages`, `open`, `close`, `frames`, `run`.

    Args:
        clock: advanced by `step_s` and `token_s` a position at each run.
    """

    def __init__(
        self, num_pages: int, clock: VirtualClock | None = None, step_s: float = 0.01, token_s: float = 0.0
    ) -> None:
        self.num_pages = num_pages
        self.memory = np.zeros((num_pages, PAGE_LEN), np.uint64)
        self.fail = False
        self.refused: set[str] = set()
        """Requests that the kernels refuse, after all has been written."""
        self.num_runs = 0
        self.most_step_rows = 0
        self.most_prefill_beside_decode = 0
        self._clock, self._step_s, self._token_s = clock, step_s, token_s
        self._open: dict[int, _Open] = {}

    def open(self, sequence: Sequence) -> None:
        self._open[sequence.slot] = _Open(sequence, sequence.delayed_codes().numpy().copy())

    def close(self, slot: int) -> None:
        if self.fail:
            raise RunnerError("close fails too")
        del self._open[slot]

    def frames(self, slot: int, start: int, end: int) -> torch.Tensor:
        pattern = CONFIG.delay_pattern
        return pattern.undo(torch.from_numpy(self._open[slot].codes)[:, start : pattern.num_steps(end)])

    def run(self, batch: ScheduledBatch) -> np.ndarray:
        if self.fail:
            raise RunnerError("told to fail")
        self.num_runs += 1
        if self._clock is not None:
            self._clock.now += self._step_s + self._token_s * batch.num_tokens
        for source, target in batch.copies:
            self.memory[target] = self.memory[source]
        writers: set[int] = set()
        for chunk in batch.chunks:
            self._write(chunk, writers)
        if refused := self.refused & {chunk.sequence.request.request_id for chunk in batch.chunks}:
            raise KernelArgumentError("top_k", "an argument that can be", str(refused))
        self._count(batch)
        ends = {id(chunk.row): chunk.start + chunk.num_new for chunk in batch.chunks}
        return np.array([self._decide(s, ends) for s in batch.deciding], np.int32).reshape(-1, 2)

    def _count(self, batch: ScheduledBatch) -> None:
        decodes = [c for c in batch.chunks if c.num_new == 1 and c.start >= c.sequence.prefill_len]
        self.most_step_rows = max(self.most_step_rows, len(decodes))
        if decodes:
            self.most_prefill_beside_decode = max(self.most_prefill_beside_decode, batch.num_tokens - len(decodes))

    def _inputs(self, chunk: RowChunk) -> np.ndarray:
        """A number for each position of the row so far: its prefix, then its codes."""
        sequence = chunk.sequence
        assert sequence.inputs.prefix is not None
        prefix = sequence.inputs.prefix[chunk.row.index, :, 0].numpy().astype(np.int64)
        codes = self._open[sequence.slot].codes[:, sequence.window.start :]
        if sequence.window.start:  # a window begins with step 0, whose place holds an earlier frame in the piece's
            codes = codes.copy()
            for k, delay in enumerate(CONFIG.delay_pattern.delays):
                codes[k, : 1 + delay] = CODEBOOK_SIZE
        numbers = np.concatenate([prefix, codes[0] * 1000 + codes[1]])
        return _mix(np.arange(len(numbers)), numbers)

    def _write(self, chunk: RowChunk, writers: set[int]) -> None:
        pages, end = chunk.row.pages, chunk.start + chunk.num_new
        assert chunk.num_new > 0
        assert end <= len(pages) * PAGE_LEN, "a position without a page"
        inputs = self._inputs(chunk)
        held = self.memory[pages].reshape(-1)
        assert np.array_equal(held[: chunk.start], inputs[: chunk.start]), "the pages hold something else"
        for page in set(pages[chunk.start // PAGE_LEN : (end - 1) // PAGE_LEN + 1]):
            assert page not in writers, "two rows write to one page"
            writers.add(page)
        for position in range(chunk.start, end):
            self.memory[pages[position // PAGE_LEN], position % PAGE_LEN] = inputs[position]

    def _decide(self, sequence: Sequence, ends: dict[int, int]) -> np.ndarray:
        """Codes that follow from the seed, the step and all that the rows' pages hold; known places stay.

        Args:
            ends: positions that each row (by `id`) has computed when this step is done.
        """
        (end,) = {ends[id(row)] for row in sequence.rows}  # guidance rows are together
        step = sequence.window.start + end - sequence.inputs.prefix_len
        state = _mix(sequence.request.codes.sampling.seed, step)
        for row in sequence.rows:
            state = _mix(state, np.bitwise_xor.reduce(self.memory[row.pages].reshape(-1)[:end]))
        codes = self._open[sequence.slot].codes
        for k in range(2):
            if codes[k, step] == UNKNOWN_CODE:
                codes[k, step] = int(_mix(state, k)[0] % np.uint64(CODEBOOK_SIZE))
        return codes[:, step].copy()


def codes_request(
    num_frames: int = 20,
    *,
    text: int = 1,
    text_len: int = 3,
    seed: int = 0,
    num_rows: int = 2,
    known: torch.Tensor | None = None,
    windows: list[Window] | None = None,
) -> CodesRequest:
    """A request of 1 to 3 guidance rows; equal `text` and `text_len` have equal prefixes."""
    conditioning = Conditioning(torch.full((text_len, 1), float(text)), None)
    sampling = SamplingParams(
        seed=seed, guidance_scale=1.0 if num_rows == 1 else 3.0, melody_guidance=2.0 if num_rows == 3 else None
    )
    num_known = 0 if known is None else known.shape[-1]
    planned = windows if windows is not None else plan_windows(num_frames, num_known, MAX_FRAMES, STRIDE)
    return CodesRequest(tuple((window, conditioning) for window in planned), sampling, known)


def new_core(
    num_pages: int = 1000, runner: FakeRunner | None = None, clock: VirtualClock | None = None, **scheduler: int
) -> EngineCore:
    """A core over a fake runner, with a clock that its runs advance."""
    clock = clock or VirtualClock()
    runner = runner or FakeRunner(num_pages, clock)
    config = EngineConfig(scheduler=SchedulerConfig(**scheduler))
    return EngineCore(FakeLanguageModel(), config, runner=runner, clock=clock)  # type: ignore[arg-type]


class Listener:
    """Collects events; asserts that chunks are in order without gaps and that a request ends once."""

    def __init__(self) -> None:
        self.chunks: dict[str, list[CodeChunk]] = {}
        self.ends: dict[str, EndOfRequest] = {}

    def take(self, events: list[EngineEvent]) -> None:
        for event in events:
            assert event.request_id not in self.ends, "an event after the terminal one"
            if isinstance(event, EndOfRequest):
                self.ends[event.request_id] = event
                continue
            chunks = self.chunks.setdefault(event.request_id, [])
            assert event.codes.dtype == torch.int32
            assert event.codes.shape[-1] > 0
            if chunks:
                assert event.frame_offset == chunks[-1].frame_offset + chunks[-1].codes.shape[-1], "a gap"
            chunks.append(event)

    def codes(self, request_id: str) -> torch.Tensor:
        """The frames that were handed out, `[K, T]`."""
        return torch.cat([chunk.codes for chunk in self.chunks[request_id]], -1)


def run_all(core: EngineCore, listener: Listener | None = None, max_steps: int = 10_000) -> Listener:
    """Step until nothing is left to do."""
    listener = listener or Listener()
    for _ in range(max_steps):
        if not core.has_work:
            return listener
        listener.take(core.step())
        core.check()
    raise AssertionError(f"work left after {max_steps} steps: {core.stats()}")


def alone(codes: CodesRequest) -> torch.Tensor:
    """All frames of a request, known ones included, in an engine of its own."""
    core = new_core()
    core.add(EngineRequest("alone", codes))
    made = run_all(core).codes("alone")
    return made if codes.known_codes is None else torch.cat([codes.known_codes, made], -1)
