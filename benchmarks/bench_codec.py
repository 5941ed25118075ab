"""The codec's decoder: whole pieces against transformers, and chunked streams against whole pieces.

`python -m benchmarks.bench_codec`: random weights of the real size; `--model demo` measures a model's codec. Prints a
table, then one line of JSON. Every round times each contender once in turn, and ratios are medians over rounds, so that
a machine slowdown affects all equally.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.engine_models import codec_decoder
from benchmarks.meter import Meter
from musicgen.codec_stream import StreamingCodec, decode_audio
from musicgen.config import CodecConfig
from musicgen.models.encodec import EncodecDecoder
from musicgen.weights import open_checkpoint


def main() -> None:
    args = _parse()
    torch.set_num_threads(args.threads)
    decoder = open_checkpoint(args.model, "cpu").codec()[0] if args.model else codec_decoder()
    config, peer = decoder.config, transformers_codec(decoder.config)
    codes = torch.randint(config.codebook_size, (1, config.num_codebooks, int(args.seconds * config.frame_rate_hz)))
    contenders: dict[str, Callable[[], Tensor]] = {
        "whole": lambda: decode_audio(decoder, codes, 1)[0],
        "transformers": lambda: peer.decode(codes[None], [None]).audio_values[0],
        **{f"chunks of {s:g} s": _chunked(decoder, codes[0], s) for s in args.chunks},
    }
    with Meter(args.threads) as meter, torch.inference_mode():
        times = _rounds(contenders, args.rounds, meter)
    reading = meter.reading()
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {name: _ratio(values, times["whole"]) for name, values in times.items()}
    print(f"{args.seconds:g} s of music, {args.rounds} rounds, {args.threads} threads")
    for name, seconds in medians.items():
        speed = args.seconds / seconds
        print(f"{name:16} {seconds:8.3f} s  {speed:6.1f} × real time  {ratios[name]:5.2f} × whole")
    print(
        f"read {reading.stream_bytes_s / 1e9:.1f} GB/s, drift {reading.stream_drift:.2f}, "
        f"other processes {reading.others_cores:.2f} cores, load {reading.load_average:.1f}"
    )
    result = {"benchmark": "codec", "seconds": medians, "ratio_to_whole": ratios, "reading": asdict(reading)}
    print(json.dumps({**result, "options": vars(args), "torch": torch.__version__}))


def transformers_codec(config: CodecConfig) -> Any:
    """transformers' EnCodec of the same shape with random weights, run as in its generation."""
    from transformers import EncodecConfig, EncodecModel

    bits = config.num_codebooks * math.log2(config.codebook_size)
    theirs = EncodecConfig(
        sampling_rate=config.sample_rate,
        audio_channels=1,
        normalize=False,
        num_filters=config.num_filters,
        hidden_size=config.hidden_size,
        codebook_size=config.codebook_size,
        codebook_dim=config.codebook_dim,
        upsampling_ratios=list(config.upsampling_ratios),
        use_causal_conv=False,
        use_conv_shortcut=config.conv_shortcut,
        target_bandwidths=[bits * config.frame_rate_hz / 1000],
    )
    torch.manual_seed(0)
    return EncodecModel(theirs).eval().requires_grad_(False)


def _chunked(decoder: EncodecDecoder, codes: Tensor, chunk_s: float) -> Callable[[], Tensor]:
    """Decodes `[K, T]` codes as a stream."""
    codec, size = StreamingCodec(decoder, 1), max(1, int(chunk_s * decoder.config.frame_rate_hz))

    def run() -> Tensor:
        state, out = codec.initial_state(), []
        for start in range(0, codes.shape[-1], size):
            last = start + size >= codes.shape[-1]
            samples, state = codec.decode(codes[:, start : start + size], state, last=last)
            out.append(samples)
        return torch.cat(out, -1)

    return run


def _rounds(contenders: dict[str, Callable[[], Tensor]], num_rounds: int, meter: Meter) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in contenders}
    lengths = {contender().shape[-1] for contender in contenders.values()}  # and warm up
    assert len(lengths) == 1, f"contenders returned different lengths: {lengths}"
    for _ in range(num_rounds):
        for name, contender in contenders.items():
            began = time.perf_counter()
            contender()
            times[name].append(time.perf_counter() - began)
        meter.probe()
    return times


def _ratio(values: list[float], base: list[float]) -> float:
    return statistics.median(value / other for value, other in zip(values, base, strict=True))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model name or folder, instead of random weights of the real size")
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of the piece")
    parser.add_argument("--chunks", type=float, nargs="+", default=[0.1, 0.5, 1.0], help="chunk durations in seconds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


if __name__ == "__main__":
    main()
