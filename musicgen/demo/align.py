"""Initialises attention heads to attend to chosen positions, by fitting the position embeddings alone.

To follow a melody, the model needs a head that at step s attends to chroma frame s/6.4 of the prefix. Training a small
model end to end takes very long to find it; as a separate problem (sinusoidal positions in, a distribution over
positions out) it is solved in seconds. The architecture is unchanged: only the initial values of two projections
differ.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FRAMES_A_CHROMA_FRAME = 6.4
"""50 code frames per second; one chroma frame per 4096 samples at 32 kHz."""


def chroma_targets(num_steps: int, prefix_len: int, chroma_len: int, ahead: float, width: float) -> Tensor:
    """Target attention from steps to chroma frames: float32 ``[num_steps, prefix_len + num_steps]``, rows sum to 1.

    Args:
        num_steps: code steps S after the prefix; step s predicts frame s of the first codebook.
        prefix_len: positions before the first code step, the first ``chroma_len`` of them chroma.
        chroma_len: number of chroma frames.
        ahead: look-ahead in chroma frames, relative to the step's own time.
        width: standard deviation of the Gaussian, in chroma frames.
    """
    wanted = (torch.arange(num_steps)[:, None] + 0.5) / FRAMES_A_CHROMA_FRAME + ahead
    distance = (torch.arange(chroma_len)[None, :] - wanted.clamp(0, chroma_len - 1)) / width
    targets = torch.zeros(num_steps, prefix_len + num_steps)
    targets[:, :chroma_len] = torch.softmax(-0.5 * distance**2, dim=-1)
    return targets


def recent_targets(num_steps: int, prefix_len: int, back: float, width: float) -> Tensor:
    """Target attention from code steps to the code steps about ``back`` earlier; shapes as in ``chroma_targets``."""
    steps = torch.arange(num_steps)
    distance = (steps[None, :] - (steps[:, None] - back).clamp_min(0)) / width
    wanted = torch.softmax((-0.5 * distance**2).masked_fill(steps[None, :] > steps[:, None], -torch.inf), dim=-1)
    return torch.cat([torch.zeros(num_steps, prefix_len), wanted], dim=1)


def text_targets(num_steps: int, prefix_len: int, text_len: int) -> Tensor:
    """Uniform attention from all steps to the text, the last ``text_len`` positions of the prefix; shapes as in
    ``chroma_targets``."""
    targets = torch.zeros(num_steps, prefix_len + num_steps)
    targets[:, prefix_len - text_len : prefix_len] = 1 / text_len
    return targets


def fit_head(
    positions: Tensor, targets: Tensor, head_dim: int, *, seed: int, num_steps: int = 400, noise: float = 0.3
) -> tuple[Tensor, Tensor, float]:
    """Query and key weights of one head whose causal attention is close to ``targets``.

    Args:
        positions: float32 ``[L, dim]``, the embeddings of all positions, prefix first.
        targets: float32 ``[S, L]``, rows that sum to 1, for the last S positions.
        head_dim: width of the head.
        seed: of the initial weights, the sampled rows and the noise.
        num_steps: Adam steps.
        noise: standard deviation of Gaussian noise that simulates the content added to the positions.

    Returns:
        Query weight and key weight, both ``[head_dim, dim]``, and the last cross-entropy in nats.
    """
    generator = torch.Generator().manual_seed(seed)
    dim, (rows, length) = positions.shape[1], targets.shape
    query, key = ((torch.randn(head_dim, dim, generator=generator) / dim**0.5).requires_grad_() for _ in range(2))
    optimiser = torch.optim.Adam([query, key], lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.02, total_steps=num_steps)
    loss = torch.zeros(())
    for _ in range(num_steps):
        chosen = torch.randint(rows, (256,), generator=generator)
        noisy = F.layer_norm(positions + noise * torch.randn(positions.shape, generator=generator), (dim,))
        at = chosen + length - rows
        scores = (noisy[at] @ query.t()) @ (noisy @ key.t()).t() / head_dim**0.5
        scores = scores.masked_fill(torch.arange(length)[None, :] > at[:, None], -1e9)
        loss = -(targets[chosen] * F.log_softmax(scores, dim=-1)).sum(dim=-1).mean()
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()
    return query.detach(), key.detach(), loss.item()
