"""Settings as the file of `serve deploy`: nothing is lost on the way, and Ray's schema takes it."""

from __future__ import annotations

from typing import Any

import deploy_files
import pytest
import yaml
from musicgen_serving import app, serve_config
from musicgen_serving.gatekeeper_replica import GatekeeperReplica
from musicgen_serving.serve_config import to_serve_config, to_yaml
from musicgen_serving.settings import ReplicaSettings, load_settings
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from musicgen.errors import InvalidRequestError

CASES: tuple[dict[str, Any], ...] = (
    {},
    {"access": {"open": True}},
    {"access": {"open": False, "tenants_file": "/t.yaml"}},
    {"access": {"open": False, "tenants": [{"name": "a", "key_sha256": ["0" * 64], "models": ["x"], "weight": 2}]}},
    {"models": [{"name": "a", "weights": "int8"}, {"name": "b", "codec": {"max_replicas": 3}}], "grpc": {"port": 0}},
    {"http": {"host": "::", "port": 1}, "limits": {"max_duration_s": 30.5}, "observability": {"log_level": "DEBUG"}},
)


@pytest.mark.parametrize("values", CASES)
def test_the_builders_arguments_give_the_same_settings_again(values: dict[str, Any]) -> None:
    settings = load_settings(values)
    config = yaml.safe_load(to_yaml(to_serve_config(settings)))
    (application,) = ServeDeploySchema.model_validate(config).applications
    assert load_settings(application.args) == settings
    assert config["proxy_location"] == "Disabled"


@pytest.mark.parametrize("is_open", [True, False])
def test_whether_keys_are_asked_for_is_always_written(is_open: bool) -> None:
    values = {"access": {"open": is_open, "tenants_file": "/t.yaml"}}
    (application,) = to_serve_config(load_settings(values))["applications"]
    assert application["args"]["access"]["open"] is is_open


def test_the_import_path_is_the_builder() -> None:
    module, _, name = serve_config.IMPORT_PATH.partition(":")
    assert module == "musicgen_serving.app"
    assert hasattr(__import__(module, fromlist=[name]), name)


def test_the_gatekeeper_goes_where_the_http_ingress_goes() -> None:
    settings = load_settings({"http": {"ingress": {"resources": {"edge": 0.9}}}})
    (override,) = to_serve_config(settings)["applications"][0]["deployments"]
    assert override["name"] == "Gatekeeper"
    assert override["ray_actor_options"]["resources"] == {"edge": serve_config.GATEKEEPER_SHARE}
    assert "deployments" not in to_serve_config(load_settings({}))["applications"][0]


def test_the_override_says_all_that_the_code_says() -> None:
    """Serve puts the options in the place of the code's: what is not in both is lost."""
    settings = load_settings({"http": {"ingress": {"resources": {"edge": 0.9}}}})
    (override,) = to_serve_config(settings)["applications"][0]["deployments"]
    in_code = app._deployment(GatekeeperReplica, "Gatekeeper", ReplicaSettings(), settings).ray_actor_options
    assert in_code is not None
    given = override["ray_actor_options"]
    assert given.keys() == in_code.keys()
    assert {**given, "resources": None} == {**in_code, "resources": None}


def test_what_rays_schema_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_config, "IMPORT_PATH", "no-module")
    with pytest.raises(InvalidRequestError, match="import_path"):
        to_serve_config(load_settings({}))


@pytest.mark.parametrize("name", deploy_files.SERVICES)
def test_each_manifest_has_a_config_that_serve_accepts(name: str) -> None:
    ServeDeploySchema.model_validate(deploy_files.serve_config(name))
    with pytest.raises(ValidationError):
        ServeDeploySchema.model_validate(deploy_files.serve_config(name) | {"applications": [{"name": ""}]})


def test_generated_files_are_current() -> None:
    stale = [path.name for path, text in deploy_files.module("render.py").rendered() if path.read_text() != text]
    assert not stale, "run `python deploy/render.py`"


def test_serve_yaml_is_what_the_production_settings_say() -> None:
    settings = load_settings(deploy_files.DEPLOY / "settings/cluster.yaml")
    assert deploy_files.documents("serve.yaml") == [to_serve_config(settings)]
    assert deploy_files.serve_config("rayservice") == to_serve_config(settings)


def test_the_password_of_redis_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    (variable,) = (
        variable["name"]
        for variable in deploy_files.pools("rayservice")["head"].ray["env"]
        if variable["name"].startswith("MUSICGEN_")
    )
    monkeypatch.setenv(variable, "redis://:secret@host:6379/1")
    settings = deploy_files.settings_of("rayservice")
    assert settings.access.limits_storage == "redis://:secret@host:6379/1"
    assert settings.access.tenants_file is not None
    assert not settings.access.open
