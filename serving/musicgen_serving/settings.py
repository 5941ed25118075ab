"""Everything the service can be told: one typed tree, from a file and the environment. Unknown keys are errors.

Owns names, defaults and bounds. Knows nothing of Ray. `MUSICGEN_LIMITS__MAX_DURATION_S=60` overrides
`limits.max_duration_s`.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from musicgen.config import KVDtype, WeightDtype
from musicgen.errors import InvalidRequestError

ENV_PREFIX = "MUSICGEN_"
_NO_SETTING = re.compile(r"(?:API_KEY|BENCHMARK_RUN|DEBUG|DELAY_POINTS|KERNELS_\w+)")
"""The project's other variables."""
_OF_KUBERNETES = re.compile(r"\w+_(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT_\d+_(?:TCP|UDP|SCTP)(?:_\w+)?)")
"""What every pod gets for a Service called `musicgen-…`; and `…_PORT`, whose value is an address."""

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ReplicaSettings(_Section):
    """How many replicas a deployment has and what each takes."""

    min_replicas: Count = 1
    max_replicas: Count = 1
    num_cpus: float = Field(0.1, ge=0, description="CPUs reserved in Ray's scheduler; does not limit threads")
    num_gpus: float = Field(
        0.0,
        ge=0,
        description="GPUs booked in Ray, may be a fraction; without any, the replica runs on the CPU. "
        "`musicgen serve` shares the GPUs of its machine between all models if no part books any",
    )
    resources: dict[str, float] = Field(
        default_factory=dict, description="custom Ray resources, to select a pool of nodes"
    )
    target_load: Positive = Field(1.0, description="autoscaling target load per replica, in the deployment's unit")
    upscale_delay_s: float = Field(5.0, ge=0, description="how long load must stay above target before scaling up")
    downscale_delay_s: float = Field(
        120.0, ge=0, description="how long load must stay below target before scaling down"
    )

    @model_validator(mode="after")
    def _ordered(self) -> ReplicaSettings:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"expected max_replicas ≥ min_replicas ({self.min_replicas}), got {self.max_replicas}")
        return self


class LanguageModelReplicas(ReplicaSettings):
    """Load: decode frames, queued and running."""

    target_load: Positive = 12000.0


class CodecReplicas(ReplicaSettings):
    """Load: decode calls in flight."""

    target_load: Positive = 8.0


class EncoderReplicas(ReplicaSettings):
    """Load: calls queued and in flight."""

    target_load: Positive = 8.0


class ModelSettings(_Section):
    """One model and the deployments that serve it."""

    name: str = Field("demo", description="name used in requests")
    source: str | None = Field(
        None,
        description="checkpoint: short name or repository id, each with an optional `@revision`, or local folder; "
        "default: `name`",
    )
    device: str | None = Field(
        None, description="torch device: cpu or cuda; default: the GPU that the replica books, else the CPU"
    )
    weights: WeightDtype | None = None
    kv_dtype: KVDtype | None = None
    kv_memory_bytes: int | None = Field(None, ge=1, description="KV-cache budget per replica")
    kv_memory_share: float = Field(
        0.25,
        gt=0,
        le=1,
        description="KV-cache budget as a fraction of free memory at startup; ignored if kv_memory_bytes is set",
    )
    num_threads: int | None = Field(None, ge=1, description="CPU threads per engine step; default: all cores but one")
    max_requests: Count = Field(
        32, description="maximum pieces decoded concurrently; up to 1.5 × this while one tenant exceeds its share"
    )
    max_step_rows: int = Field(64, ge=3)
    prefill_tokens: int | None = Field(
        None,
        ge=1,
        description="prefill positions computed beside decoding in one step, eight times as many without; "
        "default: 64 on the CPU, 256 on a GPU",
    )
    max_waiting: Count = Field(256, description="maximum queued pieces per replica")
    language_model: LanguageModelReplicas = LanguageModelReplicas()
    codec: CodecReplicas = CodecReplicas()
    text_encoder: EncoderReplicas = EncoderReplicas()
    chroma: EncoderReplicas = EncoderReplicas()

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
            raise ValueError(f"expected 1 to 63 letters, digits, '.', '_' or '-', got {name!r}")
        return name

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str | None) -> str | None:
        if device not in (None, "cpu", "cuda"):
            hint = ": Ray assigns GPUs by num_gpus, from those in CUDA_VISIBLE_DEVICES" if ":" in device else ""
            raise ValueError(f"expected cpu or cuda, got {device!r}{hint}")
        return device

    def device_of(self, part: ReplicaSettings) -> str | None:
        """The torch device of one part: the CPU if it books no GPU."""
        return "cpu" if self.device == "cuda" and not part.num_gpus else self.device

    @property
    def checkpoint(self) -> str:
        return self.source or self.name


