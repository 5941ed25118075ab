"""Shapes and constants of a model, read once from a checkpoint and never changed afterwards.

Knows nothing of files or tensors: the package `weights` fills these in.
"""

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
        """The token that fills places without a code, and starts every sequence."""
        return self.codebook_size


@dataclass(frozen=True, slots=True)
class ChromaConfig:
    """The melody features of a prefix-conditioned model. Source: facts of the melody checkpoint's preprocessor."""

    sample_rate: int = 32000
    num_chroma: int = 12
    n_fft: int = 16384
    hop_length: int = 4096
    num_frames: int = 235
    """Length of the prefix; longer melodies are cut, shorter ones repeat."""


@dataclass(frozen=True, slots=True)
class CodecConfig:
    """The EnCodec that turns codes into samples."""

    sample_rate: int
    num_codebooks: int
    """Codebooks of one mono pass; a stereo language model has twice as many."""
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
        """Samples a frame."""
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
        """Frames of `duration_s` seconds, as audiocraft counts them (rounded down)."""
        return int(duration_s * self.frame_rate_hz)


KVDtype = Literal["float32", "bfloat16", "float16", "int8"]
WeightDtype = Literal["float32", "bfloat16", "int8", "int4"]


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The paged keys and values."""

    dtype: KVDtype | None = None
    """None: float32 beside float32 weights, else float16."""
    memory_bytes: int | None = None
    """Budget for the pages; None: `memory_share` of what is free."""
    memory_share: float = 0.25

    def __post_init__(self) -> None:
        if self.memory_bytes is not None and self.memory_bytes <= 0:
            raise InvalidRequestError("a number of bytes > 0", repr(self.memory_bytes), param="memory_bytes")
        if not 0 < self.memory_share <= 1:
            raise InvalidRequestError("a share in (0, 1]", repr(self.memory_share), param="memory_share")


BURST = 1.5
"""Times its share of places a tenant may ask for before it counts as one that floods: requests come in bursts."""


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """How steps are filled."""

    max_requests: int = 32
    """Requests that hold pages at the same time; up to `num_slots` while there are tenants that ask for little."""
    max_rows: int = 64
    """Rows that hold pages at the same time; in proportion more of them where requests are."""
    max_step_rows: int = 64
    """Rows that one step can decode; if fewer than `max_rows`, playback decides who goes first."""
    prefill_tokens: int = 64
    """Prefill positions a step beside running decodes, so that nobody's playback stalls."""
    idle_prefill_tokens: int = 512
    """The same when nothing decodes."""
    max_waiting: int = 1024
    """Requests that may wait; more are refused."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise InvalidRequestError("an integer ≥ 1", repr(getattr(self, name)), param=name)
        if self.max_step_rows < 3:
            raise InvalidRequestError(
                "at least 3, the rows of one request", str(self.max_step_rows), param="max_step_rows"
            )

    @property
    def num_slots(self) -> int:
        """Requests that can be open at the same time: beyond `max_requests` those of tenants that ask for little, so
        that they begin at once while others flood."""
        return int(BURST * self.max_requests)

    @property
    def num_rows(self) -> int:
        """Rows of so many requests."""
        return self.max_rows * self.num_slots // self.max_requests


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything the engine can be told, resolved once."""

    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    weights: WeightDtype | None = None
    """None: float32 on the CPU, bfloat16 on a GPU."""
    num_threads: int | None = None
    """Threads of a step on the CPU; None: as many as torch uses in the thread that makes the engine."""
    cuda_graphs: bool | None = None
    """Whether decode steps run as CUDA graphs, for a few numbers of rows; None: on GPUs. On the CPU they run through
    the same buffers, without graphs: for tests."""

    def resolved(self, device_type: str) -> EngineConfig:
        """With every kind of number chosen."""
        weights: WeightDtype = self.weights or ("float32" if device_type == "cpu" else "bfloat16")
        dtype: KVDtype = self.cache.dtype or ("float32" if weights == "float32" else "float16")
        graphs = device_type == "cuda" if self.cuda_graphs is None else self.cuda_graphs
        return replace(self, weights=weights, cache=replace(self.cache, dtype=dtype), cuda_graphs=graphs)
