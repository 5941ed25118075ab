"""Those fields of a RayService that the manifests use, closed: a field that is not here is an error.

Written after KubeRay's API (`ray.io/v1`, KubeRay 1.6 and 1.7). The pods' templates and the Service are checked as
Kubernetes' own kinds.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
BOOLEAN: Schema = {"type": "boolean"}
ANY_OBJECT: Schema = {"type": "object"}
PARAMETERS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}


def closed(required: dict[str, Schema], **optional: Schema) -> Schema:
    properties = {**required, **optional}
    return {
        "type": "object",
        "required": list(required),
        "properties": properties,
        "additionalProperties": False,
    }


REDIS_PASSWORD = closed({"valueFrom": closed({"secretKeyRef": closed({"name": TEXT, "key": TEXT})})})
HEAD = closed({"rayStartParams": PARAMETERS, "template": ANY_OBJECT})
GROUP = closed(
    {
        "groupName": {"type": "string", "pattern": "^[a-z]([a-z0-9-]*[a-z0-9])?$"},
        "replicas": COUNT,
        "minReplicas": COUNT,
        "maxReplicas": COUNT,
        "resources": PARAMETERS,
        "rayStartParams": PARAMETERS,
        "template": ANY_OBJECT,
    }
)
AUTOSCALER = closed(
    {"version": {"enum": ["v1", "v2"]}},
    idleTimeoutSeconds=COUNT,
    resources=ANY_OBJECT,
    securityContext=ANY_OBJECT,
)
CLUSTER = closed(
    {
        "rayVersion": {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
        "headGroupSpec": HEAD,
        "workerGroupSpecs": {"type": "array", "minItems": 1, "items": GROUP},
    },
    enableInTreeAutoscaling=BOOLEAN,
    authOptions=closed({"mode": {"enum": ["token", "disabled"]}}),
    autoscalerOptions=AUTOSCALER,
    gcsFaultToleranceOptions=closed({"redisAddress": TEXT}, redisPassword=REDIS_PASSWORD),
)
UPGRADE = closed({"type": {"enum": ["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]}})
SPEC = closed(
    {"serveConfigV2": TEXT, "rayClusterConfig": CLUSTER},
    serveService=closed({"metadata": ANY_OBJECT, "spec": ANY_OBJECT}),
    upgradeStrategy=UPGRADE,
    rayClusterDeletionDelaySeconds=COUNT,
    excludeHeadPodFromServeSvc=BOOLEAN,
)
RAY_SERVICE = closed(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayService"},
        "metadata": closed({"name": TEXT}, labels=PARAMETERS),
        "spec": SPEC,
    }
)
