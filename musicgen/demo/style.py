"""A simple classifier of musical style, to check whether generated music matches its prompt.

A linear softmax classifier on statistics of a mel spectrogram.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_BANDS, N_FFT, HOP_LEN, SAMPLE_RATE_HZ = 48, 2048, 640, 32000


def mel_filter_bank(num_bands: int = NUM_BANDS, n_fft: int = N_FFT, sample_rate_hz: int = SAMPLE_RATE_HZ) -> Tensor:
    """Triangles equally spaced on the mel scale ``2595·log10(1 + f/700)``: float32 ``[bands, n_fft // 2 + 1]``."""
    frequencies = torch.linspace(0, sample_rate_hz / 2, n_fft // 2 + 1)
    highest = 2595 * math.log10(1 + sample_rate_hz / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(45, highest, num_bands + 2) / 2595) - 1)
    rising = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp_min(0)


def features(wav: Tensor) -> Tensor:
    """Mean and standard deviation over time of log mel bands and their increases: float ``[B, samples]`` →
    ``[B, 4·bands]``."""
    window = torch.hann_window(N_FFT)
    bank = mel_filter_bank()
    rows = []
    for row in wav:
        power = torch.stft(row.float(), N_FFT, HOP_LEN, window=window, return_complex=True).abs().pow(2)
        bands = (bank @ power + 1e-4).log()
        # Remove loudness, which does not indicate style.
        bands = bands - bands.mean()
        rises = bands.diff(dim=1).clamp_min(0)
        rows.append(torch.cat([bands.mean(1), bands.std(1), rises.mean(1), rises.std(1)]))
    return torch.stack(rows)


@dataclass(frozen=True, slots=True)
class StyleClassifier:
    """A linear classifier over standardised features."""

    names: tuple[str, ...]
    mean: Tensor
    deviation: Tensor
    weight: Tensor
    bias: Tensor

    def predict(self, wav: Tensor) -> list[str]:
        """The most likely style of each recording, float ``[B, samples]`` at 32 kHz."""
        scores = ((features(wav) - self.mean) / self.deviation) @ self.weight + self.bias
        return [self.names[index] for index in scores.argmax(dim=1).tolist()]


def fit_classifier(
    inputs: Tensor, styles: list[str], *, penalty: float = 1e-2, num_steps: int = 400
) -> StyleClassifier:
    """Softmax regression on ``features``' output, float ``[N, 4·bands]``; full-batch Adam from zero."""
    names = tuple(sorted(set(styles)))
    wanted = torch.tensor([names.index(style) for style in styles])
    mean, deviation = inputs.mean(0), inputs.std(0) + 1e-3
    standard = (inputs - mean) / deviation
    weight = torch.zeros(inputs.shape[1], len(names), requires_grad=True)
    bias = torch.zeros(len(names), requires_grad=True)
    optimiser = torch.optim.Adam([weight, bias], lr=0.02)
    for _ in range(num_steps):
        loss = F.cross_entropy(standard @ weight + bias, wanted) + penalty * weight.pow(2).sum()
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
    return StyleClassifier(names, mean, deviation, weight.detach(), bias.detach())
