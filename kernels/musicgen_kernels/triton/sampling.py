"""The sampling step: one program per (request, codebook), with the whole vocabulary in registers.

Algorithm. z ≤ 0 always, so the bits of |z| order the logits: a small key is a large z. The top-k threshold is
the smallest key that k codes do not exceed, found by bisection on the 31 bits of the key, exactly. For top-p
the softmax masses are integers (multiples of 2⁻⁴⁸, whose sum is exact in any order): bisection finds the
largest key such that the mass before it is within p; ties there are kept in order of their index. The draw is
the Gumbel maximum over what is kept.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from .runtime import VARYING, launch, power_of_2, require_no_float64

if TYPE_CHECKING:
    from ..sampling import SampleBatch

_INFINITY = tl.constexpr(0x7F800000)
_MASS = tl.constexpr(281474976710656.0)  # 2⁴⁸


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds of Philox4x32 (Salmon et al. 2011) on uint32 tensors; the key is two uint32 scalars."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def uniforms(seed, step, codebook, index):
    """The uniform of each code of `index` [V] int32: ((x >> 9) + ½)·2⁻²³."""
    zero = (index * 0).to(tl.uint32)
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    block, word = (index // 4).to(tl.uint32), index % 4
    w0, w1, w2, w3 = philox4x32(
        zero + step.to(tl.uint32), zero + codebook.to(tl.uint32), block, zero, zero + low, zero + high
    )
    x = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    return ((x >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def _mix(logits, first, num_rows, at, guidance, beta, inside):
    """The guided logits of one codebook: rows conditional, (melody only,) null."""
    null = tl.load(logits + (first + num_rows - 1) * at[1] + at[0], mask=inside, other=0.0)
    mixed = null
    if num_rows == 2:
        mixed = null + guidance * (tl.load(logits + first * at[1] + at[0], mask=inside, other=0.0) - null)
    if num_rows == 3:
        full = tl.load(logits + first * at[1] + at[0], mask=inside, other=0.0)
        melody = tl.load(logits + (first + 1) * at[1] + at[0], mask=inside, other=0.0)
        mixed = null + guidance * (melody + beta * (full - melody) - null)
    return mixed


@triton.jit
def _top_k_mask(key, inside, top_k):
    """Codes whose key is at most the k-th smallest."""
    low = top_k * 0
    high = low + _INFINITY
    while low < high:
        middle = low + (high - low) // 2
        if tl.sum(((key <= middle) & inside).to(tl.int32), axis=0) >= top_k:
            high = middle
        else:
            low = middle + 1
    return key <= low


@triton.jit
def _top_p_mask(z, key, inside, top_p):
    """Codes preceded by a mass of at most top_p, in order of z descending and index ascending."""
    mass = tl.where(inside, tl.exp(z) * _MASS + 0.5, 0.0).to(tl.int64)
    total = tl.sum(mass, axis=0).to(tl.float64)
    limit = top_p.to(tl.float64)
    low = (total * 0.0).to(tl.int32)
    high = low + _INFINITY
    while low < high:
        middle = low + (high - low + 1) // 2
        before = tl.sum(tl.where(key < middle, mass, 0), axis=0)
        if before.to(tl.float64) / total <= limit:
            low = middle
        else:
            high = middle - 1
    before = tl.sum(tl.where(key < low, mass, 0), axis=0)
    tied = tl.where(key == low, mass, 0)
    before_tie = before + tl.cumsum(tied, axis=0) - tied
    return (key < low) | ((key == low) & (before_tie.to(tl.float64) / total <= limit))


@triton.jit
def _first_argmax(x, index, V):
    """The lowest index of the largest value."""
    return tl.min(tl.where(x == tl.max(x, axis=0), index, V), axis=0)


@triton.jit
def _draw(mixed, index, inside, temperature, top_k, top_p, seed, step, codebook, num_codes):
    """Sample a code from the guided logits [BLOCK]."""
    mixed = tl.where(inside, mixed, float("-inf"))
    choice = mixed
    if temperature > 0.0:
        z = tl.div_rn(mixed - tl.max(mixed, axis=0), temperature)
        key = z.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        keep = inside
        if top_p > 0.0:
            keep = _top_p_mask(z, key, inside, top_p) & inside
        elif (top_k > 0) & (top_k < num_codes):
            keep = _top_k_mask(key, inside, top_k) & inside
        gumbel = -tl.log(-tl.log(uniforms(seed, step, codebook, index)))
        choice = tl.where(keep, z + gumbel, float("-inf"))
    return _first_argmax(choice, index, num_codes)


@triton.jit(do_not_specialize=VARYING)
def _sample(
    logits,
    row_offsets,
    slots,
    steps,
    num_frames,
    seeds,
    guidance,
    guidance_beta,
    temperature,
    top_k,
    top_p,
    delays,
    sequences,
    out,
    num_codes,
    max_steps,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request, codebook = tl.program_id(0), tl.program_id(1)
    step = tl.load(steps + request)
    frame = step - 1 - tl.load(delays + codebook)
    slot = tl.load(slots + request).to(tl.int64)
    cell = sequences + (slot * K + codebook) * max_steps + step
    known = tl.load(cell)
    code = known
    if (frame < 0) | (frame >= tl.load(num_frames + request)):
        code = num_codes
    elif known < 0:
        index = tl.arange(0, BLOCK)
        inside = index < num_codes
        first = tl.load(row_offsets + request).to(tl.int64)
        num_rows = tl.load(row_offsets + request + 1) - first.to(tl.int32)
        row_stride = (num_codes * K).to(tl.int64)
        mixed = _mix(
            logits,
            first,
            num_rows,
            (codebook * num_codes + index, row_stride),
            tl.load(guidance + request),
            tl.load(guidance_beta + request),
            inside,
        )
        code = _draw(
            mixed,
            index,
            inside,
            tl.load(temperature + request),
            tl.load(top_k + request),
            tl.load(top_p + request),
            tl.load(seeds + request),
            step,
            codebook,
            num_codes,
        )
    tl.store(cell, code)
    tl.store(out + request * K + codebook, code)


def delayed_sample_step(logits: Tensor, batch: SampleBatch, delays: Tensor, sequences: Tensor, out: Tensor) -> None:
    """See `musicgen_kernels.sampling.delayed_sample_step`."""
    require_no_float64("logits", logits)
    num_codebooks, num_codes = logits.shape[1:]
    launch(
        _sample,
        (batch.slots.shape[0], num_codebooks),
        logits,
        logits,
        batch.row_offsets,
        batch.slots,
        batch.steps,
        batch.num_frames,
        batch.seeds,
        batch.guidance,
        batch.guidance_beta,
        batch.temperature,
        batch.top_k,
        batch.top_p,
        delays,
        sequences,
        out,
        num_codes,
        sequences.shape[2],
        K=num_codebooks,
        BLOCK=power_of_2(num_codes),
        num_warps=4,
        enable_fp_fusion=False,  # the guidance mix rounds after each operation, as the reference does
    )
