"""The sampling step: Philox, draws, filters, guidance, the delay pattern; a draw depends on its own key only."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from kernel_cases import ints, sample_batch
from musicgen_kernels import (
    UNKNOWN_CODE,
    KernelArgumentError,
    SampleBatch,
    delayed_sample_step,
    isa,
    prepare_sample_step,
    reference,
)
from torch import Tensor

NO_DELAY = torch.zeros(8, dtype=torch.int32)


def sequences(num_requests: int, num_codebooks: int, num_steps: int = 32) -> Tensor:
    return torch.full((num_requests, num_codebooks, num_steps), UNKNOWN_CODE, dtype=torch.int32)


def sample(logits: Tensor, batch: SampleBatch, backend: str, delays: Tensor | None = None) -> Tensor:
    codebooks = logits.shape[1]
    chosen = NO_DELAY[:codebooks] if delays is None else delays
    return delayed_sample_step(logits, batch, chosen, sequences(len(batch.slots), codebooks), backend=backend)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], words: str) -> None:
    got = reference.philox4x32(torch.tensor(counter), torch.tensor(key)).tolist()
    assert " ".join(f"{word:08x}" for word in got) == words


@pytest.mark.parametrize(("seed", "step", "codebook"), [(0, 0, 0), (1, 7, 3), (-1, 1503, 7), (2**62 + 5, 12, 1)])
def test_uniforms_are_equal_bits_in_every_backend(cpu: str, seed: int, step: int, codebook: int) -> None:
    expected = reference.uniforms(seed, step, codebook, 2047)
    got = torch.empty(2047)
    _, native = isa.load_level(cpu.partition(":")[2])
    native.sample_uniforms(seed, step, codebook, 2047, got.data_ptr())
    assert torch.equal(got, expected)
    assert got.min() > 0
    assert got.max() < 1


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        *((1.0, 250, 0.0), (1.0, 0, 0.0), (0.7, 1, 0.0), (1.3, 5000, 0.0), (1.0, 0, 0.9), (1.0, 250, 0.3)),
        *((0.0, 250, 0.0), (1e-6, 0, 0.0), (1.0, 0, 1e-9), (1.0, 0, 1.0), (1.0, 2048, 0.0), (2.0, 2047, 0.0)),
    ],
)
def test_codes_equal_the_reference(cpu: str, rows: int, temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(3 * rows, 4, 2048) * 4
    batch = sample_batch(3, rows, temperature=temperature, top_k=top_k, top_p=top_p)
    assert torch.equal(sample(logits, batch, cpu), sample(logits, batch, "reference"))


@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_ties_at_the_kth_value_are_kept(backend: str, top_k: int) -> None:
    logits = torch.full((400, 1, 40), -5.0)
    logits[:, 0, [3, 17, 30]] = 2.0
    logits[:, 0, 8] = 1.0
    drawn = sample(logits, sample_batch(400, top_k=top_k), backend)
    assert set(drawn.flatten().tolist()) == ({3, 17, 30} if top_k < 4 else {3, 8, 17, 30})


def test_equal_logits_reach_every_code(backend: str) -> None:
    drawn = sample(torch.zeros(250, 2, 24), sample_batch(250, top_k=5), backend)
    assert set(drawn.flatten().tolist()) == set(range(24))


def test_greedy_takes_the_lowest_of_equal_logits(backend: str) -> None:
    logits = torch.zeros(2, 4, 100)
    logits[:, 1, [7, 50]] = 3.0
    assert sample(logits, sample_batch(2, temperature=0.0), backend)[0].tolist() == [0, 7, 0, 0]


def test_low_temperature_and_large_logits(backend: str) -> None:
    logits = torch.where(torch.rand(4, 4, 2048) < 0.5, 80.0, -80.0)
    logits[:, :, 5] = 81.0
    assert (sample(logits, sample_batch(4, temperature=1e-3), backend) == 5).all()
    wide = sample(logits, sample_batch(4, temperature=1.0), backend)
    assert (torch.gather(logits, 2, wide.long()[..., None]) >= 80).all()


def test_top_p_limits(backend: str) -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(200, 1, 4).contiguous()
    for top_p, support in ((1e-7, {0}), (0.39, {0}), (0.41, {0, 1}), (0.71, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        drawn = sample(logits, sample_batch(200, top_p=top_p, top_k=1), backend)
        assert set(drawn.flatten().tolist()) == support


def test_top_p_keeps_equal_codes_in_order_of_index(backend: str) -> None:
    drawn = sample(torch.zeros(200, 1, 16), sample_batch(200, top_p=0.25), backend)
    assert set(drawn.flatten().tolist()) == {0, 1, 2, 3, 4}


def _chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities.double() * counts.sum()
    return ((counts - expected).square() / expected).sum().item()


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (10, 0.0), (0, 0.8)])
def test_distribution_of_a_million_draws(cpu: str, top_k: int, top_p: float) -> None:
    num_codes, requests, steps = 40, 512, 256
    one = torch.randn(num_codes) * 1.5
    logits = one.expand(requests, 8, num_codes).contiguous()
    counts = torch.zeros(num_codes, dtype=torch.int64)
    for step in range(steps):
        batch = sample_batch(requests, step=step + 1, num_frames=10**6, top_k=top_k, top_p=top_p)
        drawn = torch.empty(requests, 8, dtype=torch.int32)
        held = torch.full((requests, 8, steps + 1), UNKNOWN_CODE, dtype=torch.int32)
        delayed_sample_step(logits, batch, NO_DELAY, held, out=drawn, backend=cpu)
        counts += drawn.flatten().bincount(minlength=num_codes)
    assert counts.sum() == requests * steps * 8 >= 10**6
    keep = reference.sampling.keep_mask(one - one.max(), top_k, top_p)
    assert counts[~keep].sum() == 0
    freedom = int(keep.sum()) - 1
    assert _chi_square(counts[keep], one[keep].softmax(0)) < freedom + 4 * (2 * freedom) ** 0.5


def test_codebooks_are_drawn_independently(cpu: str) -> None:
    requests, num_codes = 4096, 6
    counts = torch.zeros(num_codes * num_codes, dtype=torch.int64)
    for step in range(1, 17):
        batch = sample_batch(requests, step=step, num_frames=100)
        pair = sample(torch.zeros(requests, 2, num_codes), batch, cpu).long()
        counts += (pair[:, 0] * num_codes + pair[:, 1]).bincount(minlength=num_codes**2)
    uniform = torch.full((num_codes**2,), 1 / num_codes**2)
    assert _chi_square(counts, uniform) < 35 + 4 * 70**0.5


def _subset(batch: SampleBatch, which: Tensor, rows: int) -> SampleBatch:
    fields = {name: getattr(batch, name)[which] for name in batch.__slots__ if name != "row_offsets"}
    return SampleBatch(row_offsets=torch.arange(len(which) + 1, dtype=torch.int32) * rows, **fields)


def test_a_request_draws_the_same_alone_and_in_any_batch_and_slot(cpu: str) -> None:
    logits = torch.randn(32, 4, 2048)
    batch = sample_batch(16, 2, top_k=250)
    together = sample(logits, batch, cpu)
    order = torch.randperm(16)
    shuffled = replace(_subset(batch, order, 2), slots=torch.randperm(16).to(torch.int32))
    assert torch.equal(sample(logits.view(16, 2, 4, 2048)[order].flatten(0, 1), shuffled, cpu), together[order])
    for r in (0, 7, 15):
        alone = replace(_subset(batch, torch.tensor([r]), 2), slots=ints(0))
        assert torch.equal(sample(logits[2 * r : 2 * r + 2], alone, cpu)[0], together[r])


def test_parameters_are_per_request(backend: str) -> None:
    logits = torch.randn(6, 4, 64)
    batch = replace(
        sample_batch(3),
        row_offsets=ints(0, 1, 3, 6),
        guidance=torch.tensor([9.0, 1.5, 3.0]),
        guidance_beta=torch.tensor([9.0, 9.0, 0.5]),
        temperature=torch.zeros(3),
    )
    got = sample(logits, batch, backend)
    two = logits[2] + 1.5 * (logits[1] - logits[2])
    three = logits[5] + 3.0 * (logits[4] + 0.5 * (logits[3] - logits[4]) - logits[5])
    expected = torch.stack([logits[0], two, three]).argmax(-1)
    assert torch.equal(got.long(), expected)


@pytest.mark.parametrize("delays", [[0, 1, 2, 3], [0, 0, 1, 1, 2, 2, 3, 3]])
def test_delay_pattern_prompt_and_write_back(backend: str, delays: list[int]) -> None:
    """A whole request step by step: special tokens outside its frames, prompt codes fed, the rest sampled."""
    codebooks, frames, prompt, num_codes = len(delays), 6, 2, 32
    num_steps = frames + max(delays) + 1
    held = torch.full((3, codebooks, num_steps + 2), UNKNOWN_CODE, dtype=torch.int32)
    for k, delay in enumerate(delays):
        for t in range(prompt):
            held[1, k, t + 1 + delay] = 20 + t
    for step in range(num_steps):
        logits = torch.full((1, codebooks, num_codes), -1.0)
        logits[:, :, step % num_codes] = 50.0
        batch = replace(sample_batch(1, step=step, num_frames=frames), slots=ints(1))
        codes = delayed_sample_step(logits, batch, ints(*delays), held, backend=backend)
        assert torch.equal(codes[0], held[1, :, step])
        for k, delay in enumerate(delays):
            t = step - 1 - delay
            expected = num_codes if not 0 <= t < frames else 20 + t if t < prompt else step % num_codes
            assert codes[0, k] == expected
    assert (held[[0, 2]] == UNKNOWN_CODE).all()
    assert (held[1, :, num_steps:] == UNKNOWN_CODE).all()


def test_a_prepared_step_reads_what_its_tensors_hold(backend: str) -> None:
    logits, batch, held = torch.randn(4, 4, 64), sample_batch(2, 2), sequences(2, 4)
    out = torch.empty(2, 4, dtype=torch.int32)
    call = prepare_sample_step(logits, batch, NO_DELAY[:4], held, out=out, backend=backend)
    for step in (10, 11):
        batch.steps.fill_(step)
        logits.normal_()
        assert call() is out
        assert torch.equal(out, delayed_sample_step(logits, batch, NO_DELAY[:4], sequences(2, 4), backend=backend))
        assert torch.equal(held[:, :, step], out)
    with pytest.raises(KernelArgumentError, match="out"):
        prepare_sample_step(logits, batch, NO_DELAY[:4], held, out=out[:1], backend=backend)
    alive = [weakref.ref(tensor) for tensor in (logits, batch.seeds, held)]
    del logits, batch, held
    gc.collect()
    assert all(tensor() is not None for tensor in alive)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"slots": ints(0, 9)}, "batch.slots"),
        ({"slots": ints(1, 1)}, "batch.slots"),
        ({"slots": ints(0, -1)}, "batch.slots"),
        ({"steps": ints(0, 32)}, "batch.steps"),
        ({"row_offsets": ints(0, 4, 5)}, "batch.row_offsets"),
        ({"row_offsets": ints(0, 1, 1)}, "batch.row_offsets"),
        ({"row_offsets": ints(0, 2, 5)}, "batch.row_offsets"),
        ({"row_offsets": ints(1, 2, 3)}, "batch.row_offsets"),
        ({"temperature": torch.tensor([1.0, -1.0])}, "batch.temperature"),
        ({"temperature": torch.tensor([1.0, torch.nan])}, "batch.temperature"),
        ({"top_p": torch.tensor([torch.inf, 0.0])}, "batch.top_p"),
        ({"top_k": ints(-1, 0)}, "batch.top_k"),
        ({"seeds": ints(1, 2)}, "batch.seeds"),
        ({"guidance": torch.zeros(3)}, "batch.guidance"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(cpu: str, change: dict[str, Tensor], argument: str) -> None:
    batch = replace(sample_batch(2, 2), **change)
    held = sequences(2, 4)
    with pytest.raises(KernelArgumentError, match=argument.replace(".", r"\.")):
        delayed_sample_step(torch.randn(4, 4, 64), batch, NO_DELAY[:4], held, backend=cpu)
    assert (held == UNKNOWN_CODE).all()


def test_bad_tensors_are_named(cpu: str) -> None:
    batch, held = sample_batch(2), sequences(2, 4)
    for logits in (
        torch.randn(2, 4),
        torch.randn(2, 9, 8),
        torch.randn(2, 8, 4).transpose(1, 2),
        torch.zeros(2, 4, 8).int(),
    ):
        with pytest.raises(KernelArgumentError, match=r"logits|delays"):
            delayed_sample_step(logits, batch, NO_DELAY[:4], held, backend=cpu)
    with pytest.raises(KernelArgumentError, match="sequences"):
        delayed_sample_step(torch.randn(2, 4, 8), batch, NO_DELAY[:4], held.long(), backend=cpu)
    known = held.clone()
    known[0, 2, 10] = 9
    with pytest.raises(KernelArgumentError, match="sequences"):
        delayed_sample_step(torch.randn(2, 4, 8), batch, NO_DELAY[:4], known, backend=cpu)
