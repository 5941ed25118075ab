"""MusicGen's melody features: the dominant pitch class in each frame of a recording.

Recordings are processed one at a time: padding to a common length would change the result. Independent of files, stems
and the language model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musicgen.config import ChromaConfig
from musicgen.errors import InvalidRequestError
from musicgen.waveform import resample

_A440_OVER_16_HZ = 440.0 / 16
"""Octaves are counted from the A four octaves below concert pitch."""


def chroma_filter_bank(sample_rate: int, n_fft: int, num_chroma: int) -> np.ndarray:
    """Contribution of each FFT bin to each pitch class, C first.

    A bin's weight is a Gaussian bump around the pitch classes nearest to its frequency, as wide as the bin is in
    pitch; each bin's weights have length 1, times a Gaussian over octaves around the fifth (width 2 octaves).
    Source: librosa's chroma filters with its defaults (tuning 0), after Ellis (2007), "Chroma feature analysis and
    synthesis".

    Returns:
        `[num_chroma, n_fft // 2 + 1]` float64.
    """
    frequencies_hz = np.arange(1, n_fft) * (sample_rate / n_fft)
    pitch = num_chroma * np.log2(frequencies_hz / _A440_OVER_16_HZ)
    # 0 Hz has no pitch; librosa puts it 1.5 octaves below the first bin.
    pitch = np.concatenate(([pitch[0] - 1.5 * num_chroma], pitch))
    width = np.concatenate((np.maximum(np.diff(pitch), 1.0), [1.0]))
    half = np.round(num_chroma / 2)
    distance = pitch[None] - np.arange(num_chroma)[:, None]
    distance = np.remainder(distance + half + 10 * num_chroma, num_chroma) - half
    bumps = np.exp(-0.5 * (2 * distance / width) ** 2)
    bumps /= np.sqrt(np.square(bumps).sum(axis=0, keepdims=True))
    bumps *= np.exp(-0.5 * ((pitch / num_chroma - 5.0) / 2.0) ** 2)
    from_c = np.roll(bumps, -3 * (num_chroma // 12), axis=0)
    return np.ascontiguousarray(from_c[:, : n_fft // 2 + 1])


class ChromaExtractor(nn.Module):
    """Extracts one-hot chroma frames from recordings.

    Source: MusicGen (Copet et al. 2023), section 2.3: the dominant pitch class of each frame, so that the model
    cannot copy the recording. Equal to transformers' `MusicgenMelodyFeatureExtractor` for one recording at a time.
    """

    filters: Tensor

    def __init__(self, config: ChromaConfig) -> None:
        super().__init__()
        from torchaudio.transforms import Spectrogram

        self.config = config
        bank = torch.from_numpy(chroma_filter_bank(config.sample_rate, config.n_fft, config.num_chroma)).float()
        self.register_buffer("filters", bank, persistent=False)
        self.spectrogram = Spectrogram(
            n_fft=config.n_fft, win_length=config.n_fft, hop_length=config.hop_length, power=2, normalized=True
        )

    @property
    def max_samples(self) -> int:
        """Samples used, at the model's rate: the most that yield `num_frames`, in whole seconds if possible (30 s for
        the released models).

        The cut affects the last two frames, whose windows reach beyond it. transformers makes it too, and audiocraft in
        pieces longer than a window; in shorter ones audiocraft analyses the whole recording and cuts the features.
        """
        hop, rate = self.config.hop_length, self.config.sample_rate
        most = self.config.num_frames * hop - 1
        whole_s = most // rate * rate
        return whole_s if whole_s // hop + 1 == self.config.num_frames else most

    @torch.no_grad()
    def forward(self, recordings: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
        """Extract the chroma of each recording separately.

        Args:
            recordings: (`[N]` or `[C, N]` float waveform, its sample rate in Hz); channels are averaged.
        Returns:
            For each, `[num_frames, num_chroma]` float32 one-hot: longer recordings are truncated, shorter ones
            repeated.
        Raises:
            InvalidRequestError: a waveform of the wrong shape, or without samples.
        """
        return [self._one(waveform, sample_rate) for waveform, sample_rate in recordings]

    def _one(self, waveform: Tensor, sample_rate: int) -> Tensor:
        channels = waveform[None] if waveform.ndim == 1 else waveform
        if channels.ndim != 2 or channels.numel() == 0 or not channels.is_floating_point():
            got = f"{waveform.dtype} {list(waveform.shape)}"
            raise InvalidRequestError("a float waveform [N] or [C, N], N ≥ 1", got, param="melody")
        mono = resample(channels.to(self.filters).mean(dim=0), sample_rate, self.config.sample_rate)
        mono = mono[: self.max_samples]
        if mono.shape[0] < self.config.n_fft:  # one window, centred on the recording
            missing = self.config.n_fft - mono.shape[0]
            mono = F.pad(mono, (missing // 2, missing - missing // 2))
        chroma = self.filters @ self.spectrogram(mono)
        # Normalising does not change the argmax, but rounds like the features the model was trained on.
        chroma = F.normalize(chroma, p=float("inf"), dim=0, eps=1e-6)
        one_hot = F.one_hot(chroma.argmax(dim=0), self.config.num_chroma).to(self.filters.dtype)
        num_repeats = -(-self.config.num_frames // one_hot.shape[0])
        return one_hot.repeat(num_repeats, 1)[: self.config.num_frames]
