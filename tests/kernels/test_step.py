"""The whole step in one call: equal to its operations, and to itself however its positions are cut and placed."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import ints, normalised_mse, poison
from musicgen_kernels import (
    KernelArgumentError,
    KVStore,
    layer_norm,
    linear,
    new_kv_store,
    pack_linear,
    sinusoid_table,
)
from musicgen_kernels.cpu_step import CpuStep
from musicgen_kernels.errors import BackendUnavailableError
from musicgen_kernels.packing import Kind, PackedLinear
from musicgen_kernels.step import (
    BlockWeights,
    CrossWeights,
    DecoderWeights,
    Norm,
    StepBatch,
    activation_dtype,
    step_by_operations,
    write_cross_by_operations,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LAYERS, DIM, HEADS, CODEBOOKS, CODES = 2, 128, 2, 4, 48
NUM_PAGES, NUM_CROSS_PAGES = 60, 6
LENS = [25, 1, 300, 7]
CROSS_LENS = [5, 20, 0, 16]
CROSS_TABLE = torch.tensor([[3, 0], [4, 1], [0, 0], [2, 0]], dtype=torch.int32)
KV_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


def make_weights(kind: Kind, *, cross: bool = True, dtype: torch.dtype = torch.float32) -> DecoderWeights:
    def matrix(n: int, k: int) -> PackedLinear:
        return pack_linear(torch.randn(n, k) / k**0.5, kind)

    def norm() -> Norm:
        return Norm(torch.rand(DIM) + 0.5, torch.randn(DIM) * 0.1)

    def block() -> BlockWeights:
        across = CrossWeights(norm(), matrix(DIM, DIM), matrix(2 * DIM, DIM), matrix(DIM, DIM)) if cross else None
        first = (matrix(3 * DIM, DIM), matrix(DIM, DIM))
        return BlockWeights(norm(), *first, across, norm(), matrix(4 * DIM, DIM), matrix(DIM, 4 * DIM))

    return DecoderWeights(
        torch.randn(CODEBOOKS, CODES + 1, DIM).to(dtype),
        sinusoid_table(320, DIM),
        tuple(block() for _ in range(LAYERS)),
        norm(),
        matrix(CODEBOOKS * CODES, DIM),
        HEADS,
    )


def stores(dtype: torch.dtype) -> tuple[KVStore, KVStore]:
    both = tuple(new_kv_store(LAYERS, pages, HEADS, 64, dtype) for pages in (NUM_PAGES, NUM_CROSS_PAGES))
    for store in both:
        poison(store)
    return both[0], both[1]


def make_batch(*, prefix: bool = True, seed: int = 0) -> StepBatch:
    """All positions of four rows at once; the first six of row 0 and three of row 2 are a prefix."""
    total = sum(LENS)
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randperm(NUM_PAGES, generator=generator)[: 4 * 20].to(torch.int32)
    table = torch.zeros(4, 20, dtype=torch.int32)
    used = 0
    for row, length in enumerate(LENS):
        count = (length + 15) // 16
        table[row, :count] = pages[used : used + count]
        used += count
    index = torch.full((total,), -1, dtype=torch.int32)
    index[:6], index[26:29] = ints(4, 0, 1, 3, 2, 5), ints(1, 2, 3)
    return StepBatch(
        codes=torch.randint(0, CODES + 1, (total, CODEBOOKS), dtype=torch.int32),
        query_offsets=ints(0, *torch.tensor(LENS).cumsum(0).tolist()),
        kv_lens=ints(*LENS),
        page_table=table,
        logit_tokens=torch.arange(total, dtype=torch.int32),
        prefix=torch.randn(6, DIM) if prefix else None,
        prefix_index=index if prefix else None,
        cross_page_table=CROSS_TABLE,
        cross_lens=ints(*CROSS_LENS),
    )


def part(batch: StepBatch, spans: list[tuple[int, int, int]]) -> StepBatch:
    """The step that runs positions start … end−1 of each (row, start, end), in that order."""
    tokens = torch.cat([torch.arange(s, e) + int(batch.query_offsets[row]) for row, s, e in spans])
    rows = [row for row, _, _ in spans]
    assert batch.prefix_index is not None
    assert batch.cross_lens is not None
    return replace(
        batch,
        codes=batch.codes[tokens].contiguous(),
        prefix_index=batch.prefix_index[tokens].contiguous(),
        query_offsets=ints(0, *torch.tensor([e - s for _, s, e in spans]).cumsum(0).tolist()),
        kv_lens=ints(*(e for _, _, e in spans)),
        page_table=batch.page_table[rows].contiguous(),
        cross_page_table=CROSS_TABLE[rows].contiguous(),
        cross_lens=batch.cross_lens[rows].contiguous(),
        logit_tokens=torch.arange(len(tokens), dtype=torch.int32),
    )


def texts() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    offsets = ints(0, *torch.tensor(CROSS_LENS).cumsum(0).tolist())
    return torch.randn(sum(CROSS_LENS), DIM), CROSS_TABLE, offsets, ints(*CROSS_LENS)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_equals_its_operations(cpu: str, kind: Kind, dtype: torch.dtype) -> None:
    weights, batch, text = make_weights(kind), make_batch(), texts()
    one, by_operations = stores(dtype), stores(dtype)
    step = CpuStep(weights, backend=cpu)
    step.write_cross(*text, one[1])
    write_cross_by_operations(weights, *text, by_operations[1], backend=cpu)
    got = step.run(batch, *one)
    assert torch.equal(got, step_by_operations(weights, batch, *by_operations, backend=cpu))
    for ours, theirs in zip(one, by_operations, strict=True):
        assert torch.equal(ours.k.view(torch.uint8), theirs.k.view(torch.uint8))
        assert torch.equal(ours.v.view(torch.uint8), theirs.v.view(torch.uint8))
    oracle = stores(dtype)
    write_cross_by_operations(weights, *text, oracle[1], backend="reference")
    exact = step_by_operations(weights, batch, *oracle, backend="reference")
    bound = 3e-4 if kind in ("int8", "int4") else 1e-6 if dtype == torch.int8 else 1e-9
    assert normalised_mse(got, exact) < bound


@pytest.mark.parametrize("kind", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_any_cut_into_steps_gives_the_same_bits(cpu: str, kind: Kind, dtype: torch.dtype) -> None:
    """Whole prefill; one position at a time, row after row; rows and chunks of all sizes mixed."""
    weights, batch, text = make_weights(kind), make_batch(), texts()
    step = CpuStep(weights, backend=cpu)
    pages, cross = stores(dtype)
    step.write_cross(*text, cross)
    whole = step.run(batch, pages, cross).split(LENS)

    pages = stores(dtype)[0]
    for row in (3, 0, 1):
        got = torch.cat([step.run(part(batch, [(row, t, t + 1)]), pages, cross) for t in range(LENS[row])])
        assert torch.equal(got, whole[row])

    pages = stores(dtype)[0]
    steps = [[(2, 0, 256), (0, 0, 3)], [(0, 3, 25), (2, 256, 257), (3, 0, 6)], [(1, 0, 1), (3, 6, 7), (2, 257, 300)]]
    for spans in steps:
        logits = step.run(part(batch, spans), pages, cross)
        for (row, start, end), got in zip(spans, logits.split([e - s for _, s, e in spans]), strict=True):
            assert torch.equal(got, whole[row][start:end])


def test_pages_threads_and_neighbours_do_not_matter(cpu: str) -> None:
    weights, batch, text = make_weights("int8"), make_batch(), texts()
    step = CpuStep(weights, backend=cpu)
    pages, cross = stores(torch.float16)
    step.write_cross(*text, cross)
    whole = step.run(batch, pages, cross, num_threads=1)
    elsewhere = replace(batch, page_table=make_batch(seed=3).page_table)
    for threads in (2, 3):
        assert torch.equal(step.run(elsewhere, stores(torch.float16)[0], cross, num_threads=threads), whole)
    alone = step.run(part(batch, [(2, 0, LENS[2])]), stores(torch.float16)[0], cross)
    assert torch.equal(alone, whole[26 : 26 + LENS[2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_cross_attention_and_prefix(cpu: str, dtype: torch.dtype) -> None:
    weights = make_weights("bf16", cross=False, dtype=dtype)
    batch = replace(make_batch(prefix=False), cross_page_table=None, cross_lens=None, logit_tokens=ints(332, 0, 25))
    got = CpuStep(weights, backend=cpu).run(batch, stores(torch.float32)[0])
    assert torch.equal(got, step_by_operations(weights, batch, stores(torch.float32)[0], backend=cpu))
    assert got.shape == (3, CODEBOOKS, CODES)


def test_a_step_that_wants_no_logits_writes_its_pages(backend: str) -> None:
    """As a chunk of a prefill does that is not the last."""
    weights, text = make_weights("fp32"), texts()
    batch = make_batch()
    none = replace(batch, logit_tokens=batch.logit_tokens[:0])
    asked, unasked = stores(torch.float32), stores(torch.float32)
    for _, cross in (asked, unasked):
        write_cross_by_operations(weights, *text, cross, backend=backend)
    step_by_operations(weights, batch, *asked, backend=backend)
    got = step_by_operations(weights, none, *unasked, backend=backend)
    assert got.shape == (0, CODEBOOKS, CODES)
    assert torch.equal(unasked[0].k.nan_to_num(7.0), asked[0].k.nan_to_num(7.0))
    if backend != "reference":
        pages, cross = stores(torch.float32)
        step = CpuStep(weights, backend=backend)
        step.write_cross(*text, cross)
        assert step.run(none, pages, cross).shape == (0, CODEBOOKS, CODES)
        assert torch.equal(pages.k.nan_to_num(7.0), asked[0].k.nan_to_num(7.0))


def test_steps_from_several_threads_wait_for_each_other(cpu: str) -> None:
    weights, text = make_weights("fp32"), texts()
    step = CpuStep(weights, backend=cpu)
    batch = make_batch()
    cross = stores(torch.float32)[1]
    step.write_cross(*text, cross)
    expected = step.run(batch, stores(torch.float32)[0], cross)
    results: list[Tensor] = []

    def work() -> None:
        results.append(step.run(batch, stores(torch.float32)[0], cross, num_threads=2))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert all(torch.equal(result, expected) for result in results)


def test_a_prepared_step_reads_what_its_tensors_hold_and_keeps_them(cpu: str) -> None:
    weights, batch, text = make_weights("int8"), make_batch(), texts()
    step = CpuStep(weights, backend=cpu)
    pages, cross = stores(torch.float16)
    step.write_cross(*text, cross)
    step.run(part(batch, [(row, 0, n - 1) for row, n in enumerate(LENS) if n > 1]), pages, cross)
    expected = step.run(last := part(batch, [(row, n - 1, n) for row, n in enumerate(LENS)]), pages, cross)
    out = torch.empty_like(expected)
    call = step.prepare(held := replace(last, codes=torch.zeros_like(last.codes)), pages, cross, out=out)
    call()
    assert not torch.equal(out, expected)
    held.codes.copy_(last.codes)
    alive = [weakref.ref(tensor) for tensor in (held.codes, held.page_table, pages.k, cross.v)]
    del held, last, pages, cross
    gc.collect()
    assert all(tensor() is not None for tensor in alive)
    call()
    assert torch.equal(out, expected)


def test_a_step_is_refused_when_it_is_prepared_but_for_values_at_each_call(cpu: str) -> None:
    step, batch, (pages, cross) = CpuStep(make_weights("int8"), backend=cpu), make_batch(), stores(torch.float32)
    out = torch.empty(sum(LENS), CODEBOOKS, CODES)
    for bad in (out[1:], out.double(), out.transpose(1, 2)):
        with pytest.raises(KernelArgumentError, match="out"):
            step.prepare(batch, pages, cross, out=bad)
    with pytest.raises(KernelArgumentError, match="codes"):
        step.prepare(replace(batch, codes=batch.codes.long()), pages, cross, out=out)
    call = step.prepare(batch, pages, cross, out=out)
    batch.page_table[2, 18] = NUM_PAGES
    for _ in range(2):
        with pytest.raises(KernelArgumentError, match="page_table"):
            call()


def test_bad_steps_are_refused_before_anything_is_written(cpu: str) -> None:
    weights, batch = make_weights("int4"), make_batch()
    step = CpuStep(weights, backend=cpu)
    pages, cross = (new_kv_store(LAYERS, n, HEADS, 64, torch.float32) for n in (NUM_PAGES, NUM_CROSS_PAGES))
    table = batch.page_table.clone()
    table[2, 18] = NUM_PAGES
    index = torch.where(ints(*range(sum(LENS))) == 30, 6, -1).to(torch.int32)
    for change, argument in (
        ({"page_table": table}, "page_table"),
        ({"kv_lens": ints(25, 1, 321, 7)}, "kv_lens"),
        ({"kv_lens": ints(24, 1, 300, 7)}, "kv_lens"),
        ({"codes": batch.codes + CODES + 1}, "codes"),
        ({"prefix_index": index}, "prefix_index"),
        ({"prefix_index": None}, "prefix"),
        ({"logit_tokens": ints(sum(LENS))}, "logit_tokens"),
        ({"cross_lens": None}, "cross"),
        ({"cross_lens": ints(5, 33, 0, 16)}, "kv_lens"),
        ({"query_offsets": ints(0, 25, 26, 326, 332)}, "query_offsets"),
        ({"codes": batch.codes.long()}, "codes"),
    ):
        with pytest.raises(KernelArgumentError, match=argument):
            step.run(replace(batch, **change), pages, cross)
    with pytest.raises(KernelArgumentError, match="pages"):
        step.run(batch, new_kv_store(LAYERS, 60, 4, 32, torch.float32), cross)
    with pytest.raises(KernelArgumentError, match="layout"):
        step.run(batch, new_kv_store(LAYERS, 60, HEADS, 64, torch.float32, layout="plain"), cross)
    assert (pages.k == 0).all()


def test_bad_weights_are_refused(cpu: str) -> None:
    weights = make_weights("int8")
    block = weights.blocks[0]
    for change, argument in (
        ({"heads": block.fc1}, "heads"),
        ({"num_heads": 3}, "num_heads"),
        ({"blocks": ()}, "blocks|at least"),
        ({"blocks": (block, replace(block, cross=None))}, "cross"),
        ({"blocks": (replace(block, fc2=block.fc1),)}, "fc2"),
        ({"blocks": (replace(block, qkv=pack_linear(torch.randn(3 * DIM, DIM), "int8", order="rows")),)}, "order"),
        ({"final_norm": Norm(torch.ones(DIM), torch.ones(DIM + 1))}, "final_norm"),
        ({"sinusoids": torch.ones(5, DIM - 2)}, "sinusoids"),
    ):
        with pytest.raises(KernelArgumentError, match=argument):
            CpuStep(replace(weights, **change), backend=cpu)
    with pytest.raises(BackendUnavailableError):
        CpuStep(weights, backend="cuda")


@pytest.mark.parametrize("kind", ["bf16", "int4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
@pytest.mark.parametrize("activations", [torch.bfloat16, torch.float16])
def test_products_in_16_bits(kind: Kind, dtype: torch.dtype, activations: torch.dtype) -> None:
    """As on a GPU: close to the step in float32, logits and residual stream in float32, whatever the pages hold."""
    weights, batch, text = make_weights(kind), make_batch(), texts()
    narrow, wide = stores(dtype), stores(dtype)
    for _, cross in (narrow, wide):
        write_cross_by_operations(weights, *text, cross, backend="reference")
    got = step_by_operations(weights, batch, *narrow, activations=activations, backend="reference")
    exact = step_by_operations(weights, batch, *wide, backend="reference")
    assert got.dtype == torch.float32
    error = normalised_mse(got, exact)
    assert 0 < error < (2e-4 if activations == torch.bfloat16 else 1e-5)


def test_in_what_products_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, dtype, expected in (
        ("bf16", torch.float16, torch.bfloat16),
        ("int8", torch.float16, torch.float16),
        ("int4", torch.bfloat16, torch.bfloat16),
        ("int4", torch.int8, torch.bfloat16),
        ("int8", torch.float32, torch.bfloat16),
        ("fp32", torch.float16, torch.float32),
    ):
        weights, pages = make_weights(kind), stores(dtype)[0]  # type: ignore[arg-type]
        assert activation_dtype(weights, pages) == torch.float32  # on the CPU
        on_gpu = replace(weights, embeddings=weights.embeddings.to("meta"))
        assert activation_dtype(on_gpu, pages) == expected


@pytest.mark.parametrize("out_dtype", [torch.float64, torch.int8])
def test_a_result_that_is_no_float_is_refused(out_dtype: torch.dtype) -> None:
    x, packed = torch.ones(1, 32), pack_linear(torch.ones(16, 32), "fp32")
    with pytest.raises(KernelArgumentError, match="out_dtype"):
        linear(x, packed, out_dtype=out_dtype)
    with pytest.raises(KernelArgumentError, match="out_dtype"):
        layer_norm(x, torch.ones(32), torch.ones(32), out_dtype=out_dtype)


def test_the_cpu_gives_float32_only(cpu: str) -> None:
    x, packed = torch.ones(1, 32), pack_linear(torch.ones(16, 32), "fp32")
    with pytest.raises(KernelArgumentError, match="out"):
        linear(x, packed, out_dtype=torch.bfloat16, backend=cpu)
    with pytest.raises(KernelArgumentError, match="out"):
        layer_norm(x, torch.ones(32), torch.ones(32), out_dtype=torch.bfloat16, backend=cpu)


class _NoWaiting(TorchDispatchMode):
    """Refuses whatever makes the host wait for a GPU, or hands it what lies there."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "masked_scatter", "is_nonzero", "equal", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().partition("::")[2].partition(".")[0].rstrip("_")
        assert name.lstrip("_") not in {refused.lstrip("_") for refused in self.REFUSED}, func
        if name == "repeat_interleave":
            assert kwargs.get("output_size") is not None, "the length has to be counted"
        if name in ("index", "index_put"):
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            assert not masks, "the mask has to be counted"
        return func(*args, **kwargs)


@pytest.mark.parametrize("prefix", [False, True])
def test_nothing_in_a_step_waits_for_a_gpu(cpu: str, prefix: bool) -> None:
    """With compiled operations in place of a GPU's: what lies between them asks no tensor for its contents."""
    weights, batch = make_weights("fp32"), make_batch(prefix=prefix)
    pages, cross = stores(torch.float32)
    write_cross_by_operations(weights, *texts(), cross, backend=cpu)
    expected = step_by_operations(weights, batch, pages, cross, backend=cpu)
    with _NoWaiting():
        got = step_by_operations(weights, batch, pages, cross, backend=cpu)
    assert torch.equal(got, expected)
    with pytest.raises(AssertionError), _NoWaiting():
        torch.ones(2).sum().item()
