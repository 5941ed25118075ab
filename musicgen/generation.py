"""`plan_windows`, and `generate_codes`: the reference generation loop.

The engine generates in production; `generate_codes` is the plain, unbatched loop that tests compare it with.
Independent of text, audio and the codec.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from musicgen_kernels import SampleBatch, delayed_sample_step
from torch import Tensor

from musicgen.delay import UNKNOWN_CODE
from musicgen.models.language_model import LanguageModel
from musicgen.types import CodesRequest, Conditioning, SamplingParams, Window

OnFrames = Callable[[int], None]
"""Called with the number of frames known so far, including the prompt."""


def plan_windows(num_frames: int, num_prompt_frames: int, max_frames: int, stride: int) -> list[Window]:
    """The windows that generate `num_frames` frames, of which the first `num_prompt_frames` are given.

    Each window after the first starts `stride` frames later and uses the overlap as its prompt. Of a prompt that fills
    the first window, only the last `max_frames - stride` frames are used.

    Source: audiocraft `MusicGen._generate_tokens`.
    """
    if num_frames <= max_frames:
        return [Window(0, num_frames)]
    assert 0 < stride < max_frames, stride  # otherwise windows would not advance, or would leave gaps
    start = 0 if num_prompt_frames < max_frames else num_prompt_frames - (max_frames - stride)
    windows = [Window(start, min(start + max_frames, num_frames))]
    while windows[-1].end < num_frames:
        start += stride
        windows.append(Window(start, min(start + max_frames, num_frames)))
    return windows


@torch.inference_mode()
def generate_codes(model: LanguageModel, request: CodesRequest, on_frames: OnFrames | None = None) -> Tensor:
    """The codes `[K, T]` (int32, on the host) of one request, including the prompt."""
    num_codebooks = model.config.decoder.num_codebooks
    codes = torch.empty(num_codebooks, 0, dtype=torch.int32)
    if request.known_codes is not None:
        codes = request.known_codes.to("cpu", torch.int32)
    for window, conditioning in request.windows:
        if codes.shape[-1] >= window.end:
            continue
        codes = _extend(model, codes, window, conditioning, request.sampling, on_frames or (lambda _: None))
    return codes


def _extend(
    model: LanguageModel,
    known: Tensor,
    window: Window,
    conditioning: Conditioning,
    sampling: SamplingParams,
    on_frames: OnFrames,
) -> Tensor:
    """Extend the `known` codes `[K, T']` of the piece up to the end of `window`: `[K, window.end]`.

    Steps are counted from the start of the piece, so that later windows do not repeat random draws.
    """
    pattern, special_token, device = model.config.delay_pattern, model.config.decoder.special_token, model.device
    num_known = known.shape[-1]
    unknown = known.new_full((pattern.num_codebooks, window.end - num_known), UNKNOWN_CODE)
    sequence = pattern.apply(torch.cat([known, unknown], dim=-1), special_token)[None].contiguous().to(device)
    prompt = pattern.apply(known[:, window.start :], special_token)
    prompt = prompt[:, : pattern.first_step_after(num_known - window.start)]

    rows = model.guidance_rows(conditioning, sampling)
    max_len = rows.prefix_len + pattern.num_steps(window.end - window.start)
    state = model.decoder.start(rows.num_rows, max_len, rows.text)
    inputs, prefix = prompt.to(device).expand(rows.num_rows, -1, -1), rows.prefix
    delays = torch.tensor(pattern.delays, dtype=torch.int32, device=device)
    batch = _sample_batch(sampling, rows.num_rows, window.end, device)
    for step in range(pattern.first_step_after(num_known), sequence.shape[-1]):
        logits = model.decoder(inputs, state, prefix)[:, -1].contiguous()
        batch.steps.fill_(step)
        codes = delayed_sample_step(logits, batch, delays, sequence)
        # In a window's first steps the delays reach back to frames before it, which it must not see.
        codes = torch.where(step - window.start > delays, codes, special_token)
        inputs, prefix = codes[:, :, None].expand(rows.num_rows, -1, -1), None
        on_frames(max(num_known, pattern.num_complete_frames(step + 1)))
    return pattern.undo(sequence[0]).cpu()


def _sample_batch(sampling: SamplingParams, num_rows: int, num_frames: int, device: torch.device) -> SampleBatch:
    """The sampling kernel's parameters for one request; `steps` is set at each step."""

    def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    def floats(value: float) -> Tensor:
        return torch.tensor([value], dtype=torch.float32, device=device)

    return SampleBatch(
        row_offsets=ints(0, num_rows),
        slots=ints(0),
        steps=ints(0),
        num_frames=ints(num_frames),
        seeds=ints(sampling.seed, dtype=torch.int64),
        guidance=floats(sampling.guidance_scale),
        guidance_beta=floats(1.0 if sampling.melody_guidance is None else sampling.melody_guidance),
        temperature=floats(0.0 if sampling.greedy else sampling.temperature),
        top_k=ints(sampling.top_k),
        top_p=floats(sampling.top_p),
    )
