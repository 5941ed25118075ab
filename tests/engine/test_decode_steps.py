"""Decode steps through buffers of fixed sizes: the same codes, nobody else's memory, the same addresses.

On the CPU they run without the capture; what a capture forbids is refused by a stand-in for a GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from engine.fakes import Listener, run_all
from engine.test_exactness import PROMPTS, Crowd, each_alone, equal, mixed_requests, new_request
from musicgen_kernels import PackedLinear, backend, delayed_sample_step, page_bytes
from musicgen_kernels.backend import ENVIRONMENT, choose
from musicgen_kernels.pages import KVStore
from musicgen_kernels.whole_step import StepByOperations
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from musicgen.config import CacheConfig, EngineConfig, KVDtype, SchedulerConfig, WeightDtype
from musicgen.engine.batch import ScheduledBatch
from musicgen.engine.core import EngineCore
from musicgen.engine.decode_buffers import DecodeBuffers, DecodeShape
from musicgen.engine.decode_steps import DecodeSteps, graph_sizes, why_not
from musicgen.engine.runner import ModelRunner
from musicgen.engine.step_inputs import is_decode
from musicgen.engine.transfer import ALIGNMENT
from musicgen.model import Model
from musicgen.types import EngineRequest, SamplingParams
from musicgen.weights import load_model

CPU = torch.device("cpu")
SHAPE = DecodeShape(4, 3, 2, special_token=9, spare_page=7, spare_slot=5)
NUM_PAGES = 2000


def new_core(
    model: Model,
    *,
    graphs: bool = True,
    weights: WeightDtype = "float32",
    kv: KVDtype = "float32",
    num_pages: int = NUM_PAGES,
    **scheduler: int,
) -> EngineCore:
    decoder = model.config.decoder
    size = page_bytes(decoder.num_layers, decoder.num_heads, decoder.head_dim, getattr(torch, kv))
    cache, steps = CacheConfig(kv, num_pages * size), SchedulerConfig(**scheduler)
    return EngineCore(model.lm, EngineConfig(cache, steps, weights, num_threads=1, cuda_graphs=graphs))


class Watched:
    """Counts the decode steps of a core, and the rows that were not there."""

    def __init__(self, core: EngineCore) -> None:
        self.num_rows: list[int] = []
        self.num_spare: list[int] = []
        decode = core.runner._decode
        run = decode.run

        def watched(batch: ScheduledBatch) -> np.ndarray:
            assert is_decode(batch)
            codes = run(batch)
            assert decode._buffers is not None
            self.num_rows.append(len(batch.chunks))
            self.num_spare.append(decode._buffers.num_rows - len(batch.chunks))
            return codes

        decode.run = watched  # type: ignore[method-assign]


@pytest.mark.parametrize(("max_rows", "sizes"), [(1, [1]), (3, [1, 2, 3]), (20, [1, 2, 4, 8, 16, 20])])
def test_the_sizes_that_get_a_graph(max_rows: int, sizes: list[int]) -> None:
    assert graph_sizes(max_rows) == sizes
    assert graph_sizes(64) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]


@pytest.mark.parametrize("kind", ["text", "melody"])
def test_rows_that_are_not_there_change_no_code_with_the_reference(
    kind: str, models: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One to three rows a request, one to five requests at a time."""
    requests = [request for request in mixed_requests(models[kind]) if request.num_frames <= 31][:9]
    monkeypatch.setenv(ENVIRONMENT, "reference")
    expected = each_alone(new_core(models[kind], graphs=False), requests)
    core = new_core(models[kind], max_requests=5, prefill_tokens=40)
    watched = Watched(core)
    equal(Crowd(core, seed=3).play(requests, num_victims=3), expected)
    assert len(set(watched.num_rows)) > 1
    assert max(watched.num_spare) > 0


def test_any_number_of_rows_with_the_reference(models: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "reference")
    requests = [
        new_request(models["text"], PROMPTS[i % 3], 5, SamplingParams(seed=i, guidance_scale=1.0)) for i in range(18)
    ]
    expected = each_alone(new_core(models["text"], graphs=False), requests)
    core = new_core(models["text"])
    for num_rows in (*range(1, 10), 17, 18):
        watched, listener = Watched(core), Listener()
        for i in range(num_rows):
            core.add(EngineRequest(str(i), requests[i]))
        run_all(core, listener)
        assert watched.num_rows[-1] == num_rows
        assert watched.num_spare[-1] == next(size for size in (1, 2, 4, 8, 16, 24) if size >= num_rows) - num_rows
        equal([listener.codes(str(i)) for i in range(num_rows)], expected[:num_rows])


