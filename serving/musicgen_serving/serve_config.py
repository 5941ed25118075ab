"""Settings → the file that `serve deploy` and KubeRay take. Owns its form; starts nothing.

Everything that a replica must know travels as the arguments of `app.build_app`. Serve's proxies are off: the ingresses
listen themselves.
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
"""Of each custom resource of the HTTP ingress: enough to bind the gatekeeper to the same nodes, too little to count."""


def to_serve_config(settings: ServeSettings) -> dict[str, Any]:
    """What `serve deploy` takes: plain values, only those that differ from the defaults.

    Values that came from the environment are in it too. Whoever keeps a secret there writes the file without it set.

    Raises:
        InvalidRequestError: Ray's own schema does not accept it.
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
    """The same as a file's text."""
    text: str = yaml.safe_dump(config, sort_keys=False, width=110, allow_unicode=True)
    return text


def _args(settings: ServeSettings) -> dict[str, Any]:
    args = settings.model_dump(mode="json", exclude_defaults=True)
    # Whether keys are asked for is never left to a default.
    args.setdefault("access", {})["open"] = settings.access.open
    return args


def _gatekeeper(http_ingress: ReplicaSettings) -> dict[str, Any]:
    """Where the gatekeeper runs: on the nodes of the HTTP ingress, so that its files need to be on those only."""
    if not http_ingress.resources:
        return {}
    resources = dict.fromkeys(http_ingress.resources, GATEKEEPER_SHARE)
    # Serve puts these options in the place of the code's, so all of them stand here.
    options = actor_options(ReplicaSettings(resources=resources))
    return {"deployments": [{"name": "Gatekeeper", "ray_actor_options": options}]}
