"""The kernel benchmark: what it refuses, what a row holds, and how it would time a GPU, with the GPU faked."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import bench_kernels, gpu_machine, kernel_cases, kernel_places
from benchmarks.kernel_cases import Target


class FakeMachine:
    """Every run takes a millisecond."""

    level = "sm_90"

    def stream_bytes_per_s(self) -> float:
        return 1e12

    def peak_rates(self) -> dict[str, float]:
        return {"fp32": 1e12, "16-bit": 4e12}

    def seconds_of(self, run: Callable[[], object], repeats: int, *, cold: bool = False) -> list[float]:
        run()
        return [1e-3] * repeats


def run_main(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_kernels", *arguments])
    bench_kernels.main()


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_without_a_gpu_its_backends_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=rf"--backend {name}: no GPU available"):
        run_main(["--backend", name], monkeypatch)
    assert kernel_places.backends(None) == ["cpu"]


@pytest.mark.parametrize("name", ["gpu", "cpu:sse", "cuda:avx2", "reference"])
def test_an_unknown_backend_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=f"got '{name}'"):
        run_main(["--backend", name], monkeypatch)


def test_with_a_gpu_what_runs_on_it_is_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_machine, "unavailable", lambda name, *_: "not built" if name == "cuda" else None)
    monkeypatch.setattr(kernel_places, "GpuMachine", lambda dtype: FakeMachine())
    assert kernel_places.backends(None) == ["cpu", "triton"]
    target, machine = kernel_places.place("triton", "fp16", 2)
    assert (target, machine.level) == (Target("triton", "cuda", torch.float16), "sm_90")
    with pytest.raises(SystemExit, match="--backend cuda: not built"):
        kernel_places.place("cuda", "bf16", 2)


def test_rows_of_16_bit_activations(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The cases as a GPU gets them, but for the device: the reference stands in."""
    target = Target("reference", "cpu", torch.bfloat16)
    monkeypatch.setattr(bench_kernels, "place", lambda *_: (target, FakeMachine()))
    monkeypatch.setattr(kernel_cases, "WORKING_SET", {"cpu": 1})
    sizes = ["--rows", "2", "--length", "20", "--heads", "2", "--size", "64x64", "--repeats", "3", "--refcheck"]
    kinds = ["--weights", "bf16,int4", "--kv", "bf16,int8", "--op", "linear,attention,sampling"]
    run_main([*sizes, *kinds, "--backend", "triton"], monkeypatch)
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = summary["rows"]
    assert [(row["op"], row["weights"], row["kv"]) for row in rows] == [
        *(("linear", "bf16", "-"), ("linear", "int4", "-")),
        *(("paged_attention", "-", "bf16"), ("paged_attention", "-", "int8")),
        ("delayed_sample_step", "-", "-"),
    ]
    assert summary["peaks triton"] == {"fp32_op_per_s": 1e12, "16-bit_op_per_s": 4e12}
    for row in rows[:4]:
        assert row["activations"] == "bf16"
        assert 0 < row["max_error"] < 0.1
        operations = 2 * 2 * 64 * 64 if row["op"] == "linear" else 4 * 2 * 20 * 2 * 64
        assert row["gflop_per_s"] == pytest.approx(operations * 2 / 1e-3 / 1e9)  # two copies of the data a run
        share = row["pct_of_peak"] / row["gflop_per_s"]
        assert share == pytest.approx(100 / (4e3 if row["op"] == "linear" else 1e3))
        assert ("normalised mean square" in row["note"]) == ("int" in row["weights"] + row["kv"])
    assert rows[4]["max_error"] == 0
    assert rows[4]["note"] == "0 of 64 codes differ from the reference's"


def test_a_gpu_row_says_how_to_repeat_it() -> None:
    options = bench_kernels.arguments([])
    case = kernel_cases.sampling_case(Target("cpu"), 1, 2, 32)
    assert "--backend cpu --threads" in bench_kernels.command(case, options)
    options = bench_kernels.arguments(["--cold", "--refcheck", "--repeats", "3"])
    assert "--repeats 3 --cold --refcheck --op sampling" in bench_kernels.command(case, options)
    on_gpu = replace(case, backend="triton", activations="bf16")
    assert "--backend triton --activations bf16 --repeats 3" in bench_kernels.command(on_gpu, options)


def test_a_gpu_is_timed_by_events_around_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Stream:
        def wait_stream(self, other: object) -> None: ...

    class Graph:
        def replay(self) -> None:
            told.append("replay")

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            told.append("event")

        def synchronize(self) -> None:
            told.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 2.0

    @contextlib.contextmanager
    def block(which: object) -> Iterator[None]:
        told.append("capture" if isinstance(which, Graph) else "beside")
        yield

    fakes = {"Stream": Stream, "CUDAGraph": Graph, "Event": Event, "graph": block, "stream": block}
    for name, fake in {**fakes, "current_stream": Stream}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    machine = gpu_machine.GpuMachine.__new__(gpu_machine.GpuMachine)
    assert machine.seconds_of(lambda: told.append("run"), 2) == [2e-3, 2e-3]
    once = ["event", "replay", "event", "wait"]
    assert told == ["beside", "run", "run", "capture", "run", "replay", *once, *once]
