"""Dockerfile and compose file: paths exist, images are pinned, nothing runs as root or is published beyond loopback."""

from __future__ import annotations

import argparse
import fnmatch
import re
from typing import Any

import deploy_files
import pytest
from deploy_files import DEPLOY, ROOT
from musicgen_serving.cli import ServeCommand
from musicgen_serving.settings import load_settings


def instructions() -> list[tuple[str, str]]:
    """Keyword and rest of each instruction, continued lines joined, comments left out."""
    lines = [line for line in deploy_files.read("Dockerfile").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    found = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(keyword, rest) for keyword, rest in found]


def arguments() -> dict[str, str]:
    return {
        name: value.strip('"')
        for keyword, rest in instructions()
        if keyword == "ARG" and "=" in rest
        for name, _, value in [rest.partition("=")]
    }


def stages() -> dict[str, str]:
    """Base of each stage, with build arguments filled in."""
    found = {}
    for keyword, rest in instructions():
        if keyword == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = re.sub(r"\$\{(\w+)\}", lambda match: arguments()[match[1]], base)
    return found


def is_in_the_context(path: str) -> bool:
    """Whether Dockerfile.dockerignore lets a path through: the last pattern that fits decides."""
    kept = True
    for line in deploy_files.read("Dockerfile.dockerignore").splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        keeps, pattern = pattern.startswith("!"), pattern.removeprefix("!")
        is_it = pattern in ("**", path) or path.startswith(f"{pattern}/")
        anywhere = pattern.startswith("**/") and fnmatch.fnmatch(path.rpartition("/")[2], pattern[3:])
        if is_it or anywhere:
            kept = keeps
    return kept


def copied() -> list[str]:
    """What the build takes from the checkout."""
    return [
        source
        for keyword, rest in instructions()
        if keyword == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    ]


def test_everything_that_is_copied_exists_and_gets_into_the_context() -> None:
    assert len(copied()) > 8
    for source in copied():
        assert (ROOT / source).exists(), source
        assert is_in_the_context(source), source


def test_the_context_has_nothing_else() -> None:
    for path in (".git", "tests", "docs", "benchmarks", "kernels/musicgen_kernels/_cpu_avx2.so", "deploy/kuberay"):
        assert not is_in_the_context(path), path


def test_what_the_package_needs_to_be_built_is_copied() -> None:
    manifest = (ROOT / "MANIFEST.in").read_text()
    named = set(re.findall(r"^(?:graft|recursive-include) (\w+)", manifest, re.MULTILINE))
    named |= {name for line in re.findall(r"^include (.+)$", manifest, re.MULTILINE) for name in line.split()}
    assert named | {"pyproject.toml"} <= set(copied())


def test_bases_are_pinned_and_every_stage_is_known() -> None:
    found = stages()
    for base in found.values():
        assert base in found or re.search(r":\d+\.\d+\.\d+", base), base
    for keyword, rest in instructions():
        for name in re.findall(r"(?:--from=|from=)([\w-]+)", rest) if keyword in ("COPY", "RUN") else []:
            assert name in found


def test_the_builds_switches_are_those_that_setup_reads() -> None:
    setup = (ROOT / "setup.py").read_text()
    switches = set(re.findall(r"MUSICGEN_\w+", deploy_files.read("Dockerfile")))
    assert switches == {"MUSICGEN_KERNELS_BUILD", "MUSICGEN_KERNELS_CUDA", "MUSICGEN_KERNELS_CUDA_ARCHS"}
    for switch in switches:
        assert f'"{switch}"' in setup, switch
    (default,) = re.findall(r'"MUSICGEN_KERNELS_CUDA_ARCHS", "([\d ]+)"', setup)
    assert arguments()["CUDA_ARCHS"] == default


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_each_variant_has_a_stage_that_builds_its_wheel(variant: str) -> None:
    assert stages()[f"wheel-{variant}"] == "build-base"
    assert arguments()["VARIANT"] == "cuda"


