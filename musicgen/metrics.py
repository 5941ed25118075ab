"""Objective measures of generated music: chroma cosine similarity and multi-resolution spectral distance.

The filter bank is that of the melody conditioning, which tests check against transformers. Independent of models, files
and prompts.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from musicgen.models.chroma import chroma_filter_bank

NUM_CHROMA = 12


@dataclass(frozen=True, slots=True)
class ChromaSettings:
    """Analysis of the melody condition: 512 ms windows every 128 ms at 32 kHz."""

    sample_rate_hz: int = 32000
    n_fft: int = 16384
    hop_len: int = 4096


DEFAULT_CHROMA = ChromaSettings()


def chromagram(wav: Tensor, settings: ChromaSettings = DEFAULT_CHROMA) -> Tensor:
    """Power per pitch class, with each frame's maximum scaled to 1.

    Args:
        wav: float ``[B, samples]`` at the settings' rate, zero-padded if shorter than ``n_fft``.

    Returns:
        float32 ``[B, samples // hop_len + 1, 12]``; a silent frame is all zeros.

    Raises:
        ValueError: ``wav`` is not two-dimensional or has no samples.
    """
    if wav.dim() != 2 or wav.shape[1] == 0:
        raise ValueError(f"expected wav [B, samples] with samples > 0, got shape {tuple(wav.shape)}; downmix it first")
    num_samples = wav.shape[1]
    missing = settings.n_fft - num_samples
    if missing > 0:
        # Pad evenly on both sides, the odd sample at the end: centred frames need at least one window of samples.
        wav = F.pad(wav, (missing // 2, missing // 2 + missing % 2))
    window = torch.hann_window(settings.n_fft, device=wav.device)
    spectrum = torch.stft(
        wav.float(),
        settings.n_fft,
        settings.hop_len,
        window=window,
        center=True,
        pad_mode="reflect",
        return_complex=True,
    )
    power = (spectrum / window.pow(2).sum().sqrt()).abs().pow(2)
    bank = (
        torch.from_numpy(chroma_filter_bank(settings.sample_rate_hz, settings.n_fft, NUM_CHROMA)).float().to(wav.device)
    )
    return F.normalize(bank @ power, p=math.inf, dim=1, eps=1e-6).transpose(1, 2)


def one_hot_chroma(chroma: Tensor) -> Tensor:
    """The strongest pitch class of each frame: float32 one-hot, shaped as ``chroma`` (``[..., 12]``)."""
    return F.one_hot(chroma.argmax(dim=-1), NUM_CHROMA).float()


def chroma_cosine_similarity(
    reference: Tensor, generated: Tensor, settings: ChromaSettings = DEFAULT_CHROMA, *, argmax: bool = True
) -> Tensor:
    """Mean cosine similarity of two recordings' chroma, frame by frame.

    This is the metric that MusicGen's model card reports for melody models. With ``argmax`` (audiocraft's evaluation
    default) each frame is reduced to its strongest pitch class first, so the result is the fraction of frames in which
    both agree; without it the soft chroma are compared.

    Args:
        reference: float ``[B, samples]``.
        generated: float ``[B, samples]``, the same shape.

    Returns:
        float32 ``[B]``, in 0..1.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != generated.shape:
        raise ValueError(
            f"expected recordings of equal shape, got {tuple(reference.shape)} and {tuple(generated.shape)}; "
            "trim the longer one"
        )
    # Count only frames that start within the recording, as audiocraft does.
    num_frames = math.ceil(reference.shape[-1] / settings.hop_len)
    first, second = (chromagram(wav, settings)[:, :num_frames] for wav in (reference, generated))
    if argmax:
        first, second = one_hot_chroma(first), one_hot_chroma(second)
    return F.cosine_similarity(first, second, dim=-1, eps=1e-8).mean(dim=-1)


def spectral_distance(
    reference: Tensor, generated: Tensor, n_ffts: tuple[int, ...] = (512, 1024, 2048, 4096)
) -> Tensor:
    """Multi-resolution spectral distance: 0 for equal recordings, larger is worse.

    For each window length, spectral convergence ``‖|G| − |R|‖ / ‖|R|‖`` plus the mean absolute difference of natural
    log magnitudes (Yamamoto et al. 2020, Parallel WaveGAN, equations 4–6), averaged over the window lengths.

    Args:
        reference: float ``[B, samples]``.
        generated: float ``[B, samples]``, the same shape.
        n_ffts: window lengths in samples; the hop is a quarter of each.

    Returns:
        float32 ``[B]``.

    Raises:
        ValueError: the shapes differ or the recordings are shorter than the longest window.
    """
    if reference.shape != generated.shape or reference.shape[-1] < max(n_ffts):
        raise ValueError(
            f"expected recordings of equal shape with at least {max(n_ffts)} samples, got "
            f"{tuple(reference.shape)} and {tuple(generated.shape)}; trim the longer one"
        )
    total = torch.zeros(reference.shape[0], device=reference.device)
    for n_fft in n_ffts:
        window = torch.hann_window(n_fft, device=reference.device)
        first, second = (
            torch.stft(wav.float(), n_fft, n_fft // 4, window=window, normalized=True, return_complex=True).abs()
            for wav in (reference, generated)
        )
        convergence = (second - first).norm(dim=(1, 2)) / first.norm(dim=(1, 2)).clamp_min(1e-6)
        logs = (second.clamp_min(1e-4).log() - first.clamp_min(1e-4).log()).abs().mean(dim=(1, 2))
        total = total + convergence + logs
    return total / len(n_ffts)
