"""Pages of other origins: only those that the settings name, and for those errors too."""

from __future__ import annotations

import pytest
from musicgen_serving.http_api import create_app
from musicgen_serving.settings import load_settings
from serving.http_api.conftest import URL, Client

from musicgen.errors import InvalidRequestError

ORIGIN = "https://app.example"
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type",
}


def test_by_default_no_page_may_call_it(client: Client) -> None:
    response = client.request("POST", URL, json={"duration_s": 0.1}, headers={"Origin": ORIGIN})
    assert response.status_code == 200
    assert not [name for name in response.headers if name.startswith("access-control")]
    assert client.request("OPTIONS", URL, headers=PREFLIGHT).status_code == 405


def test_pages_of_named_origins_may(client: Client) -> None:
    client.app = create_app(client.service, cors_origins=[ORIGIN])
    client.service.is_open = False
    preflight = client.request("OPTIONS", URL, headers=PREFLIGHT)
    assert preflight.status_code == 200, "and no key is asked for: browsers send none"
    assert preflight.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert "authorization" in preflight.headers["Access-Control-Allow-Headers"].lower()
    refused = client.request("POST", URL, json={"duration_s": 0.1}, headers={"Origin": ORIGIN})
    assert refused.status_code == 401
    assert refused.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert "X-Request-Id" in refused.headers["Access-Control-Expose-Headers"]
    other = client.request("OPTIONS", URL, headers={**PREFLIGHT, "Origin": "https://other.example"})
    assert "Access-Control-Allow-Origin" not in other.headers


@pytest.mark.parametrize("origin", ["app.example", "https://app.example/", "https://app.example/path", ""])
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(InvalidRequestError, match="cors_origins"):
        load_settings({"http": {"cors_origins": [origin]}})
