"""The sampling step: guidance, filters, sampling and the delay pattern, for all requests of a step at once.

Codes are int32; the special token is V, the number of regular codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .backend import prepared
from .checks import check_tensor
from .errors import KernelArgumentError

UNKNOWN_CODE = -1
"""Marks positions of a sequence that have no prompt code and have not been sampled yet."""

MAX_CODEBOOKS = 8

_INT = (torch.int32,)
_FLOAT = (torch.float32,)


@dataclass(frozen=True, slots=True)
class SampleBatch:
    """The requests of one step; every field is a tensor with one entry per request, on the device of the logits.

    Attributes:
        row_offsets: [R+1] int32, ascending from 0 to N: request r owns logits rows row_offsets[r] …
            row_offsets[r+1]−1, which are 1 (no guidance), 2 (conditional, null) or 3 (conditional, melody
            only, null), in that order. On GPUs also none, for a request that samples nothing in this step.
        slots: [R] int32, the request's index in `sequences`, unique among requests with rows.
        steps: [R] int32, the delayed step s to decide, 0 ≤ s < S.
        num_frames: [R] int32, T: the request's length in frames (1/50 s each), including the prompt.
        seeds: [R] int64, the request's 64-bit seed; the sign bit is just a bit.
        guidance: [R] float32, c; unused by requests of one row.
        guidance_beta: [R] float32, β; used by requests of three rows only.
        temperature: [R] float32 ≥ 0; 0 is greedy.
        top_k: [R] int32 ≥ 0; 0 keeps all.
        top_p: [R] float32 ≥ 0; above 0 it replaces top_k.
    """

    row_offsets: Tensor
    slots: Tensor
    steps: Tensor
    num_frames: Tensor
    seeds: Tensor
    guidance: Tensor
    guidance_beta: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor


def delayed_sample_step(
    logits: Tensor,
    batch: SampleBatch,
    delays: Tensor,
    sequences: Tensor,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Decide the codes of one delayed step for every request, write them to `sequences` and return them.

    For codebook k of a request at step s, the frame is t = s − 1 − delays[k].
    1. t < 0 or t ≥ num_frames: the special token V.
    2. `sequences[slot, k, s]` ≥ 0: a known (prompt) code, which is used unchanged.
    3. Otherwise it is sampled. Guidance in fp32: one row, itself; two, u + c·(cond − u); three,
       u + c·(mel + β·(cond − mel) − u). temperature 0: the largest, lowest index on ties. Else
       z = (logit − max)/temperature, and
       - top_p > 0: in order of z descending, index ascending, keep while the softmax mass before it is ≤
           top_p;
       - else top_k > 0: keep every z ≥ the k-th largest (ties kept; top_k ≥ V keeps all);
       then the kept v with the largest z_v − log(−log u_v), lowest index on ties (Gumbel-max, an exact draw
       from the softmax over the kept). u_v = ((x >> 9) + ½)·2⁻²³,
       x = word v mod 4 of Philox4x32-10 (Salmon et al., SC 2011)
       with key (seed low, seed high) and counter (s, k, v div 4, 0). A draw thus depends only on (seed, s, k, v).
    Guidance and order of filters: audiocraft `LMModel._sample_next_token`; pattern: `DelayedPatternProvider`.

    Args:
        logits: [N, K, V] float32 (the reference backend also takes float64), contiguous; K ≤ 8.
        batch: the R requests.
        delays: [K] int32 ≥ 0, in frames; shared by all requests.
        sequences: [num_slots, K, S_max] int32, contiguous; **mutated** at [slot, :, s]. UNKNOWN_CODE (−1)
            where a code is to be sampled, otherwise a known code in [0, V).
        out: [R, K] int32 to write to instead of a new tensor.
        backend: backend name; None selects one automatically.

    Returns:
        [R, K] int32, the codes (V is the special token) of this step.

    Raises:
        KernelArgumentError: wrong shape, dtype, device or layout; on the CPU also a slot, step, row range or
            parameter out of range (GPU backends cannot check values without synchronising; the caller must
            ensure that they are valid).
        BackendUnavailableError: the requested backend cannot run here.
    """
    return prepare_sample_step(logits, batch, delays, sequences, out=out, backend=backend)()


def prepare_sample_step(
    logits: Tensor,
    batch: SampleBatch,
    delays: Tensor,
    sequences: Tensor,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Callable[[], Tensor]:
    """`delayed_sample_step` for repeated calls: tensors are validated and the backend is chosen now; the contents of
    the tensors are read at each call.
    """
    check_tensor("logits", logits, (None, None, None), (torch.float32, torch.float64))
    num_codebooks, device = logits.shape[1], logits.device
    if not 1 <= num_codebooks <= MAX_CODEBOOKS:
        raise KernelArgumentError("logits", f"1 to {MAX_CODEBOOKS} codebooks", str(num_codebooks))
    num_requests = check_tensor("batch.slots", batch.slots, (None,), _INT, device=device).shape[0]
    check_tensor("batch.row_offsets", batch.row_offsets, (num_requests + 1,), _INT, device=device)
    for name in ("steps", "num_frames", "top_k"):
        check_tensor(f"batch.{name}", getattr(batch, name), (num_requests,), _INT, device=device)
    for name in ("guidance", "guidance_beta", "temperature", "top_p"):
        check_tensor(f"batch.{name}", getattr(batch, name), (num_requests,), _FLOAT, device=device)
    check_tensor("batch.seeds", batch.seeds, (num_requests,), (torch.int64,), device=device)
    check_tensor("delays", delays, (num_codebooks,), _INT, device=device)
    check_tensor("sequences", sequences, (None, num_codebooks, None), _INT, device=device)
    shape = (num_requests, num_codebooks)
    result = torch.empty(shape, dtype=torch.int32, device=device) if out is None else out
    check_tensor("out", result, shape, _INT, device=device)
    arguments = (logits, batch, delays, sequences, result)
    sample = prepared("delayed_sample_step", device, logits.dtype, backend, arguments)

    def run() -> Tensor:
        sample()
        return result

    return run