class EdgeSettings(_Section):
    """What both protocols have."""

    host: str = "127.0.0.1"
    ingress: ReplicaSettings = ReplicaSettings()
    tls_certificate: Path | None = Field(
        None, description="PEM certificate chain; enables TLS together with tls_key; reloaded on change"
    )
    tls_key: Path | None = Field(None, description="PEM, without a password; reloaded on change")
    lame_duck_s: float = Field(
        0.0, ge=0, description="how long a terminating replica keeps listening while it reports not ready"
    )

    @model_validator(mode="after")
    def _pair(self) -> EdgeSettings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("expected tls_certificate and tls_key together, got one of them")
        return self


class HttpSettings(EdgeSettings):
    port: int = Field(8000, ge=1, le=65535)
    max_connections: Count = Field(1000, description="maximum concurrent connections per replica; more are refused")
    cors_origins: list[str] = Field(
        default_factory=list, description="allowed CORS origins, e.g. https://app.example, or * for any"
    )

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            if not re.fullmatch(r"\*|https?://[^/\s]+", origin):
                raise ValueError(f"expected scheme://host, with a port if it has one, without a path; got {origin!r}")
        return origins


class GrpcSettings(EdgeSettings):
    port: int = Field(9000, ge=0, le=65535, description="0 disables gRPC")
    client_ca: Path | None = Field(
        None, description="PEM; clients must present a certificate signed by this CA; reloaded on change"
    )
    keepalive_s: Positive = 30.0
    max_concurrent_calls: Count = Field(1000, description="maximum concurrent calls per replica; more are refused")

    @model_validator(mode="after")
    def _whole(self) -> GrpcSettings:
        if self.client_ca is not None and self.tls_certificate is None:
            raise ValueError("expected tls_certificate and tls_key with client_ca, got client_ca alone")
        return self


class LimitSettings(_Section):
    """What one request may ask for."""

    max_duration_s: Positive = 120.0
    max_pieces: Count = 8
    max_prompt_chars: Count = 2000
    max_file_bytes: Count = 20 * 2**20
    max_recording_s: Positive = Field(600.0, description="maximum length of a melody or prompt recording")
    max_answer_s: Positive = Field(480.0, description="maximum total seconds of audio in one non-streaming response")
    edge_bytes: Count = Field(2**30, description="bytes of uploads and buffered responses an ingress replica may hold")
    reader_stall_s: Positive = Field(
        30.0, description="a client that neither sends nor reads for this long is disconnected"
    )


class AdmissionSettings(_Section):
    """When the service as a whole says no."""

    max_wait_s: Positive = Field(
        20.0, description="requests with a longer estimated queue time are rejected immediately"
    )
    initial_speed: Positive = Field(
        1.0, description="seconds of audio per second assumed for one language-model replica until measured"
    )


class TenantSettings(_Section):
    """One tenant. None: no limit."""

    name: str
    key_sha256: list[str] = Field(default_factory=list, description="SHA-256, in hex, of each of its API keys")
    tenant_class: str = Field("default", description="value of the `tenant_class` metric label")
    weight: Positive = Field(1.0, description="fair-share weight, relative to other tenants")
    priority: int = Field(0, description="lower values are served first, regardless of weight")
    max_concurrent: int | None = Field(None, ge=1, description="maximum concurrent requests")
    requests_per_minute: int | None = Field(None, ge=1)
    audio_s_per_minute: int | None = Field(None, ge=1)
    audio_s_per_day: int | None = Field(None, ge=1)
    max_duration_s: Positive | None = Field(
        None, description="maximum length of a piece; capped by `limits.max_duration_s`"
    )
    models: list[str] | None = Field(None, description="models the tenant may use; default: all")

    @field_validator("key_sha256")
    @classmethod
    def _hashes(cls, hashes: list[str]) -> list[str]:
        for value in hashes:
            if not re.fullmatch(r"[0-9a-f]{64}", value):
                raise ValueError("expected 64 lower-case hex digits; `musicgen hash-key` prints them")
        return hashes


class AccessSettings(_Section):
    """Who may use the service."""

    open: bool = Field(False, description="no API keys: every caller is the tenant `anonymous`; for local use only")
    anonymous: TenantSettings = TenantSettings(name="anonymous")
    tenants: list[TenantSettings] = Field(default_factory=list)
    tenants_file: Path | None = Field(
        None, description="YAML list of tenants, in addition to `tenants`; reloaded on change"
    )
    limits_storage: str = Field(
        "memory://", description="quota storage; redis://host:6379 persists it and can be shared between services"
    )
    usage_file: Path | None = Field(None, description="usage log: one JSON line per finished request")

    @model_validator(mode="after")
    def _usable(self) -> AccessSettings:
        if not self.open and not self.tenants and self.tenants_file is None:
            raise ValueError("expected tenants, a tenants_file or open: true, got none: nobody could use the service")
        names = [tenant.name for tenant in self.tenants]
        if len(set(names)) != len(names):
            raise ValueError(f"expected different names of tenants, got {sorted(names)}")
        return self


