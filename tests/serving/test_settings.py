"""What the service can be told: bounds, unknown keys, the environment; and nobody is let in by accident."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import yaml
from musicgen_serving.cli import ServeCommand
from musicgen_serving.settings import AccessSettings, ServeSettings, load_settings

from musicgen.errors import InvalidRequestError

KEY = "0" * 64


def test_the_defaults_serve_the_embedded_model_to_this_machine_only() -> None:
    settings = load_settings()
    assert [model.checkpoint for model in settings.models] == ["demo"]
    assert settings.http.host == settings.grpc.host == "127.0.0.1"
    assert settings.access.open


@pytest.mark.parametrize(
    "access", [{"tenants": [{"name": "a", "key_sha256": [KEY]}]}, {"tenants_file": "tenants.yaml"}]
)
def test_a_service_with_tenants_is_not_open_to_others(access: dict[str, Any]) -> None:
    assert not load_settings({"access": access}).access.open


def test_a_service_that_nobody_could_use_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="nobody could use"):
        load_settings({"access": {"usage_file": "usage.jsonl"}})


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"limit": {}}, "limit"),
        ({"limits": {"max_piece": 3}}, "limits.max_piece"),
        ({"limits": {"max_pieces": 0}}, "limits.max_pieces"),
        ({"models": []}, "models"),
        ({"models": [{"name": "a"}, {"name": "a"}]}, "different names"),
        ({"models": [{"name": "a/b"}]}, "models.0.name"),
        ({"models": [{"weights": "int2"}]}, "models.0.weights"),
        ({"models": [{"language_model": {"min_replicas": 3, "max_replicas": 2}}]}, "max_replicas"),
        ({"models": [{"device": "gpu"}]}, "models.0.device"),
        ({"http": {"port": 70000}}, "http.port"),
        ({"http": {"port": 9000}}, "9000 for both"),
        ({"grpc": {"tls_key": "key.pem"}}, "tls_certificate"),
        ({"access": {"tenants": [{"name": "a", "key_sha256": ["mg-secret"]}]}}, "hash-key"),
        ({"access": {"tenants": [{"name": "a"}, {"name": "a"}]}}, "different names"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        load_settings(values)


def test_an_error_never_shows_what_was_given_for_a_key() -> None:
    key = "-".join(("mg", "secret"))  # so that this line of a traceback does not hold it
    with pytest.raises(InvalidRequestError) as caught:
        load_settings({"access": {"tenants": [{"name": "a", "key_sha256": [key]}]}})
    assert "mg-secret" not in str(caught.value)
    assert "mg-secret" not in "".join(traceback.format_exception(caught.value))


def test_an_error_never_shows_the_lines_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "service.yaml"
    path.write_text("access:\n  limits_storage: 'redis://:mg-secret@host\n")
    with pytest.raises(InvalidRequestError, match="line") as caught:
        load_settings(path)
    assert "mg-secret" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "name",
    ["MUSICGEN_ACCES__OPEN", "MUSICGEN_ACCESS_OPEN", "musicgen_acces__open", "MUSICGEN_LIMITS_MAX_PIECES", "MUSICGEN_"],
)
def test_a_variable_that_is_no_setting_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "mg-secret")
    with pytest.raises(InvalidRequestError, match=f"got {name}") as caught:
        load_settings()
    assert "mg-secret" not in str(caught.value)


def test_a_variable_of_a_section_that_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUSICGEN_ACCESS", "{mg-secret")
    with pytest.raises(InvalidRequestError, match="access") as caught:
        load_settings()
    assert "mg-secret" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MUSICGEN_API_KEY", "k"),
        ("MUSICGEN_KERNELS_ISA", "avx2"),
        ("MUSICGEN_DEBUG", "1"),
        ("MUSICGEN_HTTP_SERVICE_HOST", "10.0.0.1"),
        ("MUSICGEN_HTTP_SERVICE_PORT", "8000"),
        ("MUSICGEN_HTTP_SERVICE_PORT_HTTP", "8000"),
        ("MUSICGEN_HTTP_PORT", "tcp://10.0.0.1:8000"),
        ("MUSICGEN_HTTP_PORT_8000_TCP", "tcp://10.0.0.1:8000"),
        ("MUSICGEN_HTTP_PORT_8000_TCP_ADDR", "10.0.0.1"),
    ],
)
def test_other_variables_of_ours_and_of_kubernetes_are_let_be(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert load_settings() == ServeSettings()


def test_the_environment_goes_before_the_file_and_leaves_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "service.yaml"
    path.write_text("limits: {max_duration_s: 10, max_pieces: 3}\nhttp: {port: 1234}\n")
    monkeypatch.setenv("MUSICGEN_LIMITS__MAX_DURATION_S", "60")
    settings = load_settings(path)
    assert (settings.limits.max_duration_s, settings.limits.max_pieces, settings.http.port) == (60.0, 3, 1234)


def test_settings_survive_the_way_to_the_replicas() -> None:
    settings = ServeSettings(access=AccessSettings(tenants_file=Path("tenants.yaml")))
    assert load_settings(settings.model_dump(mode="json")) == settings


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "service.yaml"
    path.write_text("http: {port: 8000}\nhttp: {port: 8001}\n")
    with pytest.raises(InvalidRequestError, match="line 2: duplicate key 'http'"):
        load_settings(path)


@pytest.mark.parametrize("text", ["- a list", "limits: [", ""])
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    path = tmp_path / "service.yaml"
    path.write_text(text)
    if text:
        with pytest.raises(InvalidRequestError):
            load_settings(path)
    else:
        assert load_settings(path) == load_settings()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="readable YAML"):
        load_settings(tmp_path / "none.yaml")


def printed_settings(capsys: pytest.CaptureFixture[str], **typed: object) -> ServeSettings:
    """The settings of `musicgen serve --print-config` with these options."""
    names = ("config", "model", "weights", "device", "host", "http_port", "grpc_port", "ray_address", "check_config")
    values = {**dict.fromkeys(names), "print_config": True, "print_serve_config": False, **typed}
    assert ServeCommand.run(values) == 0
    return load_settings(yaml.safe_load(capsys.readouterr().out))


@pytest.mark.parametrize("model", [None, ["demo", "small"]])
def test_weights_and_device_are_those_of_all_models(
    model: list[str] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    models = printed_settings(capsys, model=model, weights="int8", device="cpu").models
    assert [each.name for each in models] == (model or ["demo"])
    assert {(each.weights, each.device) for each in models} == {("int8", "cpu")}


def test_what_is_typed_goes_before_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "service.yaml"
    path.write_text("access: {open: true}\nhttp: {port: 1234, host: 0.0.0.0}\n")
    settings = printed_settings(capsys, config=path, model=["facebook/musicgen-small"], grpc_port=0)
    assert (settings.http.port, settings.http.host, settings.grpc.port) == (1234, "0.0.0.0", 0)
    assert (settings.models[0].name, settings.models[0].source) == ("musicgen-small", "facebook/musicgen-small")
