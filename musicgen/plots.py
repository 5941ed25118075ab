"""Audio plots: waveform and log-mel spectrogram. Does not touch matplotlib's global state."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musicgen.waveform import check_sample_rate, validate_waveform

_N_FFT = 2048
_NUM_MELS = 96
_MAX_COLUMNS = 1200
_RANGE_DB = 80.0
_FONTS = (
    *("DejaVu Sans", "Noto Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "IPAexGothic"),
    *("Hiragino Sans", "Yu Gothic", "Microsoft YaHei", "Arial Unicode MS", "Noto Emoji"),
)
"""Fonts for titles in any script, as far as they are installed; the first comes with matplotlib."""
_TICKS_HZ = (100, 250, 500, 1000, 2000, 4000, 8000, 16000)


def plot_audio(wav: Tensor, sample_rate: int, path: str | os.PathLike[str], title: str = "") -> Path:
    """Plot audio to a PNG: the waveform of each channel above the log-mel spectrogram of their mean.

    Args:
        wav: `[N]` or `[C, N]` float.
        sample_rate: in Hz.
        path: output file; its folder must exist.
        title: figure title.
    Returns:
        `path`.
    Raises:
        InvalidRequestError: invalid audio or sample rate.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    samples = validate_waveform(wav).detach().cpu()
    check_sample_rate(sample_rate)
    figure = Figure(figsize=(10, 5.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    wave_axes, mel_axes = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    _draw_waveform(wave_axes, samples, sample_rate)
    image = _draw_spectrogram(mel_axes, samples, sample_rate)
    figure.colorbar(image, ax=mel_axes, label="dB relative to maximum", pad=0.01)
    if title:
        shown, fonts = _drawable(title)
        figure.suptitle(shown, fontfamily=fonts, parse_math=False)  # a prompt may contain $
    figure.savefig(path, format="png")
    return Path(path)


def _drawable(text: str) -> tuple[str, list[str]]:
    """The text with a question mark for each sign that no installed font has, and the fonts to draw it with."""
    from matplotlib import font_manager

    installed = font_manager.get_font_names()
    fonts = [name for name in _FONTS if name in installed]
    known: set[int] = set()
    for name in fonts:
        known.update(font_manager.get_font(font_manager.findfont(name)).get_charmap())
    return "".join(sign if ord(sign) in known else "?" for sign in " ".join(text.split())), fonts


def _draw_waveform(axes: Any, samples: Tensor, sample_rate: int) -> None:
    """Each channel as a band between the minimum and maximum sample of each column."""
    num_samples = samples.shape[1]
    per_column = math.ceil(num_samples / _MAX_COLUMNS)
    num_columns = math.ceil(num_samples / per_column)
    padded = torch.nn.functional.pad(samples[None], (0, num_columns * per_column - num_samples), mode="replicate")[0]
    columns = padded.view(samples.shape[0], num_columns, per_column)
    time_s = torch.arange(num_columns) * per_column / sample_rate
    for channel, (low, high) in enumerate(zip(columns.amin(2), columns.amax(2), strict=True)):
        label = "" if len(samples) == 1 else ("left", "right")[channel] if len(samples) == 2 else str(channel + 1)
        axes.fill_between(time_s, low, high, alpha=1.0 if len(samples) == 1 else 0.6, linewidth=0.5, label=label)
        if per_column == 1:  # the band would have no height
            axes.plot(time_s, low, linewidth=0.8)
    if len(samples) > 1:
        axes.legend(loc="upper right", fontsize="small")
    limit = max(1.0, float(samples.abs().max()))
    axes.set_ylim(-limit, limit)
    axes.set_ylabel("sample")


def _draw_spectrogram(axes: Any, samples: Tensor, sample_rate: int) -> Any:
    mels = log_mel(samples, sample_rate)
    top_mel, duration_s = _mel(sample_rate / 2), samples.shape[1] / sample_rate
    image = axes.imshow(
        mels.numpy(), origin="lower", aspect="auto", extent=(0.0, duration_s, 0.0, top_mel),
        vmin=-_RANGE_DB, vmax=0.0, cmap="magma",
    )  # fmt: skip
    ticks = [hz for hz in _TICKS_HZ if hz <= sample_rate / 2]
    axes.set_yticks([_mel(hz) for hz in ticks], [f"{hz / 1000:g}k" if hz >= 1000 else str(hz) for hz in ticks])
    axes.set_ylabel("frequency (Hz, mel scale)")
    axes.set_xlabel("time (s)")
    return image


def log_mel(samples: Tensor, sample_rate: int) -> Tensor:
    """`[C, N]` → `[num_mels, columns]` in dB relative to the maximum, clipped at −80; of the channels' mean."""
    mono = samples.mean(dim=0)
    hop = max(_N_FFT // 8, math.ceil(mono.shape[0] / _MAX_COLUMNS))
    padded = torch.nn.functional.pad(mono, (_N_FFT // 2, _N_FFT // 2))
    spectrum = torch.stft(padded, _N_FFT, hop, window=torch.hann_window(_N_FFT), center=False, return_complex=True)
    power = _mel_filters(sample_rate) @ spectrum.abs().square()
    level_db = 10 * torch.log10(power / power.max().clamp_min(1e-12) + 10 ** (-_RANGE_DB / 10))
    return level_db.clamp(-_RANGE_DB, 0.0)


def _mel(frequency_hz: float) -> float:
    """Source: O'Shaughnessy (1987), the mel scale of HTK."""
    return 2595.0 * math.log10(1.0 + frequency_hz / 700.0)


def _mel_filters(sample_rate: int) -> Tensor:
    """`[num_mels, n_fft / 2 + 1]` triangles, each with sum 1 and at least one bin wide, so that none is empty."""
    edges = torch.linspace(0.0, _mel(sample_rate / 2), _NUM_MELS + 2)
    edges_hz = 700.0 * (10.0 ** (edges / 2595.0) - 1.0)
    bins_hz = torch.linspace(0.0, sample_rate / 2, _N_FFT // 2 + 1)
    bin_hz = sample_rate / _N_FFT
    low, centre, high = edges_hz[:-2, None], edges_hz[1:-1, None], edges_hz[2:, None]
    rise = (bins_hz - centre) / (centre - low).clamp_min(bin_hz) + 1.0
    fall = (centre - bins_hz) / (high - centre).clamp_min(bin_hz) + 1.0
    triangles = torch.minimum(rise, fall).clamp_min(0.0)
    return triangles / triangles.sum(dim=1, keepdim=True)
