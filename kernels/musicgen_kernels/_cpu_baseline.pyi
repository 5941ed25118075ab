# What csrc/bindings/cpu_module.cpp offers, the same for every level; `native.CpuModule` says what the arguments mean.
from typing import Any

class Model:
    def __init__(
        self,
        sizes: tuple[int, int, int, float],
        tables: tuple[int, ...],
        layers: tuple[tuple[tuple[Any, ...], tuple[Any, ...]], ...],
        final_norm: tuple[int, ...],
        heads: tuple[int, ...],
        /,
    ) -> None: ...
    def step(
        self,
        tokens: tuple[int, ...],
        rows: tuple[int, ...],
        pages: tuple[Any, ...],
        cross_rows: tuple[int, ...],
        cross_pages: tuple[Any, ...],
        logits: tuple[int, ...],
        num_threads: int,
        /,
    ) -> None: ...
    def write_cross(
        self, states: int, num_tokens: int, rows: tuple[int, ...], pages: tuple[Any, ...], num_threads: int, /
    ) -> None: ...

def delayed_sample_step(pointers: tuple[int, ...], sizes: tuple[int, ...], num_threads: int, /) -> None: ...
def sample_uniforms(seed: int, step: int, codebook: int, num_codes: int, out: int, /) -> None: ...
def linear(
    data: int,
    scales_offset: int,
    kind: int,
    n: int,
    k: int,
    group: int,
    x: int,
    bias: int,
    residual: int,
    y: int,
    rows: int,
    gelu: bool,
    num_threads: int,
    /,
) -> None: ...
def layer_norm(
    x: int, weight: int, bias: int, residual: int, eps: float, rows: int, dim: int, y: int, num_threads: int, /
) -> None: ...
def embed_codes(
    tables: int,
    kind: int,
    num_codebooks: int,
    num_codes: int,
    dim: int,
    sinusoids: int,
    max_positions: int,
    codes: int,
    positions: int,
    rows: int,
    y: int,
    num_threads: int,
    /,
) -> None: ...
def append_paged_kv(
    cache: tuple[int, ...],
    rows: tuple[int, ...],
    k: int,
    k_stride: int,
    k_head_stride: int,
    v: int,
    v_stride: int,
    v_head_stride: int,
    num_tokens: int,
    num_threads: int,
    /,
) -> None: ...
def paged_attention(
    cache: tuple[int, ...],
    rows: tuple[int, ...],
    causal: bool,
    q: int,
    q_stride: int,
    q_head_stride: int,
    scale: float,
    out: int,
    num_tokens: int,
    num_threads: int,
    /,
) -> None: ...
def stream_read_seconds(data: int, num_bytes: int, num_threads: int, /) -> float: ...
def fma_per_second(num_threads: int, /) -> float: ...
def int8_per_second(num_threads: int, /) -> float: ...
