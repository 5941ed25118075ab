"""Settings → one Ray Serve application. The only place that sets replica counts, resources and concurrency limits.

`serve deploy` imports `musicgen_serving.app:build_app`.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.schema import LoggingConfig

from musicgen.errors import InvalidRequestError
from musicgen_serving import gatekeeper_replica, ingress, replicas
from musicgen_serving.autoscaling import ByLoad
from musicgen_serving.settings import ModelSettings, ReplicaSettings, ServeSettings, load_settings

HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 2.0, 30.0
LOOK_BACK_S = 11.0
"""Window over which Serve averages loads before the scaling delays apply; default 30 s, and it warns below 10 s."""
NO_UNBOOKED_GPUS = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
"""Ray hides all GPUs from a replica that books none; by default it would show all of them."""
ONE_LOOP = {"RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0", "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}
"""Replicas never block their event loop, so Serve's router and user code can share it, avoiding cross-thread hops."""
LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)
"""For Serve's own loggers, which would otherwise write one line per call between replicas."""
MAX_ONGOING = 10_000
"""Effectively unlimited: Serve would queue silently, whereas the gatekeeper and the engine reject excess load."""


def build_app(values: dict[str, Any]) -> Application:
    """The application for these settings (and those from the environment).

    Raises:
        InvalidRequestError: invalid settings.
    """
    settings = load_settings(values)
    parts = {model.name: _parts(model, settings) for model in settings.models}
    keeper = _deployment(gatekeeper_replica.GatekeeperReplica, "Gatekeeper", ReplicaSettings(), settings)
    gatekeeper = keeper.bind(settings)
    others = []
    if settings.grpc.port:
        grpc = _deployment(ingress.GrpcIngress, "GrpcIngress", settings.grpc.ingress, settings)
        others.append(grpc.bind(settings, parts, gatekeeper))
    http = _deployment(ingress.HttpIngress, "HttpIngress", settings.http.ingress, settings)
    return http.bind(settings, parts, gatekeeper, *others)


def actor_options(how: ReplicaSettings) -> dict[str, Any]:
    """Ray actor options of a replica. An override of a deployment's options must repeat all of them."""
    return {
        "num_cpus": how.num_cpus,
        "num_gpus": how.num_gpus,
        "resources": how.resources,
        "runtime_env": {"env_vars": ONE_LOOP | NO_UNBOOKED_GPUS},
    }


def _parts(model: ModelSettings, settings: ServeSettings) -> tuple[Application, ...]:
    """One model's deployments, in the order of `RayComponents`."""
    limits, watched = settings.limits, settings.observability
    if model.device == "cuda" and not model.language_model.num_gpus:
        raise InvalidRequestError(
            "language_model.num_gpus > 0 with device cuda", "0", "book a GPU, or use device cpu", param=model.name
        )

    def name(part: str) -> str:
        return f"{part}-{model.name}"

    language_model = _deployment(replicas.LanguageModelReplica, name("LanguageModel"), model.language_model, settings)
    codec = _deployment(replicas.CodecReplica, name("CodecDecoder"), model.codec, settings)
    text_encoder = _deployment(replicas.TextEncoderReplica, name("TextEncoder"), model.text_encoder, settings)
    chroma = _deployment(replicas.ChromaReplica, name("ChromaExtractor"), model.chroma, settings)
    return (
        language_model.bind(model, watched),
        codec.bind(model, limits, watched),
        text_encoder.bind(model, watched),
        chroma.bind(model, limits, watched),
    )


def _deployment(cls: type, name: str, how: ReplicaSettings, settings: ServeSettings) -> serve.Deployment:
    """A deployment of `cls`: resources, scaling, health checks, drain."""
    options: dict[str, Any] = {"num_replicas": how.min_replicas}
    if how.max_replicas > how.min_replicas:
        policy = AutoscalingPolicy(  # type: ignore[no-untyped-call]
            policy_function=ByLoad, policy_kwargs={"target_load": how.target_load}
        )
        options = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=how.min_replicas,
                max_replicas=how.max_replicas,
                upscale_delay_s=how.upscale_delay_s,
                downscale_delay_s=how.downscale_delay_s,
                look_back_period_s=LOOK_BACK_S,
                policy=policy,
            )
        }
    deployment = serve.deployment(
        name=name,
        ray_actor_options=actor_options(how),
        max_ongoing_requests=MAX_ONGOING,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=settings.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=LOGGING,
        **options,
    )(cls)
    assert isinstance(deployment, serve.Deployment)
    return deployment
