"""The Kubernetes objects: valid, and agreeing with each other and with what the application needs."""

from __future__ import annotations

import copy
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import deploy_files
import pytest
import ray_service_schema
import yaml
from deploy_files import SERVICES, Manifest, Need, Pool, of_kind, pools, ray_service, settings_of

jsonschema = pytest.importorskip("jsonschema")
KUBERNETES = "1.32"
PRODUCTION = [(name, pool) for name in SERVICES for pool in pools(name).values()]
POD_IDS = [f"{name}-{pool.name}" for name, pool in PRODUCTION]


def validate(manifest: Manifest) -> None:
    """Against Kubernetes' own schema, unknown fields refused."""
    pytest.importorskip("kubernetes_validate").validate(manifest, KUBERNETES, strict=True)


def pod_of(pool: Pool) -> Manifest:
    metadata = {"name": pool.name, **pool.template["metadata"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pool.pod}


def test_every_yaml_file_parses_and_has_something_in_it() -> None:
    paths = [str(path.relative_to(deploy_files.DEPLOY)) for path in deploy_files.DEPLOY.rglob("*.yaml")]
    assert len(paths) > 15
    for path in paths:
        assert deploy_files.documents(path), path


def test_kubernetes_objects_are_valid() -> None:
    found = [manifest for manifest in deploy_files.manifests() if manifest["kind"] not in deploy_files.CUSTOM_KINDS]
    assert len(found) > 10
    for manifest in found:
        validate(manifest)


@pytest.mark.parametrize("name", SERVICES)
def test_ray_services_are_valid(name: str) -> None:
    jsonschema.Draft202012Validator(ray_service_schema.RAY_SERVICE).validate(ray_service(name))
    validate({"apiVersion": "v1", "kind": "Service", **ray_service(name)["spec"]["serveService"]})


@pytest.mark.parametrize(("name", "pool"), PRODUCTION, ids=POD_IDS)
def test_pods_are_valid(name: str, pool: Pool) -> None:
    validate(pod_of(pool))
    wrong = copy.deepcopy(pod_of(pool))
    wrong["spec"]["containers"][0]["comand"] = ["x"]
    with pytest.raises(Exception, match="comand"):
        validate(wrong)


def packed(needs: list[tuple[Need, int]], offers: dict[str, float], num_pods: int) -> bool:
    """Whether so many replicas of each fit into a pool, placed one by one where there is room."""
    free = [dict(offers) for _ in range(num_pods)]
    for need, num_replicas in needs:
        for _ in range(num_replicas):
            for pod in free:
                if all(pod.get(key, 0.0) + 1e-9 >= amount for key, amount in need.takes.items()):
                    for key, amount in need.takes.items():
                        pod[key] -= amount
                    break
            else:
                return False
    return True


def test_packing_knows_full_from_not_full() -> None:
    need = Need("x", {"CPU": 1.0, "a": 0.6}, 1, 2)
    assert packed([(need, 2)], {"CPU": 2.0, "a": 1.0}, 2)
    assert not packed([(need, 2)], {"CPU": 2.0, "a": 1.0}, 1)
    assert not packed([(need, 1)], {"CPU": 2.0}, 9)


def pool_of(need: Need, found: dict[str, Pool]) -> Pool:
    """The pool that a deployment is bound to by its custom resources; it must be exactly one."""
    custom = {key for key in need.takes if key not in ("CPU", "GPU")}
    assert custom, f"{need.name} may run anywhere, also on a GPU that others need"
    (pool,) = (pool for pool in found.values() if custom <= set(pool.offers))
    return pool


def by_pool() -> Iterator[tuple[Pool, list[Need]]]:
    found = pools("rayservice")
    placed = [(pool_of(need, found).name, need) for need in deploy_files.needs("rayservice")]
    for name, pool in found.items():
        yield pool, [need for where, need in placed if where == name]


def test_every_pool_holds_its_deployments_at_their_least_and_their_most() -> None:
    for pool, needs in by_pool():
        assert bool(needs) == (pool.name != "head"), pool.name
        assert packed([(need, need.min_replicas) for need in needs], pool.offers, pool.min_pods), pool.name
        assert packed([(need, need.max_replicas) for need in needs], pool.offers, pool.max_pods), pool.name


def test_no_pool_has_pods_beyond_what_its_deployments_can_fill() -> None:
    for pool, needs in by_pool():
        if needs:
            most = [(need, need.max_replicas) for need in needs]
            assert not packed(most, pool.offers, pool.max_pods - 1), pool.name


def test_every_pod_of_an_edge_has_one_replica_of_it() -> None:
    needs = {need.name: need for need in deploy_files.needs("rayservice")}
    for name in ("HttpIngress", "GrpcIngress"):
        pool = pool_of(needs[name], pools("rayservice"))
        assert needs[name].min_replicas == needs[name].max_replicas == pool.min_pods == pool.max_pods
        assert not packed([(needs[name], 2)], pool.offers, 1)


def test_all_of_the_small_service_fits_on_its_one_pod() -> None:
    (worker,) = (pool for pool in pools("rayservice-cpu").values() if pool.name != "head")
    needs = [(need, need.max_replicas) for need in deploy_files.needs("rayservice-cpu")]
    assert packed(needs, worker.offers, 1)


@pytest.mark.parametrize(("name", "pool"), PRODUCTION, ids=POD_IDS)
def test_what_ray_is_told_is_what_the_container_has(name: str, pool: Pool) -> None:
    limits = pool.ray["resources"]["limits"]
    if pool.name == "head":
        assert ray_service(name)["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        return
    assert pool.offers["CPU"] == float(limits["cpu"])
    assert pool.offers.get("GPU", 0.0) == float(limits.get("nvidia.com/gpu", 0))
    assert ("cuda" in pool.ray["image"]) == ("GPU" in pool.offers)
    assert pool.min_pods <= pool.max_pods


@pytest.mark.parametrize("name", SERVICES)
def test_rays_version_is_the_one_that_is_tested(name: str) -> None:
    assert ray_service(name)["spec"]["rayClusterConfig"]["rayVersion"] == deploy_files.pinned("ray")


@pytest.mark.parametrize("name", SERVICES)
def test_ports_agree(name: str) -> None:
    settings = settings_of(name)
    assert settings.http.host == settings.grpc.host == "0.0.0.0"
    (port,) = ray_service(name)["spec"]["serveService"]["spec"]["ports"]
    assert port["targetPort"] == "http", "KubeRay selects all workers: the name tells those that listen"
    assert port["port"] == settings.http.port
    listening = set()
    for pool in pools(name).values():
        listens = {found["name"]: found["containerPort"] for found in pool.ray["ports"]}
        listening |= {pool.name} if "http" in listens else set()
        assert listens.get("http", settings.http.port) == settings.http.port
        assert listens["metrics"] == 8080
        assert listens.get("grpc", settings.grpc.port) == settings.grpc.port
        probe = pool.ray.get("readinessProbe", {})
        assert probe.get("httpGet", {"path": "/readyz", "port": "http"}) == {"path": "/readyz", "port": "http"}
        assert probe.get("tcpSocket", {"port": settings.grpc.port}) == {"port": settings.grpc.port}
    assert listening == ({"http"} if name == "rayservice" else {"worker"})


@pytest.mark.parametrize("name", SERVICES)
def test_no_pod_is_asked_for_serves_proxy(name: str) -> None:
    """Without a probe of its own a worker gets KubeRay's, which asks for the proxy: it would never be ready."""
    assert deploy_files.serve_config(name)["proxy_location"] == "Disabled"
    assert ray_service(name)["spec"]["excludeHeadPodFromServeSvc"] is True
    for pool in pools(name).values():
        assert ("readinessProbe" in pool.ray) == (pool.name != "head"), pool.name


def test_an_edge_listens_until_kubernetes_knows_that_it_ends() -> None:
    probe = pools("rayservice")["http"].ray["readinessProbe"]
    assert settings_of("rayservice").http.lame_duck_s > probe["periodSeconds"] * probe["failureThreshold"]


def test_the_edges_are_ready_only_when_requests_can_be_taken() -> None:
    assert "httpGet" in pools("rayservice")["http"].ray["readinessProbe"]
    assert "tcpSocket" in pools("rayservice")["grpc"].ray["readinessProbe"]
    assert settings_of("rayservice").grpc.tls_certificate, "without TLS, Kubernetes' gRPC probe says more"


def test_grpc_has_a_service_that_selects_the_pods_that_listen() -> None:
    for service, name in (("musicgen-grpc", "rayservice"), ("musicgen-cpu-grpc", "rayservice-cpu")):
        spec = of_kind("Service")[service]["spec"]
        (port,) = spec["ports"]
        assert port["targetPort"] == settings_of(name).grpc.port
        for pool in pools(name).values():
            listens = any(found["name"] == "grpc" for found in pool.ray["ports"])
            assert (spec["selector"].items() <= pool.labels.items()) == listens, pool.name


def test_disruption_budgets_leave_room_for_one_pod_to_go() -> None:
    budgets = of_kind("PodDisruptionBudget")
    assert len(budgets) == 3
    for budget in budgets.values():
        labels = budget["spec"]["selector"]["matchLabels"]
        (pool,) = (pool for pool in pools("rayservice").values() if labels.items() <= pool.labels.items())
        assert 1 <= budget["spec"]["minAvailable"] < pool.min_pods


def test_the_network_policy_covers_every_pod_and_opens_only_known_ports() -> None:
    policies = of_kind("NetworkPolicy")
    everyone = policies["musicgen"]["spec"]
    assert set(everyone["policyTypes"]) == {"Ingress", "Egress"}
    settings = settings_of("rayservice")
    for pool in pools("rayservice").values():
        assert everyone["podSelector"]["matchLabels"].items() <= pool.labels.items()
    opened = {
        port["port"]
        for rule in everyone["ingress"]
        for port in rule.get("ports", [])
        if any("namespaceSelector" in peer for peer in rule["from"])
    }
    assert opened == {settings.http.port, settings.grpc.port, 8080, 8265}
    assert all("ports" in rule for rule in everyone["ingress"] if "namespaceSelector" in rule["from"][0])


@pytest.mark.parametrize(("name", "pool"), PRODUCTION, ids=POD_IDS)
def test_volumes_secrets_and_keys_exist(name: str, pool: Pool) -> None:
    secrets = {key: set(found["stringData"]) for key, found in of_kind("Secret").items()}
    volumes = {volume["name"] for volume in pool.pod.get("volumes", [])}
    assert {mount["name"] for mount in pool.ray.get("volumeMounts", [])} == volumes
    for volume in pool.pod.get("volumes", []):
        assert "secret" not in volume or volume["secret"]["secretName"] in secrets
        if "persistentVolumeClaim" in volume:
            claim = of_kind("PersistentVolumeClaim")[volume["persistentVolumeClaim"]["claimName"]]
            assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for variable in pool.ray.get("env", []):
        if "valueFrom" in variable:
            reference = variable["valueFrom"]["secretKeyRef"]
            assert reference["key"] in secrets[reference["name"]]
        else:
            assert "password" not in variable["value"].lower() or "$(REDIS_PASSWORD)" in variable["value"]


@pytest.mark.parametrize(("name", "pool"), PRODUCTION, ids=POD_IDS)
def test_mounted_secrets_are_renewed(name: str, pool: Pool) -> None:
    """Kubernetes never renews what is mounted with `subPath`."""
    secrets = {volume["name"] for volume in pool.pod.get("volumes", []) if "secret" in volume}
    mounts = [mount for mount in pool.ray.get("volumeMounts", []) if mount["name"] in secrets]
    assert not [mount for mount in mounts if {"subPath", "subPathExpr"} & set(mount)]


def test_files_of_the_settings_are_mounted_where_they_are_read() -> None:
    settings, found = settings_of("rayservice"), pools("rayservice")
    secrets = {key: set(secret["stringData"]) for key, secret in of_kind("Secret").items()}
    assert settings.access.tenants_file is not None
    assert settings.grpc.tls_certificate is not None
    assert settings.grpc.tls_key is not None
    for pool, path in (
        ("http", settings.access.tenants_file),
        ("grpc", settings.grpc.tls_certificate),
        ("grpc", settings.grpc.tls_key),
    ):
        volume = found[pool].mounts()[str(path.parent)]
        assert path.name in secrets[volume["secret"]["secretName"]]
        others = [other for other in found.values() if other.name != pool and str(path.parent) in other.mounts()]
        assert not others, "a secret goes only where it is needed"
    assert settings.access.usage_file is not None
    assert "persistentVolumeClaim" in found["http"].mounts()[str(settings.access.usage_file.parent)]
    for pool in ("encoder", "codec", "language-model"):
        assert "/models" in found[pool].mounts()
    assert all(model.checkpoint.startswith("/models/") for model in settings.models)


def test_the_job_fetches_to_where_the_service_looks() -> None:
    spec = of_kind("Job")["musicgen-fetch-model"]["spec"]["template"]["spec"]
    command = spec["containers"][0]["command"]
    (model,) = settings_of("rayservice").models
    assert command[command.index("--local-dir") + 1] == model.checkpoint


def test_example_tenants_are_a_list_that_the_service_accepts(tmp_path: Any) -> None:
    from musicgen_serving.settings import AccessSettings
    from musicgen_serving.tenancy import Tenancy

    path = tmp_path / "tenants.yaml"
    path.write_text(of_kind("Secret")["musicgen-tenants"]["stringData"]["tenants.yaml"])
    assert Tenancy(AccessSettings(tenants_file=path)).settings_of("example").max_concurrent == 8


@pytest.mark.parametrize("name", SERVICES)
def test_nothing_is_cut_that_may_still_take_its_time(name: str) -> None:
    drain_s = settings_of(name).drain_s
    for pool in pools(name).values():
        if pool.name == "head":
            continue
        command = pool.ray["lifecycle"]["preStop"]["exec"]["command"]
        hook_s = float(command[command.index("--timeout-s") + 1])
        assert drain_s <= hook_s < pool.pod["terminationGracePeriodSeconds"]
    if name == "rayservice":
        assert ray_service(name)["spec"]["rayClusterDeletionDelaySeconds"] > drain_s


@pytest.mark.parametrize(("name", "pool"), PRODUCTION, ids=POD_IDS)
def test_pods_have_no_more_rights_than_they_need(name: str, pool: Pool) -> None:
    security = {**pool.pod.get("securityContext", {}), **pool.ray["securityContext"]}
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] == 10001
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    has_autoscaler = pool.name == "head" and ray_service(name)["spec"]["rayClusterConfig"].get("autoscalerOptions")
    assert pool.pod.get("automountServiceAccountToken", True) is bool(has_autoscaler)
    if name == "rayservice":
        assert security["readOnlyRootFilesystem"] is True
        assert "emptyDir" in pool.mounts()["/tmp"]


def test_the_head_survives_and_strangers_do_not_get_in() -> None:
    cluster = ray_service("rayservice")["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    password = cluster["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]
    assert password["key"] in of_kind("Secret")[password["name"]]["stringData"]
    host, _, port = cluster["gcsFaultToleranceOptions"]["redisAddress"].partition(":")
    service = of_kind("Service")[host]["spec"]
    assert service["ports"][0]["port"] == int(port)
    pod = of_kind("StatefulSet")["musicgen-redis"]["spec"]["template"]
    assert service["selector"].items() <= pod["metadata"]["labels"].items()
    assert not settings_of("rayservice").access.open


def test_the_kustomization_has_every_file_and_names_every_image() -> None:
    (kustomization,) = deploy_files.documents("kuberay/kustomization.yaml")
    here = {path.name for path in (deploy_files.DEPLOY / "kuberay").glob("*.yaml")}
    apart = {"rayservice-cpu.yaml", "secrets.example.yaml", "kustomization.yaml"}
    assert {*kustomization["resources"], *apart} == {*here, "../monitoring"}
    (monitoring,) = deploy_files.documents("monitoring/kustomization.yaml")
    assert set(monitoring["resources"]) == {"podmonitor.yaml", "alerts.yaml"}
    used = {pool.ray["image"] for pool in pools("rayservice").values()}
    assert used == {image["name"] for image in kustomization["images"]}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_puts_the_images_in() -> None:
    command = ["kubectl", "kustomize", str(deploy_files.DEPLOY / "kuberay")]
    built = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    images = [line.split()[-1] for line in built.splitlines() if line.strip().startswith(("image:", "- image:"))]
    assert len(images) == len(pools("rayservice")) + 2
    assert not [image for image in images if not image.startswith(("registry.example.com/", "redis:"))]
    assert all(document["metadata"]["namespace"] == "musicgen" for document in yaml.safe_load_all(built))
