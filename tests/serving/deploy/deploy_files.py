"""The files of deploy/, read as what they are, for the tests that hold them to each other and to the code."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from musicgen_serving.app import build_app
from musicgen_serving.settings import ServeSettings, load_settings
from ray.serve._private.build_app import build_app as resolve

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"
SERVICES = ("rayservice", "rayservice-cpu")
CUSTOM_KINDS = ("RayService", "PodMonitor", "PrometheusRule", "Kustomization")

Manifest = dict[str, Any]


def read(path: str) -> str:
    """A file of deploy/."""
    return (DEPLOY / path).read_text()


def documents(path: str) -> list[Any]:
    """The YAML documents of a file of deploy/."""
    return [document for document in yaml.safe_load_all(read(path)) if document is not None]


def manifests() -> Iterator[Manifest]:
    """Everything of deploy/ that is a Kubernetes object."""
    for path in sorted(DEPLOY.rglob("*.yaml")):
        for document in documents(str(path.relative_to(DEPLOY))):
            if isinstance(document, dict) and "apiVersion" in document and "kind" in document:
                yield document


def of_kind(kind: str) -> dict[str, Manifest]:
    """Objects of one kind, by name."""
    return {found["metadata"]["name"]: found for found in manifests() if found["kind"] == kind}


def ray_service(name: str) -> Manifest:
    (found,) = (found for found in documents(f"kuberay/{name}.yaml") if found["kind"] == "RayService")
    assert isinstance(found, dict)
    return found


def serve_config(name: str) -> Manifest:
    """What KubeRay hands to Serve."""
    config = yaml.safe_load(ray_service(name)["spec"]["serveConfigV2"])
    assert isinstance(config, dict)
    return config


def settings_of(name: str) -> ServeSettings:
    """The settings with which KubeRay starts the service."""
    return load_settings(serve_config(name)["applications"][0]["args"])


@dataclass(frozen=True, slots=True)
class Pool:
    """A group of pods of a RayService. The head is one that offers nothing."""

    name: str
    template: Manifest
    offers: dict[str, float]
    min_pods: int
    max_pods: int

    @property
    def pod(self) -> Manifest:
        """The pods' spec."""
        spec = self.template["spec"]
        assert isinstance(spec, dict)
        return spec

    @property
    def ray(self) -> Manifest:
        """The container in which Ray runs: the first."""
        container = self.pod["containers"][0]
        assert isinstance(container, dict)
        return container

    @property
    def labels(self) -> dict[str, str]:
        """Those of the template, and those that KubeRay adds."""
        added = {"ray.io/group": self.name, "ray.io/node-type": "head" if self.name == "head" else "worker"}
        return {**added, **self.template["metadata"]["labels"]}

    def mounts(self) -> dict[str, Manifest]:
        """The volume at each path."""
        volumes = {volume["name"]: volume for volume in self.pod.get("volumes", [])}
        return {mount["mountPath"]: volumes[mount["name"]] for mount in self.ray.get("volumeMounts", [])}


def pools(name: str) -> dict[str, Pool]:
    """The head and the groups of workers of a RayService."""
    cluster = ray_service(name)["spec"]["rayClusterConfig"]
    found = {"head": Pool("head", cluster["headGroupSpec"]["template"], {}, 1, 1)}
    for group in cluster["workerGroupSpecs"]:
        offers = {key: float(value) for key, value in group["resources"].items()}
        found[group["groupName"]] = Pool(
            group["groupName"], group["template"], offers, group["minReplicas"], group["maxReplicas"]
        )
    return found


@dataclass(frozen=True, slots=True)
class Need:
    """What a replica of a deployment takes, under Ray's names, and how many replicas there are."""

    name: str
    takes: dict[str, float]
    min_replicas: int
    max_replicas: int


@cache
def needs(name: str) -> tuple[Need, ...]:
    """Every deployment of the application that is really built, with the overrides of the file."""
    application = serve_config(name)["applications"][0]
    built = resolve(build_app(application["args"]), name="musicgen", make_deployment_handle=lambda *_, **__: None)
    overrides = {found["name"]: found["ray_actor_options"] for found in application.get("deployments", [])}
    assert set(overrides) <= {deployment.name for deployment in built.deployments}
    found = []
    for deployment in built.deployments:
        options = overrides.get(deployment.name, deployment.ray_actor_options)
        takes = {"CPU": options["num_cpus"], "GPU": options["num_gpus"], **options["resources"]}
        scaling = deployment._deployment_config.autoscaling_config
        least = deployment.num_replicas if scaling is None else scaling.min_replicas
        most = deployment.num_replicas if scaling is None else scaling.max_replicas
        found.append(Need(deployment.name, {key: value for key, value in takes.items() if value}, least, most))
    return tuple(found)


def module(path: str) -> ModuleType:
    """A script of deploy/ as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, DEPLOY / path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def seconds(text: str) -> float:
    """A duration such as `21m` or `1m30s`."""
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(float(amount) * units[unit] for amount, unit in re.findall(r"([\d.]+)([hms])", text))


def pinned(package: str) -> str:
    """The version in constraints.txt."""
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]