def test_there_are_graphs_for_the_rows_beyond_those_of_a_flood(models: dict[str, Model]) -> None:
    requests = [new_request(models["text"], PROMPTS[i % 3], 20, SamplingParams(seed=i)) for i in range(5)]
    expected = each_alone(new_core(models["text"], graphs=False), requests)
    core = new_core(models["text"], max_requests=2, max_rows=4)
    watched, listener = Watched(core), Listener()
    for i in range(4):
        core.add(EngineRequest(str(i), requests[i], tenant="flood"))
    while len(core.scheduler.running) < 2:
        listener.take(core.step())
    core.add(EngineRequest("4", requests[4], tenant="other"))
    run_all(core, listener)
    assert max(watched.num_rows) == 6
    equal([listener.codes(str(i)) for i in range(5)], expected)


@pytest.mark.parametrize(("weights", "kv"), [("float32", "float32"), ("int4", "int8")])
@pytest.mark.parametrize("kind", ["text", "melody"])
def test_in_a_crowd_the_codes_of_an_engine_without(
    kind: str, weights: WeightDtype, kv: KVDtype, models: dict[str, Model]
) -> None:
    """Over windows, cancellations, shared and copied pages, few rows a step, and buffers that change between steps."""
    requests = mixed_requests(models[kind])
    expected = each_alone(new_core(models[kind], graphs=False, weights=weights, kv=kv), requests)
    core = new_core(models[kind], weights=weights, kv=kv, max_step_rows=13, num_pages=200)
    watched = Watched(core)
    equal(Crowd(core, seed=4).play(requests, num_victims=8), expected)
    assert len(set(watched.num_rows)) > 2  # which, depends on the clock: whose listener is nearest to silence
    assert max(watched.num_spare) > 0