class FailoverSettings(_Section):
    """How long a silent replica is believed to live, and how often another is tried."""

    first_answer_s: Positive = Field(5.0, description="timeout for a language-model replica to accept a request")
    silence_s: Positive = Field(5.0, description="heartbeat timeout of a replica that is processing a request")
    call_s: Positive = Field(60.0, description="timeout of an encoder or codec call")
    max_attempts: Count = Field(8, description="attempts without progress before a request fails")
    backoff_s: Positive = Field(0.1, description="initial retry backoff; doubled after each attempt")
    max_backoff_s: Positive = 5.0
    lease_s: Positive = Field(
        15.0, description="a language-model replica drops a request whose lease was not renewed for this long"
    )
    edge_silence_s: Positive = Field(
        30.0, description="requests of an ingress that has not reported for this long are cancelled"
    )


class ObservabilitySettings(_Section):
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_prompts: bool = Field(False, description="include prompts in the log")
    otlp_endpoint: str | None = Field(None, description="endpoint for OpenTelemetry spans; needs the extra `tracing`")
    player_buffer_s: float = Field(0.5, ge=0, description="playback buffer of the simulated player")


class ServeSettings(BaseSettings):
    """The whole service."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
    )

    models: list[ModelSettings] = Field(default_factory=lambda: [ModelSettings()], min_length=1)
    http: HttpSettings = HttpSettings()
    grpc: GrpcSettings = GrpcSettings()
    limits: LimitSettings = LimitSettings()
    admission: AdmissionSettings = AdmissionSettings()
    access: AccessSettings = AccessSettings(open=True)
    failover: FailoverSettings = FailoverSettings()
    observability: ObservabilitySettings = ObservabilitySettings()
    ray_address: str | None = Field(None, description="address of an existing Ray cluster; default: start a local one")

    @model_validator(mode="after")
    def _different(self) -> ServeSettings:
        names = [model.name for model in self.models]
        if len(set(names)) != len(names):
            raise ValueError(f"expected different names of models, got {sorted(names)}")
        return self

    @model_validator(mode="after")
    def _own_ports(self) -> ServeSettings:
        if self.http.port == self.grpc.port:  # the ingresses share ports between replicas, so both could open it
            raise ValueError(f"expected different ports for http and grpc, got {self.http.port} for both")
        return self

    @property
    def drain_s(self) -> float:
        """Seconds that a replica may take to finish what it has: the longest piece at a tenth of real time's speed."""
        return 60.0 + 10 * self.limits.max_duration_s

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment goes before what a file says."""
        return env_settings, init_settings


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that a mapping has twice, of which YAML's loaders keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_settings(path: Path) -> dict[str, Any]:
    """What a YAML file says, unchecked.

    Raises:
        InvalidRequestError: no such file, not YAML, a key twice in a mapping, or no mapping.
    """
    try:
        values = yaml.load(path.read_text(), _UniqueKeys) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        # From None, and the place only: YAML's own words show the lines around the problem, and what stands there.
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "strerror", None) or (f"line {mark.line + 1}" if mark else type(error).__name__)
        if isinstance(error, yaml.constructor.ConstructorError) and str(error.problem).startswith("duplicate key"):
            reason += f": {error.problem}"
        raise InvalidRequestError("a readable YAML file", f"{path} ({reason})", param="config") from None
    if not isinstance(values, dict):
        raise InvalidRequestError("a mapping of settings", type(values).__name__, param="config")
    return values


def load_settings(source: Path | dict[str, Any] | None = None) -> ServeSettings:
    """Settings from a YAML file, or values, and the environment.

    Raises:
        InvalidRequestError: an unknown key or a value out of its range; it names each, and shows no value.
    """
    values = read_settings(source) if isinstance(source, Path) else source or {}
    _check_environment()
    try:
        return ServeSettings(**values)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors())
    except SettingsError as error:
        problems = f'{error}: in variables, lists and sections are JSON, such as ["a", "b"]'
    # Outside of the handlers, without a cause: it would print the values, and someone may have pasted a key.
    raise InvalidRequestError("valid settings", problems, "see `musicgen serve --print-config`", param="config")


def _check_environment() -> None:
    """Raises: InvalidRequestError: a variable that looks like a setting and is none, which would be ignored."""
    for name, value in os.environ.items():
        rest = name.upper().removeprefix(ENV_PREFIX)
        if rest == name.upper() or rest.partition("__")[0].lower() in ServeSettings.model_fields:
            continue
        if _NO_SETTING.fullmatch(rest) or _OF_KUBERNETES.fullmatch(rest):
            continue
        if rest.endswith("_PORT") and "://" in value:
            continue
        sections = [section.upper() for section in ServeSettings.model_fields]
        near = difflib.get_close_matches(rest.partition("__")[0], sections, n=1, cutoff=0.0)[0]
        expected = f"{ENV_PREFIX}SECTION__NAME with a section of the settings"
        hint = f"do you mean {ENV_PREFIX}{near}__…? see `musicgen serve --print-config`"
        raise InvalidRequestError(expected, name, hint, param="environment")
