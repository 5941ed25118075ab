"""The OpenAPI document: valid, complete, and true. And: the application travels, as Ray Serve needs it."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from jsonschema import Draft202012Validator
from musicgen_serving.http_api import create_app
from musicgen_serving.http_api.schemas import GenerationBody
from serving.http_api.conftest import URL, Client
from serving.http_api.fakes import FakeService


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    response = Client(FakeService()).request("GET", "/openapi.json")
    assert response.status_code == 200
    result: dict[str, Any] = response.json()
    return result


def test_every_route_is_there(document: dict[str, Any]) -> None:
    operations = {(path, method) for path, item in document["paths"].items() for method in item}
    assert operations == {
        ("/v1/music/generations", "post"),
        ("/v1/music/generations/{id}", "get"),
        ("/v1/music/generations/{id}", "delete"),
        ("/v1/models", "get"),
        ("/v1/models/{id}", "get"),
        ("/healthz", "get"),
        ("/readyz", "get"),
        ("/metrics", "get"),
    }
    post = document["paths"]["/v1/music/generations"]["post"]
    assert set(post["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    assert {"audio/wav", "audio/flac", "application/json", "text/event-stream"} <= set(
        post["responses"]["200"]["content"]
    )
    assert {"400", "401", "404", "409", "413", "415", "429", "503"} <= set(post["responses"])
    assert "422" not in json.dumps(list(post["responses"]))
    assert document["components"]["securitySchemes"]


def test_every_field_is_described_in_both_bodies(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for name in ("GenerationBody", "GenerationForm"):
        Draft202012Validator.check_schema(schemas[name])
        assert set(schemas[name]["properties"]) == set(GenerationBody.model_fields)
        assert schemas[name]["additionalProperties"] is False
        for field in schemas[name]["properties"].values():
            assert len(field["description"]) > 15
    assert schemas["GenerationForm"]["properties"]["melody"]["format"] == "binary"
    assert schemas["GenerationBody"]["properties"]["melody"]["anyOf"][0]["contentEncoding"] == "base64"


def test_all_references_lead_somewhere(document: dict[str, Any]) -> None:
    text = json.dumps(document)
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names == set(document["components"]["schemas"])


def test_the_document_is_valid(document: dict[str, Any]) -> None:
    schemathesis.openapi.from_dict(document).validate()


def test_docs_page() -> None:
    assert "swagger" in Client(FakeService()).request("GET", "/docs").text


_FUZZED = schemathesis.openapi.from_asgi("/openapi.json", create_app(FakeService()))


@_FUZZED.parametrize()
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_fuzzed_requests_end_in_documented_ways(case: Any) -> None:
    if isinstance(case.body, dict) and isinstance(case.body.get("duration_s"), int | float):
        case.body["duration_s"] = min(case.body["duration_s"], 0.05)
    response = case.call()
    assert response.status_code < 500, response.text
    assert str(response.status_code) in case.operation.definition.raw["responses"] or response.status_code == 405
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def _service() -> FakeService:
    return FakeService()


def test_the_application_can_be_pickled() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, of pydantic
        from ray import cloudpickle, serve

    @serve.ingress(create_app(_service))  # also teaches the pickler what Starlette needs
    class Ingress: ...

    assert Ingress is not None
    app = cloudpickle.loads(cloudpickle.dumps(create_app(_service)))
    client = Client(FakeService())
    client.app = app
    assert client.request("POST", URL, json={"duration_s": 0.1}).status_code == 200