def test_the_image_does_not_run_as_root_and_says_whether_it_is_well() -> None:
    last = [item for index, item in enumerate(instructions()) if index >= _start_of_last_stage()]
    users = [rest for keyword, rest in last if keyword == "USER"]
    assert users == ["10001:10001"]
    (check,) = (rest for keyword, rest in last if keyword == "HEALTHCHECK")
    assert "/readyz" in check
    ports = next(rest for keyword, rest in last if keyword == "EXPOSE").split()
    defaults = load_settings({})
    assert ports == [str(defaults.http.port), str(defaults.grpc.port)]


def _start_of_last_stage() -> int:
    return max(index for index, (keyword, _) in enumerate(instructions()) if keyword == "FROM")


def test_dependencies_are_those_that_are_tested() -> None:
    installs = [rest for keyword, rest in instructions() if keyword == "RUN" and "pip install" in rest]
    assert installs
    assert all("constraints.txt" in rest for rest in installs)
    assert "[serve,tracing,redis]" in installs[-1], "what a setting asks for must be in the image"
    constraints = (DEPLOY.parent / "constraints.txt").read_text()
    assert re.search(r"^redis==7\.", constraints, re.MULTILINE), "`limits` does not take 8 yet"
    assert re.search(r"^opentelemetry-exporter-otlp-proto-grpc==", constraints, re.MULTILINE)


def test_the_drain_hook_is_where_the_pods_look_for_it() -> None:
    (target,) = (rest.split()[-1] for keyword, rest in instructions() if "drain_node.py" in rest and keyword == "COPY")
    for name in deploy_files.SERVICES:
        for pool in deploy_files.pools(name).values():
            if pool.name != "head":
                assert pool.ray["lifecycle"]["preStop"]["exec"]["command"][1] == target


def compose() -> dict[str, Any]:
    (document,) = deploy_files.documents("compose.yaml")
    assert isinstance(document, dict)
    return document


def served(command: list[str]) -> dict[str, Any]:
    """What `musicgen serve` makes of a command line."""
    assert command[:2] == ["musicgen", "serve"]
    parser = argparse.ArgumentParser(exit_on_error=False)
    ServeCommand.add_arguments(parser)
    return vars(parser.parse_args(command[2:]))


def test_commands_are_those_that_musicgen_serve_understands() -> None:
    (command,) = (rest for keyword, rest in instructions() if keyword == "CMD")
    assert served(re.findall(r'"([^"]+)"', command))["host"] == "0.0.0.0"
    assert served(compose()["services"]["musicgen"]["command"])["config"] is not None


def test_compose_mounts_what_exists_and_publishes_on_loopback_only() -> None:
    for name, service in compose()["services"].items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose()["volumes"] or (DEPLOY / source).is_file(), source
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert re.search(r":v?\d+\.\d+\.\d+", service["image"]), name
        assert set(service.get("depends_on", {})) <= set(compose()["services"])


def test_compose_starts_the_settings_that_it_mounts() -> None:
    service = compose()["services"]["musicgen"]
    config = str(served(service["command"])["config"])
    (source,) = (volume.split(":")[0] for volume in service["volumes"] if f":{config}" in volume)
    settings = load_settings(DEPLOY / source)
    assert {f"127.0.0.1:{port}:{port}" for port in (settings.http.port, settings.grpc.port)} == set(service["ports"])
    assert settings.http.host == settings.grpc.host == "0.0.0.0"
    assert re.fullmatch(r"redis://(\w+):6379/0", settings.access.limits_storage)[1] in compose()["services"]  # type: ignore[index]
    assert deploy_files.seconds(service["stop_grace_period"]) >= settings.drain_s


def test_prometheus_asks_the_service_and_grafana_asks_prometheus() -> None:
    (prometheus,) = deploy_files.documents("monitoring/prometheus.yaml")
    targets = prometheus["scrape_configs"][0]["static_configs"][0]["targets"]
    assert targets == ["musicgen:8000"]
    mounted = {volume.split(":")[1] for volume in compose()["services"]["prometheus"]["volumes"]}
    assert set(prometheus["rule_files"]) <= mounted
    (source,) = deploy_files.documents("monitoring/grafana/datasource.yaml")
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    (provider,) = deploy_files.documents("monitoring/grafana/dashboards.yaml")
    folder = provider["providers"][0]["options"]["path"]
    mounted = {volume.split(":")[1] for volume in compose()["services"]["grafana"]["volumes"]}
    assert any(path.startswith(f"{folder}/") for path in mounted)
