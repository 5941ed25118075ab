"""End-to-end demo, run by `make demo`: start the service, stream four pieces from it, stop it.

Two pieces from text over HTTP, two with a melody over gRPC, each pair concurrently. Writes the audio files, a plot of
each, a plot of audio received over time, and a table.

    python -m musicgen_serving.demo --out out
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from musicgen.audio import audio_write, generation_metadata
from musicgen.demo import check, tune
from musicgen.plots import plot_audio
from musicgen_serving import cluster
from musicgen_serving.client import Chunk, MusicRequest, Start, connect
from musicgen_serving.free_ports import free_ports
from musicgen_serving.player import Player
from musicgen_serving.settings import load_settings

TEXTS = ("happy rock", "sad jazz")
TUNE = "ode-to-joy"
LOUDNESS_LUFS = -14.0


@dataclass(slots=True)
class Take:
    """One piece as received. Filled in while it streams."""

    name: str
    protocol: str
    request: MusicRequest
    arrivals: list[tuple[float, float]] = field(default_factory=list)
    """(seconds since the request, seconds of audio received by then)."""
    chunks: list[Any] = field(default_factory=list)
    sample_rate: int = 0
    underrun_s: float = 0.0

    @property
    def first_audio_s(self) -> float:
        return self.arrivals[0][0]

    @property
    def total_s(self) -> float:
        return self.arrivals[-1][0]

    @property
    def audio_s(self) -> float:
        return self.arrivals[-1][1]


def listen(url: str, take: Take) -> None:
    """Stream one piece (mutates `take`). The client verifies its checksum."""
    player, began, received = Player(buffer_s=0.5), time.monotonic(), 0
    with connect(url) as client:
        for event in client.events(take.request):
            now = time.monotonic() - began
            if isinstance(event, Start):
                take.sample_rate = event.sample_rate
            elif isinstance(event, Chunk):
                take.chunks.append(event.samples)
                received += event.samples.shape[-1]
                take.arrivals.append((now, received / take.sample_rate))
                player.receive(now, event.samples.shape[-1] / take.sample_rate)
    take.underrun_s = player.underrun_s


def write(take: Take, folder: Path) -> Path:
    """Write the audio file of a piece and its plot."""
    wav = torch.from_numpy(np.concatenate(take.chunks, axis=-1))
    tags = generation_metadata("demo", take.request.seed, license="MIT", prompt=take.request.prompt or "")
    path = audio_write(
        folder / take.name,
        wav,
        take.sample_rate,
        strategy="loudness",
        loudness_headroom_db=-LOUDNESS_LUFS,
        metadata={"title": take.name, **tags},
    )
    plot_audio(wav, take.sample_rate, path.with_suffix(".png"), title=f"{take.name}, over {take.protocol}")
    return path


def plot_arrivals(takes: Sequence[Take], path: Path) -> None:
    """Plot audio received over time, against real time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    longest_s = max(take.total_s for take in takes)
    for take in takes:
        times, audio = zip(*take.arrivals, strict=True)
        axes.step([0, *times, longest_s], [0, *audio, audio[-1]], where="post", label=f"{take.name} ({take.protocol})")
    axes.plot([0, longest_s], [0, longest_s], "k:", label="real time")
    axes.set(xlabel="seconds since the request", ylabel="seconds of audio received", title="Audio received over time")
    axes.legend()
    figure.savefig(path)


def table(takes: Sequence[Take]) -> str:
    """Latencies of each stream."""
    lines = [f"{'piece':<28} {'over':<5} {'first audio':>11} {'total':>7} {'audio':>7} {'RTF':>5} {'underrun':>8}"]
    lines += [
        f"{take.name:<28} {take.protocol:<5} {take.first_audio_s:>9.2f} s {take.total_s:>5.2f} s {take.audio_s:>5.2f} s"
        f" {take.total_s / take.audio_s:>5.2f} {take.underrun_s:>6.2f} s"
        for take in takes
    ]
    lines.append("RTF: total time per second of audio. Underrun: silence of a player with a 0.5 s buffer.")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Start the service, stream four pieces from it, stop it.")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="FOLDER")
    parser.add_argument("--duration", type=float, default=8.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    recording = options.out / f"{TUNE}.wav"
    soundfile.write(recording, tune.melody(), tune.SAMPLE_RATE_HZ, subtype="PCM_16")
    takes = [
        *(_take(text, "HTTP", options, None, number) for number, text in enumerate(TEXTS)),
        *(_take(text, "gRPC", options, recording, number) for number, text in enumerate(TEXTS)),
    ]
    _run(takes)
    paths = [write(take, options.out) for take in takes]
    plot_arrivals(takes, options.out / "arrivals.png")
    results = [check.check(path, 32000, options.duration) for path in paths]
    print("\n".join(line for line, _ in results))
    print(f"plots: one next to each file, and {options.out / 'arrivals.png'}")
    print(table(takes))
    return 0 if all(good for _, good in results) else 1


def _take(text: str, protocol: str, options: argparse.Namespace, melody: Path | None, number: int) -> Take:
    seed = options.seed + number
    parts = [text.replace(" ", "-"), *([melody.stem] if melody else []), f"seed{seed}"]
    content = None if melody is None else melody.read_bytes()
    request = MusicRequest(text, melody=content, duration_s=options.duration, seed=seed)
    return Take("_".join(parts), protocol, request)


def _run(takes: Sequence[Take]) -> None:
    """Start the service, stream the pieces one protocol at a time, and stop it."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    http_port, grpc_port = free_ports(2)
    settings = load_settings({"http": {"port": http_port}, "grpc": {"port": grpc_port}, "access": {"open": True}})
    began = time.monotonic()
    shown: set[str] = set()

    def on_state(states: dict[str, str]) -> None:
        for name in sorted(name for name, state in states.items() if state == "ready" and name not in shown):
            shown.add(name)
            print(f"{time.monotonic() - began:5.1f} s  {name} ready", file=sys.stderr, flush=True)

    print("starting the service: seven components, each in its own process", file=sys.stderr, flush=True)
    endpoints = cluster.start(settings, on_state)
    try:
        for protocol, url in (("HTTP", endpoints.http), ("gRPC", endpoints.grpc)):
            assert url is not None
            chosen = [take for take in takes if take.protocol == protocol]
            print(f"streaming two pieces over {protocol} from {url}", file=sys.stderr, flush=True)
            with ThreadPoolExecutor(len(chosen)) as pool:
                list(pool.map(lambda take, url=url: listen(url, take), chosen))
    finally:
        cluster.stop()


if __name__ == "__main__":
    sys.exit(main())
