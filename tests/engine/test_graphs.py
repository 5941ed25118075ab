"""Decode steps through buffers of fixed sizes: the same codes, nobody else's memory, the same addresses.

On the CPU they run without the capture; what a capture forbids is refused by a stand-in for a GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from engine.fakes import Listener, run_all
from engine.test_exactness import PROMPTS, Crowd, each_alone, equal, mixed_requests, new_request
from musicgen_kernels import PackedLinear, delayed_sample_step, page_bytes
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
from musicgen.engine.decode_buffers import ALIGNMENT, DecodeBuffers, DecodeShape
from musicgen.engine.graphs import DecodeGraphs, bucket_sizes, why_not
from musicgen.engine.runner import ModelRunner
from musicgen.engine.step_inputs import is_decode
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
        assert decode is not None
        run = decode.run

        def watched(batch: ScheduledBatch, *, has_new_pages: bool) -> np.ndarray:
            assert is_decode(batch)
            codes = run(batch, has_new_pages=has_new_pages)
            assert decode._rows is not None
            self.num_rows.append(len(batch.chunks))
            self.num_spare.append(decode._rows[1].num_rows - len(batch.chunks))
            return codes

        decode.run = watched  # type: ignore[method-assign]


@pytest.mark.parametrize(("max_rows", "sizes"), [(1, [1]), (3, [1, 2, 3]), (20, [1, 2, 4, 8, 16, 20])])
def test_the_sizes_that_get_a_graph(max_rows: int, sizes: list[int]) -> None:
    assert bucket_sizes(max_rows) == sizes
    assert bucket_sizes(64) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]


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


def test_pages_found_between_two_graphs_are_not_forgotten(models: dict[str, Model]) -> None:
    """Steps that mix prefill and decode come between steps of the same rows. Not shown: that a page which comes in a
    step of the other kind needs the buffers to be placed anew; codes were right without that too."""
    first = new_request(models["melody"], "rock", 30, SamplingParams(seed=1))
    others = [new_request(models["melody"], "jazz", 30, SamplingParams(seed=i)) for i in range(2, 6)]
    (expected,) = each_alone(new_core(models["melody"], graphs=False), [first])
    for start in range(1, 20, 3):
        core = new_core(models["melody"], prefill_tokens=5)
        crowd = Crowd(core, seed=5)
        core.add(EngineRequest("0", first))
        for i in range(240):
            if i >= start and i % 7 == 0 and others and len(core._sequences) < 2:
                core.add(EngineRequest(f"other{i}", others[i % len(others)]))
            if i % 7 == 3:
                for name in [name for name in core._sequences if name != "0"]:
                    core.abort(name)
            crowd.listener.take(core.step())
            if "0" in crowd.listener.ends:
                break
        assert torch.equal(crowd.listener.codes("0"), expected)


def test_whoever_comes_or_goes_is_placed_anew(models: dict[str, Model]) -> None:
    """A row that is gone may have left its address in memory, by which rows are told apart, to one that comes."""
    request = new_request(models["text"], "rock", 30, SamplingParams())
    core = new_core(models["text"])
    decode = core.runner._decode
    assert decode is not None
    core.add(EngineRequest("first", request))
    core.step()
    core.step()
    assert decode._rows is not None
    core.add(EngineRequest("second", request.with_seed(1)))
    core.runner.open(core.scheduler.running[0])
    assert decode._rows is None
    core.step()
    core.step()
    assert decode._rows is not None
    core.abort("second")
    assert decode._rows is None


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
    graphs = DecodeGraphs(20, SHAPE, CPU, compute, lambda: ())
    for num_rows in (3, 9, 4, 3):
        buffers = graphs.buffers(num_rows)
        buffers.host["codes"][:] = num_rows
        graphs.run(buffers)
        assert (buffers.step.codes == num_rows).all()
    assert seen[0] == seen[2] == seen[3] != seen[1]
    assert all(address % ALIGNMENT == 0 for address in seen[1])
    assert len(set(seen[1])) == len(seen[1])


def test_what_comes_out_is_a_copy() -> None:
    graphs = DecodeGraphs(2, SHAPE, CPU, lambda buffers: buffers.out.add_(1), lambda: ())  # type: ignore[arg-type,return-value]
    buffers = graphs.buffers(2)
    first = graphs.run(buffers)
    graphs.run(buffers)
    assert (first == 1).all()


def test_memory_that_moved_drops_the_graphs(models: dict[str, Model]) -> None:
    moved: list[object] = [torch.ones(1), None]
    graphs = DecodeGraphs(8, SHAPE, CPU, lambda buffers: None, lambda: tuple(moved))
    before = graphs.buffers(3)
    assert graphs.buffers(4) is before
    moved[1] = torch.ones(1)
    assert graphs.buffers(4) is not before

    core = new_core(models["text"])  # a longer piece and longer texts than there was room for
    buffers = core.runner._decode._graphs.buffers(2)  # type: ignore[union-attr]
    codes, store = core.runner._decode_memory()
    long = new_request(models["text"], " ".join(["jazz"] * 300), 1700, SamplingParams(top_k=1), max_frames=1500)
    for name in "abcd":
        core.add(EngineRequest(name, long))
    core.step()
    assert core.runner._decode_memory()[1] is not store
    for name in "abcd":
        core.abort(name)
    core.add(EngineRequest("long", replace(long, known_codes=torch.zeros(4, 1600, dtype=torch.int32))))
    core.step()
    assert core.runner._decode_memory()[0] is not codes
    assert core.runner._decode._graphs.buffers(2) is not buffers  # type: ignore[union-attr]


def test_nobody_is_there_until_told() -> None:
    """Warm-up and capture run on these."""
    buffers = DecodeBuffers(3, SHAPE, CPU)
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
    graphs = DecodeGraphs(8, SHAPE, CPU, runs.append, lambda: ())
    graphs._captures = True
    monkeypatch.setattr(torch.cuda, "Stream", mock.Mock(side_effect=RuntimeError("no such thing")))
    for num_rows in (2, 8):
        buffers = graphs.buffers(num_rows)
        graphs.run(buffers)
        assert runs[-1] is buffers
    assert len([record for record in caplog.records if record.exc_info]) == 1


def test_the_reference_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not(CPU) is None
    assert why_not(torch.device("cuda")) is None
    monkeypatch.setenv(ENVIRONMENT, "linear=reference")
    assert "linear on the reference" in str(why_not(torch.device("cuda")))
    assert EngineConfig().resolved("cuda").cuda_graphs is True
    assert EngineConfig().resolved("cpu").cuda_graphs is False
    assert EngineConfig(cuda_graphs=False).resolved("cuda").cuda_graphs is False


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: nothing is captured here")
@pytest.mark.parametrize(("weights", "kv"), [("bfloat16", "float16"), ("int4", "int8")])
@pytest.mark.parametrize("kind", ["text", "melody"])
def test_captured_on_a_gpu(kind: str, weights: WeightDtype, kv: KVDtype, folders: dict[str, Path]) -> None:
    """The codes of an engine without graphs, alone and in a crowd; every size is captured before the first step."""
    model = load_model(str(folders[kind]), "cuda")
    requests = mixed_requests(model)
    expected = each_alone(new_core(model, graphs=False, weights=weights, kv=kv), requests)
    core = new_core(model, weights=weights, kv=kv)
    assert core.runner._decode is not None
    assert core.runner._decode._graphs._captures
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
    buffers = DecodeBuffers(4, runner._decode._graphs._shape, CPU)  # type: ignore[union-attr]
    with FakeTensorMode(), torch.inference_mode():

        def fake(tensor: Tensor) -> Tensor:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

        def stored(store: KVStore) -> KVStore:
            return replace(_everywhere(store, fake), layout="plain")

        packed = _everywhere(runner.weights, fake)
        texts = None if runner.text_pages is None else SimpleNamespace(store=stored(runner.text_pages.store))
        stand_in = SimpleNamespace(
            device=torch.device("cuda"),
            pages=stored(runner.pages),
            text_pages=texts,
            _step=StepByOperations(_in_rows(packed)),
            _num_threads=1,
            _delays=fake(runner._delays),
            _codes=fake(runner._codes),
        )
        moved = SimpleNamespace(
            step=_everywhere(buffers.step, fake), sampling=_everywhere(buffers.sampling, fake), out=fake(buffers.out)
        )
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
