"""What an edge holds is bounded, and what takes long is not done on its loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import httpx2
import pytest
from musicgen_serving.http_api import body, create_app
from musicgen_serving.settings import LimitSettings
from serving.http_api.conftest import URL, Client
from serving.http_api.fakes import FakeService

Run = Callable[[Coroutine[Any, Any, Any]], Any]


def together(service: FakeService, fields: dict[str, Any], until_held: int) -> Coroutine[Any, Any, httpx2.Response]:
    """One request that waits in the service, and then the answer to another."""

    async def run() -> httpx2.Response:
        transport = httpx2.ASGITransport(app=create_app(service))
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            first = asyncio.create_task(client.post(URL, json=fields))
            while len(service.requests) < until_held:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.05)
            second = await client.post(URL, json=fields)
            first.cancel()
            return second

    return run()


def test_large_uploads_together_are_refused_with_a_time_to_retry(run: Run) -> None:
    limits = LimitSettings(edge_bytes=60_000, max_prompt_chars=40_000)
    service = FakeService(limits=limits, wait_at="admission")
    response = run(together(service, {"prompt": "x" * 40_000, "duration_s": 0.1}, 1))
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "overloaded"
    assert int(response.headers["Retry-After"]) >= 1


def test_whole_answers_together_are_refused_before_they_are_made(run: Run) -> None:
    service = FakeService(limits=LimitSettings(edge_bytes=32_000 * 8 * 3), wait_at="first_audio")
    response = run(together(service, {"duration_s": 2.0}, 1))
    assert response.status_code == 503
    assert service.num_chunks == 0


def test_a_whole_answer_has_a_longest_duration(client: Client) -> None:
    client.service.limits = LimitSettings(max_answer_s=3.0)
    fields = {"duration_s": 1.1, "num_samples": 3}
    refused = client.request("POST", URL, json=fields)
    assert (refused.status_code, refused.json()["error"]["param"]) == (413, "duration_s")
    assert "max_answer_s" in refused.json()["error"]["message"]
    assert client.request("POST", URL, json={**fields, "stream_format": "sse"}).status_code == 200
    assert client.request("POST", URL, json={**fields, "duration_s": 1.0}).status_code == 200
    assert client.request("POST", URL, json={"duration_s": 5.0}).status_code == 200, "one piece has its own limit"


@pytest.mark.parametrize("model", ["", "x" * 201])
def test_a_model_has_a_name_of_bounded_length(client: Client, model: str) -> None:
    response = client.post(model=model)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "model")


def test_large_forms_are_read_beside_the_loop(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    """The loop goes on while a form is read, whatever reading takes."""
    threads: list[threading.Thread] = []
    items = body._form_items

    async def slow(*arguments: Any) -> dict[str, object]:
        threads.append(threading.current_thread())
        time.sleep(0.3)
        return await items(*arguments)

    monkeypatch.setattr(body, "_form_items", slow)
    service = FakeService(limits=LimitSettings(max_prompt_chars=200_000))
    longest = 0.0

    async def go() -> int:
        nonlocal longest
        transport = httpx2.ASGITransport(app=create_app(service))
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            form = {"prompt": (None, "x" * 100_000), "duration_s": (None, "0.1")}
            request = asyncio.create_task(client.post(URL, files=form))
            while not request.done():
                before = time.perf_counter()
                await asyncio.sleep(0.001)
                longest = max(longest, time.perf_counter() - before)
            return request.result().status_code

    assert run(go()) == 200
    assert service.requests[0].pieces[0].prompt == "x" * 100_000
    assert threads != [threading.main_thread()]
    assert longest < 0.25
