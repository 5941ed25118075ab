"""Paged attention: the case matrix against float64, poisoned and guarded memory, and results that are the same bits."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    LENGTHS,
    ROW_COUNTS,
    PagedRows,
    assert_as_good_as_torch,
    guarded,
    ints,
    normalised_mse,
    paged_rows,
    poison,
)
from musicgen_kernels import (
    KernelArgumentError,
    PagedKV,
    append_paged_kv,
    cross_attention,
    new_kv_store,
    paged_attention,
)
from torch import Tensor
from torch.nn import functional

FLOAT_KV = [torch.float32, torch.bfloat16, torch.float16]
ALL_KV = [*FLOAT_KV, torch.int8]
HEADS = 2


def filled(lens: list[int], dtype: torch.dtype, backend: str, *, seed: int = 0, head_dim: int = 64) -> PagedRows:
    """Rows whose keys and values have been appended at once by the backend."""
    rows = paged_rows(lens, HEADS, dtype, seed=seed, head_dim=head_dim)
    keys, values = torch.randn(2, sum(lens), HEADS, head_dim).unbind(0)
    append_paged_kv(
        keys, values, rows.store.layer(0), rows.page_table, rows.offsets(lens), rows.kv_lens, backend=backend
    )
    return rows


def row_values(rows: PagedRows, row: int) -> tuple[Tensor, Tensor]:
    """What a row's pages stand for: keys and values [H, T, D] float32."""
    ids = rows.page_table[row, : (rows.lens[row] + 15) // 16].long()
    layer = rows.store.layer(0)
    keys, values = (x[ids].float().transpose(0, 1).flatten(1, 2) for x in (layer.keys(), layer.values()))
    return keys[:, : rows.lens[row]], values[:, : rows.lens[row]]


def decode(rows: PagedRows, query: Tensor, backend: str, which: list[int] | None = None) -> Tensor:
    """One query, the last position, of each chosen row."""
    chosen = list(range(len(rows.lens))) if which is None else which
    offsets = ints(*range(len(chosen) + 1))
    table, lens = rows.page_table[chosen].contiguous(), rows.kv_lens[chosen].contiguous()
    return paged_attention(query, rows.store.layer(0), table, offsets, lens, backend=backend)


@pytest.mark.parametrize("dtype", FLOAT_KV)
@pytest.mark.parametrize("num_rows", ROW_COUNTS)
def test_decode_matrix(backend: str, dtype: torch.dtype, num_rows: int) -> None:
    lens = [LENGTHS[(3 * num_rows + 5 * i) % len(LENGTHS)] for i in range(num_rows)]
    rows = filled(lens, dtype, backend)
    query = torch.randn(num_rows, HEADS, 64) * 3
    got = decode(rows, query, backend)
    for row in range(num_rows):
        keys, values = row_values(rows, row)
        q = query[row][:, None]
        exact = functional.scaled_dot_product_attention(q.double(), keys.double(), values.double())
        peer = functional.scaled_dot_product_attention(q.to(dtype), keys.to(dtype), values.to(dtype))
        assert_as_good_as_torch(got[row], exact[:, 0], peer[:, 0])


@pytest.mark.parametrize("length", LENGTHS)
def test_every_length_in_int8(backend: str, length: int) -> None:
    """Against float64 on the stored codes: the backend's own rounding of queries and weights stays below 1e-6."""
    rows = filled([length], torch.int8, backend)
    query = torch.randn(1, HEADS, 64) * 3
    keys, values = row_values(rows, 0)
    exact = functional.scaled_dot_product_attention(query[0][:, None].double(), keys.double(), values.double())
    assert normalised_mse(decode(rows, query, backend)[0], exact[:, 0]) < 1e-6


def test_int8_pages_stand_for_what_was_appended(backend: str) -> None:
    rows = paged_rows([100], HEADS, torch.int8)
    keys, values = torch.randn(2, 100, HEADS, 64).unbind(0)
    keys[7] = 0
    append_paged_kv(keys, values, rows.store.layer(0), rows.page_table, ints(0, 100), rows.kv_lens, backend=backend)
    for given, stored in zip((keys, values), row_values(rows, 0), strict=True):
        bound = given.abs().amax(-1) / 254 * 1.0001
        assert ((stored.transpose(0, 1) - given).abs() <= bound[..., None]).all()


@pytest.mark.parametrize("dtype", ALL_KV)
def test_append_writes_the_reference_bits(cpu: str, dtype: torch.dtype) -> None:
    lens, new = [5, 40, 16, 33], [5, 3, 0, 17]
    ours, theirs = (paged_rows(lens, HEADS, dtype) for _ in range(2))
    wide = torch.randn(2, sum(new), 3, HEADS, 64) * 40
    wide[0, 3] *= 1e5  # over the range of float16
    wide[0, 4] *= 1e-8  # subnormal there
    keys, values = wide[0, :, 1], wide[1, :, 1]  # not contiguous
    assert not keys.is_contiguous()
    for rows, name in ((ours, cpu), (theirs, "reference")):
        append_paged_kv(
            keys, values, rows.store.layer(0), rows.page_table, rows.offsets(new), rows.kv_lens, backend=name
        )
    for a, b in zip(
        (ours.store.k, ours.store.v, ours.store.k_scales),
        (theirs.store.k, theirs.store.v, theirs.store.k_scales),
        strict=True,
    ):
        if a is not None and b is not None:
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", ALL_KV)
def test_prefill_is_decode_bit_for_bit_in_any_chunks(cpu: str, dtype: torch.dtype) -> None:
    lens = [1, 17, 256, 290]
    rows = filled(lens, dtype, cpu)
    layer = rows.store.layer(0)
    query = torch.randn(sum(lens), HEADS, 64)
    whole = paged_attention(query, layer, rows.page_table, rows.offsets(lens), rows.kv_lens, backend=cpu)
    one_by_one = torch.empty_like(whole)
    chunked = torch.empty_like(whole)
    for row, length in enumerate(lens):
        first, table = sum(lens[:row]), rows.page_table[row : row + 1]
        for step in (1, 7):
            out = one_by_one if step == 1 else chunked
            for start in range(0, length, step):
                end = min(start + step, length)
                part = query[first + start : first + end]
                offsets = ints(0, end - start)
                out[first + start : first + end] = paged_attention(part, layer, table, offsets, ints(end), backend=cpu)
    assert torch.equal(whole, one_by_one)
    assert torch.equal(whole, chunked)


@pytest.mark.parametrize("dtype", ALL_KV)
def test_a_row_is_the_same_bits_in_any_batch_slot_and_page_order(cpu: str, dtype: torch.dtype) -> None:
    lens = [300, 16, 77, 1]
    torch.manual_seed(5)
    rows = filled(lens, dtype, cpu, seed=1)
    query = torch.randn(len(lens), HEADS, 64)
    together = decode(rows, query, cpu)
    order = [2, 0, 3, 1]
    assert torch.equal(decode(rows, query[order], cpu, order), together[order])
    for row in range(len(lens)):
        assert torch.equal(decode(rows, query[row : row + 1], cpu, [row])[0], together[row])
    torch.manual_seed(5)
    elsewhere = filled(lens, dtype, cpu, seed=2)
    assert not torch.equal(elsewhere.page_table, rows.page_table)
    assert torch.equal(decode(elsewhere, query, cpu), together)


def test_the_number_of_threads_changes_nothing(cpu: str) -> None:
    rows = filled([300, 40, 7], torch.float16, cpu)
    query = torch.randn(3, HEADS, 64)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(decode(rows, query, cpu))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", ALL_KV)
def test_rows_may_share_pages(cpu: str, dtype: torch.dtype) -> None:
    rows = filled([64, 80], dtype, cpu)
    alone = decode(rows, query := torch.randn(2, HEADS, 64), cpu)
    rows.page_table[0, :4] = rows.page_table[1, :4]
    shared = decode(rows, query, cpu)
    assert torch.equal(shared[1], alone[1])
    own = PagedRows(rows.store, rows.page_table, [64, 64])
    assert torch.equal(decode(own, query[[0, 0]], cpu)[1], shared[0])


@pytest.mark.parametrize("dtype", ALL_KV)
def test_cross_attention_and_empty_rows(backend: str, dtype: torch.dtype) -> None:
    lens = [5, 0, 40, 17]
    rows = filled(lens, dtype, backend)
    counts = [3, 2, 0, 1]
    query = torch.randn(sum(counts), HEADS, 64)
    layer = rows.store.layer(0)
    got = cross_attention(query, layer, rows.page_table, rows.offsets(counts), rows.kv_lens, backend=backend)
    assert (got[3:5] == 0).all()
    for row, tokens in ((0, range(3)), (3, range(5, 6))):
        keys, values = row_values(rows, row)
        for token in tokens:
            q = query[token][:, None].double()
            exact = functional.scaled_dot_product_attention(q, keys.double(), values.double())[:, 0]
            assert normalised_mse(got[token], exact) < (1e-6 if dtype == torch.int8 else 1e-12)


def test_large_scores_and_custom_scale(backend: str) -> None:
    rows = filled([257], torch.float32, backend)
    query = torch.randn(1, HEADS, 64) * 80
    keys, values = row_values(rows, 0)
    layer, offsets = rows.store.layer(0), ints(0, 1)
    got = paged_attention(query, layer, rows.page_table, offsets, rows.kv_lens, scale=1.0, backend=backend)
    exact, peer = (
        functional.scaled_dot_product_attention(query[0][:, None].to(kind), keys.to(kind), values.to(kind), scale=1.0)[
            :, 0
        ]
        for kind in (torch.float64, torch.float32)
    )
    assert torch.isfinite(got).all()
    assert_as_good_as_torch(got[0], exact, peer)


def test_head_dim_32_and_strided_queries(cpu: str) -> None:
    rows = filled([40], torch.float16, cpu, head_dim=32)
    wide = torch.randn(1, 3, HEADS, 32)
    query = wide[:, 1]
    got, compact = decode(rows, query, cpu), decode(rows, query.contiguous(), cpu)
    keys, values = row_values(rows, 0)
    exact = functional.scaled_dot_product_attention(query[0][:, None].double(), keys.double(), values.double())
    assert torch.equal(got, compact)
    assert normalised_mse(got[0], exact[:, 0]) < 1e-12


@pytest.mark.parametrize("dtype", ALL_KV)
def test_nothing_is_read_or_written_past_the_pages(cpu: str, dtype: torch.dtype) -> None:
    """Pages, scales, queries and metadata all end at memory that may not be touched."""
    store = new_kv_store(1, 3, HEADS, 64, dtype)
    poison(store)
    layer = store.layer(0)
    pages = PagedKV(
        guarded(layer.k),
        guarded(layer.v),
        None if layer.k_scales is None else guarded(layer.k_scales),
        None if layer.v_scales is None else guarded(layer.v_scales),
        "cpu",
    )
    table, offsets, lens = guarded(ints(0, 1, 2).view(1, 3)), guarded(ints(0, 37)), guarded(ints(37))
    keys, values, query = (guarded(torch.randn(37, HEADS, 64)) for _ in range(3))
    out = guarded(torch.empty(37, HEADS, 64))
    append_paged_kv(keys, values, pages, table, offsets, lens, backend=cpu)
    paged_attention(query, pages, table, offsets, lens, out=out, backend=cpu)
    assert torch.isfinite(out).all()


def test_offsets_beyond_4_gib(cpu: str) -> None:
    """A page whose bytes begin past 2³²: memory is only reserved, two pages of it are touched."""
    num_pages = 2**32 // (HEADS * 16 * 64 * 4) + 2
    try:
        k, v = (torch.empty(num_pages, HEADS, 16, 64) for _ in range(2))
    except RuntimeError as error:
        pytest.skip(f"not enough address space: {error}")
    pages = PagedKV(k, v, None, None, "cpu")
    keys, values, query = torch.randn(3, 1, HEADS, 64).unbind(0)
    offsets, lens, far = ints(0, 1), ints(1), ints(num_pages - 1).view(1, 1)
    append_paged_kv(keys, values, pages, far, offsets, lens, backend=cpu)
    assert torch.equal(k[num_pages - 1, 0].flatten()[::16], keys[0, 0])
    assert torch.allclose(paged_attention(query, pages, far, offsets, lens, backend=cpu), values)


@pytest.mark.parametrize(
    ("table", "offsets", "lens", "argument"),
    [
        ([[0, 9]], [0, 1], [17], "page_table"),
        ([[0, -1]], [0, 1], [17], "page_table"),
        ([[0, 1]], [0, 1], [33], "kv_lens"),
        ([[0, 1]], [0, 1], [0], "kv_lens"),
        ([[0, 1]], [1, 1], [4], "query_offsets"),
        ([[0, 1]], [0, 0], [4], "query_offsets"),
        ([[0, 1]], [0, 2], [4], "query_offsets"),
    ],
)
def test_bad_indices_are_named(
    cpu: str, table: list[list[int]], offsets: list[int], lens: list[int], argument: str
) -> None:
    pages = new_kv_store(1, 2, HEADS, 64, torch.float32).layer(0)
    query = torch.randn(1, HEADS, 64)
    rows = (torch.tensor(table, dtype=torch.int32), ints(*offsets), ints(*lens))
    with pytest.raises(KernelArgumentError, match=argument):
        paged_attention(query, pages, *rows, backend=cpu)
    with pytest.raises(KernelArgumentError, match=argument):
        append_paged_kv(query, query, pages, *rows, backend=cpu)
    assert (pages.k == 0).all()


def test_bad_tensors_are_named(cpu: str) -> None:
    pages = new_kv_store(1, 2, HEADS, 64, torch.float32).layer(0)
    good = (torch.randn(1, HEADS, 64), pages, ints(0, 1).view(1, 2), ints(0, 1), ints(1))
    plain = PagedKV(pages.k, pages.v, None, None, "plain")
    for position, bad, argument in (
        (0, torch.randn(1, HEADS, 32), "cache.k"),
        (0, torch.randn(1, HEADS, 64).half(), "query"),
        (0, torch.randn(1, HEADS, 64, 2)[..., 0], "query"),
        (1, plain, "layout"),
        (1, PagedKV(pages.k, pages.v[:1], None, None, "cpu"), "cache.v"),
        (1, PagedKV(pages.k.to(torch.int8), pages.v.to(torch.int8), None, None, "cpu"), "k_scales"),
        (2, ints(0, 1).view(1, 2).long(), "page_table"),
        (3, ints(0, 1, 1), "query_offsets"),
        (4, ints(1, 1), "kv_lens"),
    ):
        arguments = [*good]
        arguments[position] = bad
        with pytest.raises(KernelArgumentError, match=argument):
            paged_attention(*arguments, backend=cpu)
