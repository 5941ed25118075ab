from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AudioFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    AUDIO_FORMAT_UNSPECIFIED: _ClassVar[AudioFormat]
    AUDIO_FORMAT_F32LE: _ClassVar[AudioFormat]
    AUDIO_FORMAT_PCM16LE: _ClassVar[AudioFormat]
    AUDIO_FORMAT_WAV: _ClassVar[AudioFormat]
    AUDIO_FORMAT_FLAC: _ClassVar[AudioFormat]
    AUDIO_FORMAT_MP3: _ClassVar[AudioFormat]
    AUDIO_FORMAT_OGG: _ClassVar[AudioFormat]
    AUDIO_FORMAT_OPUS: _ClassVar[AudioFormat]

class GenerationState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GENERATION_STATE_UNSPECIFIED: _ClassVar[GenerationState]
    GENERATION_STATE_RUNNING: _ClassVar[GenerationState]
    GENERATION_STATE_FINISHED: _ClassVar[GenerationState]
    GENERATION_STATE_CANCELLED: _ClassVar[GenerationState]
    GENERATION_STATE_FAILED: _ClassVar[GenerationState]
AUDIO_FORMAT_UNSPECIFIED: AudioFormat
AUDIO_FORMAT_F32LE: AudioFormat
AUDIO_FORMAT_PCM16LE: AudioFormat
AUDIO_FORMAT_WAV: AudioFormat
AUDIO_FORMAT_FLAC: AudioFormat
AUDIO_FORMAT_MP3: AudioFormat
AUDIO_FORMAT_OGG: AudioFormat
AUDIO_FORMAT_OPUS: AudioFormat
GENERATION_STATE_UNSPECIFIED: GenerationState
GENERATION_STATE_RUNNING: GenerationState
GENERATION_STATE_FINISHED: GenerationState
GENERATION_STATE_CANCELLED: GenerationState
GENERATION_STATE_FAILED: GenerationState

class SamplingOptions(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "greedy", "guidance_scale", "melody_guidance")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    GREEDY_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    MELODY_GUIDANCE_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    greedy: bool
    guidance_scale: float
    melody_guidance: float
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., greedy: _Optional[bool] = ..., guidance_scale: _Optional[float] = ..., melody_guidance: _Optional[float] = ...) -> None: ...