@pytest.mark.parametrize("graphs", [True, False])
def test_pages_that_come_in_a_step_of_the_other_kind(
    graphs: bool, models: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler lets somebody come or go between two decode steps with a step of prefill between them, so that rows
    are placed anew; the buffers do not count on it. Here a row gets each of its pages in a step of the other kind."""
    requests = [new_request(models["text"], "rock", 60, SamplingParams(seed=i), max_frames=60) for i in range(2)]
    expected = each_alone(new_core(models["text"], graphs=False), requests)
    core = new_core(models["text"], graphs=graphs)
    placed = mock.Mock(wraps=core.runner._decode._place)
    monkeypatch.setattr(core.runner._decode, "_place", placed)
    num_elsewhere = 0

    def is_decode_but_for_new_pages(batch: ScheduledBatch) -> bool:
        nonlocal num_elsewhere
        has_new_page = any(chunk.start % 16 == 0 for chunk in batch.chunks)
        num_elsewhere += has_new_page
        return not has_new_page and is_decode(batch)

    monkeypatch.setattr("musicgen.engine.runner.is_decode", is_decode_but_for_new_pages)
    for i, request in enumerate(requests):
        core.add(EngineRequest(str(i), request))
    listener = run_all(core)
    equal([listener.codes(str(i)) for i in range(2)], expected)
    assert num_elsewhere == 4
    assert placed.call_count == 1


def test_rows_are_placed_anew_for_whoever_comes_or_goes(models: dict[str, Model]) -> None:
    """A row that is gone may leave its address in memory to one that comes: they are not told apart by it alone."""
    request = new_request(models["text"], "rock", 30, SamplingParams())
    core = new_core(models["text"], graphs=False)
    decode = core.runner._decode
    core.add(EngineRequest("first", request))
    core.step()
    core.step()
    (gone,) = [sequence.rows[0] for sequence in core.scheduler.running]
    core.abort("first")
    assert decode._rows[0] is gone  # held, so its address is not free
    core.add(EngineRequest("second", request.with_seed(1)))
    core.step()
    core.step()
    assert decode._rows == core.scheduler.running[0].rows
    assert decode._buffers is not None
    assert decode._buffers.sampling.seeds.tolist() == [1]


def test_only_the_pages_of_the_rows_are_written(models: dict[str, Model]) -> None:
    """Whoever is not there writes to the spare page, and to its first position."""
    core = new_core(models["text"], num_pages=40)
    plain = new_core(models["text"], graphs=False, num_pages=40)
    runner, spare = core.runner, core.runner.num_pages
    assert spare == 40
    assert runner.pages.k.shape[1] == 41
    for store in (runner.pages, plain.runner.pages):
        for tensor in (store.k, store.v):
            tensor.fill_(torch.nan)
    untouched = runner._codes.clone()
    watched = Watched(core)
    request = EngineRequest("a", new_request(models["text"], "rock", 20, SamplingParams(guidance_scale=1.0, top_k=5)))
    for i, one in enumerate((core, plain)):
        for name in "abc":
            one.add(replace(request, request_id=name))
        while one.has_work:
            one.step()
        assert i or max(watched.num_spare) == 1
    for ours, theirs in ((runner.pages.k, plain.runner.pages.k), (runner.pages.v, plain.runner.pages.v)):
        assert torch.equal(ours[:, :spare].nan_to_num(7.0), theirs.nan_to_num(7.0))
    written = runner.pages.layer(0).keys()
    assert written[spare, :, 0].isfinite().all()
    assert written[spare, :, 1:].isnan().all()
    spare_slot = runner._codes[-1]
    assert (spare_slot[:, 0] == models["text"].config.decoder.special_token).all()
    assert torch.equal(spare_slot[:, 1:], untouched[-1, :, 1:])


def addresses(buffers: DecodeBuffers) -> list[int]:
    parts = (buffers.step, buffers.sampling)
    tensors = [getattr(part, field.name) for part in parts for field in fields(part)]
    return [t.data_ptr() for t in (*tensors, buffers.out) if t is not None]


def test_addresses_stay_and_are_aligned() -> None:
    seen: list[list[int]] = []
    compute = mock.Mock(side_effect=lambda buffers: seen.append(addresses(buffers)))
    graphs = DecodeSteps([4, 16], SHAPE, CPU, lambda buffers: partial(compute, buffers), lambda: ())
    for num_rows in (3, 9, 4, 3):
        buffers = graphs.buffers(num_rows, 1)
        buffers.host["codes"][:] = num_rows
        graphs.run(buffers)
        assert (buffers.step.codes == num_rows).all()
    assert seen[0] == seen[2] == seen[3] != seen[1]
    assert all(address % ALIGNMENT == 0 for address in seen[1])
    assert len(set(seen[1])) == len(seen[1])


def test_what_comes_out_is_a_copy() -> None:
    steps = DecodeSteps(None, SHAPE, CPU, lambda buffers: lambda: buffers.out.add_(1), lambda: ())
    buffers = steps.buffers(2, 1)
    first = steps.run(buffers)
    steps.run(buffers)
    assert first.tolist() == [[1] * 4]


def test_without_graphs_buffers_stay_while_their_number_does() -> None:
    prepare = mock.Mock(side_effect=lambda buffers: lambda: None)
    steps = DecodeSteps(None, SHAPE, CPU, prepare, lambda: ())
    first = steps.buffers(5, 2)
    assert (first.num_rows, first.num_requests) == (5, 2)
    assert first.step.page_table.shape == (5, 3)
    assert first.sampling.row_offsets.shape == (3,)
    assert steps.buffers(5, 2) is first
    assert steps.buffers(5, 3) is not first
    assert steps.buffers(5, 2) is not first  # one of each would be many
    assert prepare.call_count == 3


@pytest.mark.parametrize("sizes", [[4, 8], None])
def test_memory_that_moved_drops_what_was_prepared(sizes: list[int] | None) -> None:
    moved: list[object] = [torch.ones(1), None]
    steps = DecodeSteps(sizes, SHAPE, CPU, lambda buffers: lambda: None, lambda: tuple(moved))
    before = steps.buffers(4, 2)
    assert steps.buffers(4, 2) is before
    moved[1] = torch.ones(1)
    assert steps.buffers(4, 2) is not before


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("what", ["codes", "texts"])
def test_codes_stay_right_when_memory_grows_under_a_request(what: str, graphs: bool, models: dict[str, Model]) -> None:
    """A piece that is longer, or a text, than there was room for, comes while another decodes. What was outgrown is
    overwritten, as the next owner of its memory would."""
    request = new_request(models["text"], "rock", 40, SamplingParams(seed=3), max_frames=1500)
    text = " ".join(["jazz"] * (300 if what == "texts" else 1))
    other = new_request(models["text"], text, 1700, SamplingParams(seed=4), max_frames=1500)
    known = torch.zeros(4, 1600, dtype=torch.int32)
    if what == "codes":
        other = replace(other, known_codes=known)
    (expected,) = each_alone(new_core(models["text"], graphs=False), [request])
    core, listener = new_core(models["text"], graphs=graphs, max_requests=4), Listener()
    core.add(EngineRequest("first", request))
    for _ in range(5):
        listener.take(core.step())
    runner = core.runner
    assert runner.text_pages is not None
    codes, store = runner._codes, runner.text_pages.store
    core.add(EngineRequest("other", other))
    core.step()
    assert (runner._codes is not codes) == (what == "codes")
    assert (runner.text_pages.store is not store) == (what == "texts")
    for outgrown in [codes] if what == "codes" else [store.k, store.v]:
        outgrown.fill_(7)
    core.abort("other")
    run_all(core, listener)
    assert torch.equal(listener.codes("first"), expected)


def test_nobody_is_there_until_told() -> None:
    """Warm-up and capture run on these."""
    buffers = DecodeBuffers(3, 3, SHAPE, CPU)
    buffers.upload()
    step, sampling = buffers.step, buffers.sampling
    assert step.page_table.tolist() == [[7, 7, 7]] * 3
    assert step.kv_lens.tolist() == [1] * 3
    assert step.positions().tolist() == [0] * 3
    assert sampling.row_offsets.tolist() == [0] * 4
    codes = torch.full((6, 4, 8), -1, dtype=torch.int32)
    codes[:5] = 3
    logits, delays = torch.full((3, 4, 9), torch.nan), torch.arange(4, dtype=torch.int32)
    delayed_sample_step(logits, sampling, delays, codes, out=buffers.out, backend="reference")
    assert buffers.download().tolist() == [[9] * 4] * 3
    assert (codes[:5] == 3).all()
    assert codes[5, :, 0].tolist() == [9] * 4
    assert (codes[5, :, 1:] == -1).all()


def test_a_capture_that_fails_is_logged_and_decoding_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runs: list[DecodeBuffers] = []
    graphs = DecodeSteps([2, 8], SHAPE, CPU, lambda buffers: partial(runs.append, buffers), lambda: ())
    graphs._captures = True
    monkeypatch.setattr(torch.cuda, "Stream", mock.Mock(side_effect=RuntimeError("no such thing")))
    for num_rows in (2, 8):
        buffers = graphs.buffers(num_rows, 1)
        graphs.run(buffers)
        assert runs[-1] is buffers
    assert len([record for record in caplog.records if record.exc_info]) == 1


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """Of torch.cuda, what a capture calls."""
    stubs = mock.Mock(stream=mock.MagicMock(), graph=mock.MagicMock())
    for name in ("Stream", "stream", "current_stream", "set_stream", "graph_pool_handle", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(stubs, name))
    return stubs


def captured_steps(sizes: list[int]) -> DecodeSteps:
    steps = DecodeSteps(sizes, SHAPE, CPU, lambda buffers: lambda: None, lambda: ())
    steps._captures = True
    steps.capture_all()
    return steps


def test_a_capture_that_cannot_end_gives_the_stream_back(cuda: mock.Mock) -> None:
    """torch leaves the capture's own stream current then, and the caller's thread goes on with it."""
    cuda.graph.return_value.__exit__.side_effect = RuntimeError("capture was invalidated")
    assert not captured_steps([2])._captures
    cuda.set_stream.assert_called_once_with(cuda.current_stream.return_value)


def test_all_captures_share_one_pool_on_one_stream(cuda: mock.Mock) -> None:
    """A block of the pool is reused only on the stream that it was allocated on."""
    cuda.graph.return_value.__exit__.return_value = False
    cuda.Stream.side_effect = lambda: mock.Mock()
    assert captured_steps([1, 2, 4])._captures
    assert [call.kwargs for call in cuda.graph.call_args_list] == 3 * [cuda.graph.call_args.kwargs]


def test_the_reference_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not(CPU, 64) is None
    assert why_not(torch.device("cuda"), 64) is None
    monkeypatch.setenv(ENVIRONMENT, "linear=reference")
    assert "linear on the reference" in str(why_not(torch.device("cuda"), 64))
    assert EngineConfig().resolved("cuda").cuda_graphs is True
    assert EngineConfig().resolved("cpu").cuda_graphs is False
    assert EngineConfig(cuda_graphs=False).resolved("cuda").cuda_graphs is False


def test_an_engine_without_kernels_warns(
    models: dict[str, Model], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Here the CPU is offered what a GPU is, of which nothing can run."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setitem(backend._PREFERENCE, "cpu", ("triton", "reference"))
    choose.cache_clear()
    try:
        new_core(models["text"], num_pages=100)
        assert "no kernel for append_paged_kv, paged_attention, " in caplog.text
        assert "so the slow PyTorch reference is used: not triton: " in caplog.text
        caplog.clear()
        monkeypatch.setenv(ENVIRONMENT, "reference")
        new_core(models["text"], num_pages=100)
        assert not caplog.text
    finally:
        choose.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: nothing is captured here")
@pytest.mark.parametrize(("weights", "kv"), [("bfloat16", "float16"), ("int4", "int8")])
@pytest.mark.parametrize("kind", ["text", "melody"])
def test_captured_on_a_gpu(kind: str, weights: WeightDtype, kv: KVDtype, folders: dict[str, Path]) -> None:
    """The codes of an engine without graphs, alone and in a crowd; every size is captured before the first step."""
    model = load_model(str(folders[kind]), "cuda")
    requests = mixed_requests(model)
    expected = each_alone(new_core(model, graphs=False, weights=weights, kv=kv), requests)
    core = new_core(model, weights=weights, kv=kv)
    assert core.runner._decode_steps._captures
    watched = Watched(core)
    equal(Crowd(core, seed=4).play(requests, num_victims=8), expected)
    assert max(watched.num_spare) > 0


# --- what a capture forbids ---


def _everywhere(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A dataclass, tuple or list with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_everywhere(item, change) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        changes = {field.name: _everywhere(getattr(value, field.name), change) for field in fields(value)}
        return replace(value, **changes)
    return value


class _OnTheGpu(TorchDispatchMode):
    """Every operation has all of its tensors on the GPU, and its result too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            assert not isinstance(tensor, Tensor) or tensor.device.type == "cuda", func
        return result


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of Triton's kernels that were to be launched; nothing is."""
    pytest.importorskip("triton", reason="Triton is not installed")
    names: list[str] = []

    def launch(kernel: Any, grid: tuple[int, ...], near: Tensor, *args: Any, **meta: Any) -> None:
        for arg in args:
            assert not isinstance(arg, Tensor) or arg.device.type == "cuda"
        names.append(kernel.fn.__name__)
        if "DOT_DTYPE" in meta:
            assert meta["DOT_DTYPE"].primitive_bitwidth == 16, f"{names[-1]} does without tensor cores"

    for name in ("append", "attention", "linear", "norm", "sampling"):
        monkeypatch.setattr(importlib.import_module(f"musicgen_kernels.triton.{name}"), "launch", launch)
    choose.cache_clear()
    yield names
    choose.cache_clear()


@pytest.mark.parametrize("kind", ["text", "melody"])
@pytest.mark.parametrize(("weights", "kv"), [("bfloat16", "float16"), ("bfloat16", "bfloat16"), ("int4", "int8")])
def test_nothing_in_a_captured_step_looks_at_a_value_or_leaves_the_gpu(
    kind: str, weights: WeightDtype, kv: KVDtype, models: dict[str, Model], launches: list[str]
) -> None:
    """The runner's own function over tensors of a GPU that is not there: they have no values to look at."""
    runner = new_core(models[kind], weights=weights, kv=kv).runner
    buffers = DecodeBuffers(4, 4, runner._decode_steps._shape, CPU)
    with FakeTensorMode(), torch.inference_mode():

        def fake(tensor: Tensor) -> Tensor:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

        def stored(store: KVStore) -> KVStore:
            return replace(_everywhere(store, fake), layout="plain")

        packed = _everywhere(runner.weights, fake)
        texts = None if runner.text_pages is None else stored(runner.text_pages.store)
        stand_in = SimpleNamespace(
            device=torch.device("cuda"),
            pages=stored(runner.pages),
            _text_store=lambda: texts,
            _graph_sizes=[4],
            _step=StepByOperations(_in_rows(packed)),
            _num_threads=1,
            _delays=fake(runner._delays),
            _codes=fake(runner._codes),
        )
        moved = SimpleNamespace(
            step=_everywhere(buffers.step, fake), sampling=_everywhere(buffers.sampling, fake), out=fake(buffers.out)
        )
        stand_in._sampler = partial(ModelRunner._sampler, stand_in)  # type: ignore[arg-type]
        with _OnTheGpu():
            ModelRunner._compute_decode(stand_in, moved)  # type: ignore[arg-type]
        with pytest.raises(DataDependentOutputException):  # as this would
            moved.step.kv_lens.sum().item()
    layers = models[kind].config.decoder.num_layers
    assert launches.count("_append") == layers
    assert launches.count("_decode") == layers * (1 if texts is None else 2)
    assert launches[-1] == "_sample"
    assert len(launches) == layers * (9 if texts is None else 14) + 4  # as docs/capacity.md says


def _in_rows(value: Any) -> Any:
    """Packed weights as a GPU has them."""
    if isinstance(value, PackedLinear):
        return replace(value, order="rows")
    if isinstance(value, tuple):
        return tuple(map(_in_rows, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _in_rows(getattr(value, field.name)) for field in fields(value)})
    return value
