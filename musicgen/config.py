"""Configuration of models (read from a checkpoint by the package `weights`) and of the engine. Immutable."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from musicgen.delay import DelayPattern
from musicgen.errors import InvalidRequestError

PadMode = Literal["constant", "reflect", "replicate"]


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The language model: a decoder transformer over K codebooks."""

    num_layers: int
    dim: int
    num_heads: int
    ffn_dim: int
    num_codebooks: int
    codebook_size: int
    cross_attention: bool
    """True: text through cross-attention (small, medium, large). False: chroma and text as a prefix (melody)."""

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def special_token(self) -> int:
        """The token at positions without a code and at the start of every sequence."""
        return self.codebook_size


@dataclass(frozen=True, slots=True)
class ChromaConfig:
    """The melody features of a prefix-conditioned model. Source: facts of the melody checkpoint's preprocessor."""

    sample_rate: int = 32000
    num_chroma: int = 12
    n_fft: int = 16384
    hop_length: int = 4096
    num_frames: int = 235
    """Length of the prefix; longer melodies are truncated, shorter ones repeated."""


@dataclass(frozen=True, slots=True)
class CodecConfig:
    """The EnCodec that turns codes into samples."""

    sample_rate: int
    num_codebooks: int
    """Codebooks per channel; a stereo language model has twice as many."""
    codebook_size: int
    codebook_dim: int
    hidden_size: int
    num_filters: int
    upsampling_ratios: tuple[int, ...]
    num_residual_layers: int
    num_lstm_layers: int
    kernel_size: int
    last_kernel_size: int
    residual_kernel_size: int
    dilation_growth_rate: int
    compress: int
    conv_shortcut: bool
    pad_mode: PadMode

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        hop = 1
        for ratio in self.upsampling_ratios:
            hop *= ratio
        return hop

    @property
    def frame_rate_hz(self) -> float:
        return self.sample_rate / self.hop_length


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One MusicGen model: language model, codec, conditioning."""

    name: str
    decoder: DecoderConfig
    codec: CodecConfig
    text_dim: int
    chroma: ChromaConfig | None
    audio_channels: int
    license: str
    max_duration_s: float = 30.0

    @property
    def delay_pattern(self) -> DelayPattern:
        return DelayPattern.for_codebooks(self.decoder.num_codebooks, self.audio_channels)

    @property
    def frame_rate_hz(self) -> float:
        return self.codec.frame_rate_hz

    @property
    def sample_rate(self) -> int:
        return self.codec.sample_rate

    def num_frames(self, duration_s: float) -> int:
        """Frames in `duration_s` seconds, rounded down as in audiocraft."""
        return int(duration_s * self.frame_rate_hz)


KVDtype = Literal["float32", "bfloat16", "float16", "int8"]
WeightDtype = Literal["float32", "bfloat16", "int8", "int4"]


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The paged KV cache."""

    dtype: KVDtype | None = None
    """None: float32 with float32 weights, else float16."""
    memory_bytes: int | None = None
    """Memory budget for the pages; None: `memory_share` of the free memory."""
    memory_share: float = 0.25

    def __post_init__(self) -> None:
        if self.memory_bytes is not None and self.memory_bytes <= 0:
            raise InvalidRequestError("a number of bytes > 0", repr(self.memory_bytes), param="memory_bytes")
        if not 0 < self.memory_share <= 1:
            raise InvalidRequestError("a share in (0, 1]", repr(self.memory_share), param="memory_share")


BURST = 1.5
"""A tenant's demand (running plus waiting) may reach this multiple of its share of slots before the tenant counts as
over its share."""


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of admission and batching."""

    max_requests: int = 32
    """Maximum running requests; up to `num_slots` for tenants within their share while others are over theirs."""
    max_rows: int = 64
    """Maximum running rows; scaled up with `num_slots / max_requests`."""
    max_step_rows: int = 64
    """Maximum rows decoded per step; if below `max_rows`, rows are ordered by playback deadline."""
    prefill_tokens: int | None = None
    """Prefill token budget of a step that also decodes; None: 64 on the CPU, 256 on a GPU."""
    idle_prefill_tokens: int | None = None
    """Prefill token budget of a step that does not decode; None: eight times `prefill_tokens`."""
    max_waiting: int = 1024
    """Maximum length of the waiting queue; further requests are rejected."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidRequestError("an integer ≥ 1", repr(value), param=name)
        if self.max_step_rows < 3:
            raise InvalidRequestError(
                "at least 3, the rows of one request", str(self.max_step_rows), param="max_step_rows"
            )

    def resolved(self, device_type: str) -> SchedulerConfig:
        """A copy with the token budgets chosen."""
        budget = self.prefill_tokens or (64 if device_type == "cpu" else 256)
        return replace(self, prefill_tokens=budget, idle_prefill_tokens=self.idle_prefill_tokens or 8 * budget)

    @property
    def num_slots(self) -> int:
        """Maximum open requests. Slots beyond `max_requests` are reserved for tenants within their share, whose
        requests then start at once while other tenants are over theirs."""
        return int(BURST * self.max_requests)

    @property
    def num_rows(self) -> int:
        """Maximum rows of `num_slots` requests."""
        return self.max_rows * self.num_slots // self.max_requests


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Engine configuration."""

    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    weights: WeightDtype | None = None
    """None: float32 on the CPU, bfloat16 on a GPU."""
    num_threads: int | None = None
    """CPU threads per step; None: torch's number in the thread that creates the engine."""
    cuda_graphs: bool | None = None
    """Whether decode steps run as CUDA graphs, captured for a few batch sizes; None: on GPUs only. On the CPU, True
    uses the same buffers without graphs, for tests."""

    def resolved(self, device_type: str) -> EngineConfig:
        """A copy with everything chosen that depends on the device."""
        weights: WeightDtype = self.weights or ("float32" if device_type == "cpu" else "bfloat16")
        dtype: KVDtype = self.cache.dtype or ("float32" if weights == "float32" else "float16")
        graphs = device_type == "cuda" if self.cuda_graphs is None else self.cuda_graphs
        cache, scheduler = replace(self.cache, dtype=dtype), self.scheduler.resolved(device_type)
        return replace(self, cache=cache, scheduler=scheduler, weights=weights, cuda_graphs=graphs)
