"""Settings → the config file of `serve deploy` and KubeRay. Starts nothing.

All settings are passed as arguments of `app.build_app`. Serve's proxies are disabled: the ingresses open their own
ports.
"""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from musicgen.errors import InvalidRequestError
from musicgen_serving.app import actor_options
from musicgen_serving.process import APP_NAME
from musicgen_serving.settings import ReplicaSettings, ServeSettings

IMPORT_PATH = "musicgen_serving.app:build_app"
GATEKEEPER_SHARE = 0.001
"""Amount of each of the HTTP ingress's custom resources: pins the gatekeeper to the same nodes at negligible cost."""


def to_serve_config(settings: ServeSettings) -> dict[str, Any]:
    """The `serve deploy` config: plain values that differ from the defaults.

    Includes values from environment variables. If they hold secrets, unset them before writing the file.

    Raises:
        InvalidRequestError: rejected by Ray's schema.
    """
    config: dict[str, Any] = {
        "proxy_location": "Disabled",
        "applications": [
            {
                "name": APP_NAME,
                "route_prefix": None,
                "import_path": IMPORT_PATH,
                "args": _args(settings),
                **_gatekeeper(settings.http.ingress),
            }
        ],
    }
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InvalidRequestError("settings that Ray Serve accepts", problems, param="config") from error
    return config


def to_yaml(config: dict[str, Any]) -> str:
    """The config as YAML text."""
    text: str = yaml.safe_dump(config, sort_keys=False, width=110, allow_unicode=True)
    return text


def _args(settings: ServeSettings) -> dict[str, Any]:
    args = settings.model_dump(mode="json", exclude_defaults=True)
    # Always explicit: whether API keys are required must not depend on a default.
    args.setdefault("access", {})["open"] = settings.access.open
    return args


def _gatekeeper(http_ingress: ReplicaSettings) -> dict[str, Any]:
    """Pins the gatekeeper to the nodes of the HTTP ingress, so that its files are only needed there."""
    if not http_ingress.resources:
        return {}
    resources = dict.fromkeys(http_ingress.resources, GATEKEEPER_SHARE)
    # Serve replaces the options set in code with these, so all of them must be repeated.
    options = actor_options(ReplicaSettings(resources=resources))
    return {"deployments": [{"name": "Gatekeeper", "ray_actor_options": options}]}