class GenerationSpec(_message.Message):
    __slots__ = ("model", "prompts", "num_samples", "melody", "prompt_audio", "stems", "duration_s", "seed", "sampling", "extend_stride_s", "first_sample", "loudness")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    NUM_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    MELODY_FIELD_NUMBER: _ClassVar[int]
    PROMPT_AUDIO_FIELD_NUMBER: _ClassVar[int]
    STEMS_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    EXTEND_STRIDE_S_FIELD_NUMBER: _ClassVar[int]
    FIRST_SAMPLE_FIELD_NUMBER: _ClassVar[int]
    LOUDNESS_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompts: _containers.RepeatedScalarFieldContainer[str]
    num_samples: int
    melody: bytes
    prompt_audio: bytes
    stems: bool
    duration_s: float
    seed: int
    sampling: SamplingOptions
    extend_stride_s: float
    first_sample: int
    loudness: float
    def __init__(self, model: _Optional[str] = ..., prompts: _Optional[_Iterable[str]] = ..., num_samples: _Optional[int] = ..., melody: _Optional[bytes] = ..., prompt_audio: _Optional[bytes] = ..., stems: _Optional[bool] = ..., duration_s: _Optional[float] = ..., seed: _Optional[int] = ..., sampling: _Optional[_Union[SamplingOptions, _Mapping[str, object]]] = ..., extend_stride_s: _Optional[float] = ..., first_sample: _Optional[int] = ..., loudness: _Optional[float] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("spec", "request_id", "idempotency_key", "audio_format")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    AUDIO_FORMAT_FIELD_NUMBER: _ClassVar[int]
    spec: GenerationSpec
    request_id: str
    idempotency_key: str
    audio_format: AudioFormat
    def __init__(self, spec: _Optional[_Union[GenerationSpec, _Mapping[str, object]]] = ..., request_id: _Optional[str] = ..., idempotency_key: _Optional[str] = ..., audio_format: _Optional[_Union[AudioFormat, str]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("started", "pieces", "billed_s")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    PIECES_FIELD_NUMBER: _ClassVar[int]
    BILLED_S_FIELD_NUMBER: _ClassVar[int]
    started: GenerationStarted
    pieces: _containers.RepeatedCompositeFieldContainer[GeneratedPiece]
    billed_s: float
    def __init__(self, started: _Optional[_Union[GenerationStarted, _Mapping[str, object]]] = ..., pieces: _Optional[_Iterable[_Union[GeneratedPiece, _Mapping[str, object]]]] = ..., billed_s: _Optional[float] = ...) -> None: ...

class GeneratedPiece(_message.Message):
    __slots__ = ("audio", "report")
    AUDIO_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    audio: bytes
    report: PieceReport
    def __init__(self, audio: _Optional[bytes] = ..., report: _Optional[_Union[PieceReport, _Mapping[str, object]]] = ...) -> None: ...

class StreamGenerateRequest(_message.Message):
    __slots__ = ("spec", "request_id", "idempotency_key", "audio_format")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    AUDIO_FORMAT_FIELD_NUMBER: _ClassVar[int]
    spec: GenerationSpec
    request_id: str
    idempotency_key: str
    audio_format: AudioFormat
    def __init__(self, spec: _Optional[_Union[GenerationSpec, _Mapping[str, object]]] = ..., request_id: _Optional[str] = ..., idempotency_key: _Optional[str] = ..., audio_format: _Optional[_Union[AudioFormat, str]] = ...) -> None: ...

class StreamGenerateResponse(_message.Message):
    __slots__ = ("started", "audio", "finished")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    AUDIO_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    started: GenerationStarted
    audio: AudioChunk
    finished: GenerationFinished
    def __init__(self, started: _Optional[_Union[GenerationStarted, _Mapping[str, object]]] = ..., audio: _Optional[_Union[AudioChunk, _Mapping[str, object]]] = ..., finished: _Optional[_Union[GenerationFinished, _Mapping[str, object]]] = ...) -> None: ...

class GenerationStarted(_message.Message):
    __slots__ = ("request_id", "model", "seeds", "sample_rate", "channels", "num_samples", "quoted_start_s")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_RATE_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    NUM_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    QUOTED_START_S_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    seeds: _containers.RepeatedScalarFieldContainer[int]
    sample_rate: int
    channels: int
    num_samples: int
    quoted_start_s: float
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., seeds: _Optional[_Iterable[int]] = ..., sample_rate: _Optional[int] = ..., channels: _Optional[int] = ..., num_samples: _Optional[int] = ..., quoted_start_s: _Optional[float] = ...) -> None: ...

class AudioChunk(_message.Message):
    __slots__ = ("piece", "sample_offset", "audio")
    PIECE_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_OFFSET_FIELD_NUMBER: _ClassVar[int]
    AUDIO_FIELD_NUMBER: _ClassVar[int]
    piece: int
    sample_offset: int
    audio: bytes
    def __init__(self, piece: _Optional[int] = ..., sample_offset: _Optional[int] = ..., audio: _Optional[bytes] = ...) -> None: ...

class GenerationFinished(_message.Message):
    __slots__ = ("pieces", "billed_s", "state")
    PIECES_FIELD_NUMBER: _ClassVar[int]
    BILLED_S_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    pieces: _containers.RepeatedCompositeFieldContainer[PieceReport]
    billed_s: float
    state: GenerationState
    def __init__(self, pieces: _Optional[_Iterable[_Union[PieceReport, _Mapping[str, object]]]] = ..., billed_s: _Optional[float] = ..., state: _Optional[_Union[GenerationState, str]] = ...) -> None: ...

class PieceReport(_message.Message):
    __slots__ = ("seed", "num_samples", "checksum", "num_frames", "queue_s", "prefill_s", "decode_s", "num_failovers")
    SEED_FIELD_NUMBER: _ClassVar[int]
    NUM_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_S_FIELD_NUMBER: _ClassVar[int]
    NUM_FAILOVERS_FIELD_NUMBER: _ClassVar[int]
    seed: int
    num_samples: int
    checksum: str
    num_frames: int
    queue_s: float
    prefill_s: float
    decode_s: float
    num_failovers: int
    def __init__(self, seed: _Optional[int] = ..., num_samples: _Optional[int] = ..., checksum: _Optional[str] = ..., num_frames: _Optional[int] = ..., queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., decode_s: _Optional[float] = ..., num_failovers: _Optional[int] = ...) -> None: ...

class GenerationStatus(_message.Message):
    __slots__ = ("request_id", "model", "state", "audio_s", "done_s", "age_s", "error")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    AUDIO_S_FIELD_NUMBER: _ClassVar[int]
    DONE_S_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    state: GenerationState
    audio_s: float
    done_s: float
    age_s: float
    error: str
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., state: _Optional[_Union[GenerationState, str]] = ..., audio_s: _Optional[float] = ..., done_s: _Optional[float] = ..., age_s: _Optional[float] = ..., error: _Optional[str] = ...) -> None: ...

class CancelGenerationRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class CancelGenerationResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: GenerationStatus
    def __init__(self, status: _Optional[_Union[GenerationStatus, _Mapping[str, object]]] = ...) -> None: ...

class GetGenerationRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class GetGenerationResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: GenerationStatus
    def __init__(self, status: _Optional[_Union[GenerationStatus, _Mapping[str, object]]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelInfo]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelInfo, _Mapping[str, object]]]] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("name", "license", "sample_rate", "channels", "melody", "max_duration_s", "window_s", "weights")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LICENSE_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_RATE_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    MELODY_FIELD_NUMBER: _ClassVar[int]
    MAX_DURATION_S_FIELD_NUMBER: _ClassVar[int]
    WINDOW_S_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    license: str
    sample_rate: int
    channels: int
    melody: bool
    max_duration_s: float
    window_s: float
    weights: str
    def __init__(self, name: _Optional[str] = ..., license: _Optional[str] = ..., sample_rate: _Optional[int] = ..., channels: _Optional[int] = ..., melody: _Optional[bool] = ..., max_duration_s: _Optional[float] = ..., window_s: _Optional[float] = ..., weights: _Optional[str] = ...) -> None: ...
