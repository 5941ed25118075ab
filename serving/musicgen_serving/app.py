"""Settings → one Ray Serve application. The only place that says how many replicas there are and what each may take.

`serve deploy` finds `build_app` by `musicgen_serving.app:build_app`.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.schema import LoggingConfig

from musicgen_serving import gatekeeper_replica, ingress, replicas
from musicgen_serving.autoscaling import ByLoad
from musicgen_serving.settings import ModelSettings, ReplicaSettings, ServeSettings, load_settings

HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 2.0, 30.0
LOOK_BACK_S = 11.0
"""Serve averages loads over this before the delays begin; by default over 30 s. It warns below its own 10 s."""
ONE_LOOP = {"RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0", "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}
"""Nothing blocks a replica's loop, so Serve's part of it needs no thread of its own, and no passing to and fro."""
LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)
"""Of Serve's own part of a replica, which would write a line for each call between two of them."""
MAX_ONGOING = 10_000
"""Serve's own limits would queue silently; the gatekeeper and the engine say no instead."""


def build_app(values: dict[str, Any]) -> Application:
    """The application of these settings (and of the environment's).

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
    """What Ray is told of each replica. Whoever overrides a deployment's options must say all of these."""
    return {
        "num_cpus": how.num_cpus,
        "num_gpus": how.num_gpus,
        "resources": how.resources,
        "runtime_env": {"env_vars": dict(ONE_LOOP)},
    }


def _parts(model: ModelSettings, settings: ServeSettings) -> tuple[Application, ...]:
    """One model's deployments, in the order of `RaySpokes`."""
    limits, watched = settings.limits, settings.observability

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
    """A deployment of `cls`: resources, bounds, health, drain."""
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
