"""`delayed_sample_step` in plain PyTorch: one request and codebook at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sampling import SampleBatch
from .philox import uniforms


def delayed_sample_step(logits: Tensor, batch: SampleBatch, delays: Tensor, sequences: Tensor, out: Tensor) -> None:
    """See `musicgen_kernels.sampling.delayed_sample_step`; writes `out` and `sequences`."""
    num_codebooks, num_codes = logits.shape[1:]
    offsets = batch.row_offsets.tolist()
    for r in range(batch.slots.shape[0]):
        rows = logits[offsets[r] : offsets[r + 1]]
        step, slot = int(batch.steps[r]), int(batch.slots[r])
        for k in range(num_codebooks):
            frame = step - 1 - int(delays[k])
            known = int(sequences[slot, k, step])
            if frame < 0 or frame >= int(batch.num_frames[r]):
                code = num_codes
            elif known >= 0:
                code = known
            else:
                mixed = mix_guidance(rows[:, k], batch.guidance[r], batch.guidance_beta[r])
                code = _draw(mixed, batch, r, step, k)
            sequences[slot, k, step] = code
            out[r, k] = code


def mix_guidance(rows: Tensor, guidance: Tensor, beta: Tensor) -> Tensor:
    """[1–3, ..., V] logits of a request's rows → [..., V]."""
    c, b = guidance.to(rows.dtype), beta.to(rows.dtype)
    null = rows[-1]
    if rows.shape[0] == 1:
        return null
    if rows.shape[0] == 2:
        return null + c * (rows[0] - null)
    return null + c * (rows[1] + b * (rows[0] - rows[1]) - null)


def keep_mask(z: Tensor, top_k: int, top_p: float) -> Tensor:
    """[V] bool: the codes that may be sampled. z = (logit − max)/temperature, so its maximum is 0."""
    if top_p > 0:
        order = torch.argsort(z, descending=True, stable=True)
        mass = z[order].exp().double()
        before = (mass.cumsum(0) - mass) / mass.sum()
        keep = torch.empty_like(z, dtype=torch.bool)
        keep[order] = before <= top_p
        return keep
    if 0 < top_k < z.shape[0]:
        return z >= z.topk(top_k).values[-1]
    return torch.ones_like(z, dtype=torch.bool)


def _draw(logits: Tensor, batch: SampleBatch, r: int, step: int, codebook: int) -> int:
    temperature = batch.temperature[r].to(logits.dtype)
    if temperature == 0:
        return _first_argmax(logits)
    z = (logits - logits.max()) / temperature
    keep = keep_mask(z, int(batch.top_k[r]), float(batch.top_p[r]))
    u = uniforms(int(batch.seeds[r]), step, codebook, logits.shape[0]).to(logits)
    perturbed = z - torch.log(-torch.log(u))
    return _first_argmax(perturbed.masked_fill(~keep, -torch.inf))


def _first_argmax(x: Tensor) -> int:
    """The lowest index of the largest value (torch.argmax does not guarantee which)."""
    return int((x == x.max()).nonzero()[0, 0])
