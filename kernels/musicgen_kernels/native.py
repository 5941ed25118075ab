"""Types of the compiled modules: the Python interface shared by all instruction-set levels of the CPU kernels.

Arguments named after tensors are addresses, or 0 for none; strides and sizes are in elements. Nothing is copied, and
the caller must keep the memory alive. Values rejected by the compiled code (indices, lengths) raise
`KernelArgumentError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

Numbers = tuple[int, ...]
"""Addresses and sizes in the order of csrc/bindings/cpu_module.cpp; the empty tuple means none."""


class CpuModel(Protocol):
    """A decoder whose weights the caller keeps alive."""

    def step(
        self,
        tokens: Numbers,
        rows: Numbers,
        pages: tuple[Any, ...],
        cross_rows: Numbers,
        cross_pages: tuple[Any, ...],
        logits: Numbers,
        num_threads: int,
        /,
    ) -> None:
        """One step; see `cpu_step.CpuStep.run`."""

    def write_cross(
        self, states: int, num_tokens: int, rows: Numbers, pages: tuple[Any, ...], num_threads: int, /
    ) -> None:
        """Keys and values of the cross-attention; see `cpu_step.CpuStep.write_cross`."""


class CpuModule(Protocol):
    """One level's module. The operations are those of `musicgen_kernels` of the same names."""

    def Model(
        self,
        sizes: tuple[int, int, int, float],
        tables: Numbers,
        layers: tuple[tuple[tuple[Any, ...], tuple[Any, ...]], ...],
        final_norm: Numbers,
        heads: Numbers,
        /,
    ) -> CpuModel:
        """(dim, heads, FFN width, epsilon), embeddings, (norms, matrices) of each layer, last norm, heads."""

    def delayed_sample_step(self, pointers: Numbers, sizes: Numbers, num_threads: int, /) -> None: ...

    def sample_uniforms(self, seed: int, step: int, codebook: int, num_codes: int, out: int, /) -> None:
        """The uniforms of one draw, [num_codes] float32."""

    def linear(
        self,
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
        self,
        x: int,
        weight: int,
        bias: int,
        residual: int,
        eps: float,
        rows: int,
        dim: int,
        y: int,
        num_threads: int,
        /,
    ) -> None: ...

    def embed_codes(
        self,
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
        self,
        cache: Numbers,
        rows: Numbers,
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
        self,
        cache: Numbers,
        rows: Numbers,
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

    def stream_read_seconds(self, data: int, num_bytes: int, num_threads: int, /) -> float:
        """Seconds to read the memory once (a multiple of 4096 bytes), with all threads together."""

    def fma_per_second(self, num_threads: int, /) -> float:
        """fp32 multiply-adds per second, all threads together."""

    def int8_per_second(self, num_threads: int, /) -> float:
        """8-bit multiply-adds per second, all threads together."""


if TYPE_CHECKING:  # check that each stub has this interface
    from . import _cpu_avx2, _cpu_avx512, _cpu_baseline

    LEVELS: tuple[CpuModule, ...] = (_cpu_baseline, _cpu_avx2, _cpu_avx512)
