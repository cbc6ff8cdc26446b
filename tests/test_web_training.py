"""The routes of training over a fake front: what is passed on, what is refused and how, and to whom."""

from __future__ import annotations

from collections.abc import AsyncIterator
from random import Random
from typing import Any

import httpx
import msgspec
import pytest

from node.errors import BadRequest, NotReady
from node.training_wish import Begin, Join
from node.web.app import build_app
from node.web.door import BODY_BYTES_MAX
from tests.fake_front import FakeFront
from tests.test_web_routes import error_of

WORDS = ("start", "join", "pause", "resume", "leave")
BODIES: dict[str, dict[str, Any]] = {
    "start": {"name": "tales", "data": ["/texts"]},
    "join": {"run": "tales", "data": ["/texts"]},
}


class Bench:
    """A front, and a client that comes from an address of its own."""

    def __init__(self, client: tuple[str, int] = ("127.0.0.1", 50_000)) -> None:
        self.front = FakeFront()
        app = build_app(self.front, Random(7))
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False, client=client)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8765")

    async def say(self, word: str, body: object = None, **headers: str) -> httpx.Response:
        content = BODIES.get(word, {}) if body is None else body
        return await self.http.post(f"/api/v1/training/{word}", json=content, headers=headers)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    async with bench.http:
        yield bench


async def test_the_status_is_what_the_node_tells(bench: Bench) -> None:
    response = await bench.http.get("/api/v1/training")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json() == bench.front.trains.status()


async def test_every_word_reaches_the_node(bench: Bench) -> None:
    for word in WORDS:
        response = await bench.say(word)
        assert response.status_code == 200, response.text
        assert response.json()["state"] == "idle"
    assert bench.front.trains.said == [
        Begin(name="tales", data=("/texts",)),
        Join(run="tales", data=("/texts",)),
        "pause",
        "resume",
        "leave",
    ]


async def test_all_fields_of_a_new_run_arrive(bench: Bench) -> None:
    body = {
        "name": "tales", "data": ["/a", "/b"], "founders": ["x"], "members": ["x", "y"], "codec": "int8",
        "rule": "mean", "outer_rate": 0.5, "momentum": 0.9, "steps": 5, "rows": 1, "context": 64, "accumulation": 2,
        "rate": 1e-3, "warmup_steps": 0, "probation": 1, "absent_max": 9, "lora_rank": 4, "lora_alpha": 8,
        "lora_targets": ["q_proj"], "privacy": {"epsilon": 4.0, "delta": 1e-5, "noise": 1.0, "clip": 0.5},
    }  # fmt: skip
    assert set(body) == set(Begin.__struct_fields__)
    assert (await bench.say("start", body)).status_code == 200
    assert bench.front.trains.said == [msgspec.convert(body, Begin, strict=False)]


@pytest.mark.parametrize(
    ("word", "body", "named"),
    [
        ("start", {"data": ["/x"]}, "name"),
        ("start", {"name": "tales"}, "data"),
        ("start", {"name": "tales", "data": "/x"}, "data"),
        ("start", {"name": "Tales", "data": ["/x"]}, "name"),
        ("start", {"name": "tales", "data": ["/x"], "steps": "many"}, "steps"),
        ("start", {"name": "tales", "data": ["/x"], "stepps": 1}, "stepps"),
        ("start", {"name": "tales", "data": ["/x", 7]}, "the field data[1] does not fit"),
        ("join", {"run": "tales", "data": []}, "data"),
        ("join", {"run": "", "data": ["/x"]}, "run"),
        ("join", {"name": "tales", "data": ["/x"]}, "name"),
        ("join", [], "object"),
    ],
    ids=str,
)
async def test_a_body_that_does_not_fit_is_refused_with_the_fields_name(
    bench: Bench, word: str, body: object, named: str
) -> None:
    error = error_of(await bench.say(word, body), 400)
    assert named in error["message"]
    assert "does not fit: " in error["message"]
    assert bench.front.trains.said == []


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[" * 100_000, b'{"run":"a","run":1}'])
async def test_a_body_that_is_no_json_is_refused(bench: Bench, raw: bytes) -> None:
    error_of(await bench.http.post("/api/v1/training/join", content=raw), 400)


async def test_a_body_that_is_too_large_is_refused(bench: Bench) -> None:
    response = await bench.http.post("/api/v1/training/join", content=b" " * (BODY_BYTES_MAX + 1))
    error_of(response, 413)


@pytest.mark.parametrize(
    ("error", "status"),
    [(BadRequest("this node is in no run", param="run"), 400), (NotReady("the model is loading"), 503)],
    ids=["bad", "not ready"],
)
async def test_what_the_node_refuses_is_told(bench: Bench, error: Any, status: int) -> None:
    bench.front.trains.fails = error
    for word in WORDS:
        told = error_of(await bench.say(word), status)
        assert (told["message"], told["param"]) == (error.message, error.param)


@pytest.mark.parametrize("address", ["192.0.2.7", "2001:db8::1", "::ffff:192.0.2.7", "10.0.0.1", "nonsense", ""])
async def test_only_who_sits_here_may_say_anything(address: str) -> None:
    bench = Bench((address, 50_000))
    async with bench.http:
        for word in WORDS:
            error = error_of(await bench.say(word), 403)
            assert "from this machine only: ask on 127.0.0.1" in error["message"]
        assert (await bench.http.get("/api/v1/training")).status_code == 200
        assert bench.front.trains.said == []


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
async def test_who_sits_here_may(address: str) -> None:
    bench = Bench((address, 50_000))
    async with bench.http:
        assert (await bench.say("pause")).status_code == 200


@pytest.mark.parametrize(
    "header",
    ["X-Forwarded-For", "x-forwarded-host", "X-Forwarded-Proto", "X-Forwarded", "Forwarded", "Via", "X-Real-IP",
     "CF-Connecting-IP", "True-Client-IP"],
)  # fmt: skip
async def test_a_proxy_on_this_machine_is_not_who_sits_here(bench: Bench, header: str) -> None:
    """It says so whatever the value is: strangers stand behind it, and they look like loopback."""
    for value in ("203.0.113.7", "127.0.0.1", ""):
        for word in WORDS:
            error = error_of(await bench.say(word, **{header: value}), 403)
            assert f"the header {header.lower()} says that a proxy" in error["message"]
            assert error["param"] == header.lower()
    assert bench.front.trains.said == []
    assert (await bench.http.get("/api/v1/training", headers={header: "203.0.113.7"})).status_code == 200


async def test_what_is_refused_is_counted(bench: Bench) -> None:
    await bench.say("pause", via="1.1 proxy")
    stranger = Bench(("192.0.2.7", 50_000))
    async with stranger.http:
        await stranger.say("pause")
        told = (await stranger.http.get("/metrics")).text
    assert 'reason="training_from_elsewhere"} 1' in told
    assert 'reason="training_by_proxy"} 1' in (await bench.http.get("/metrics")).text


async def test_a_page_of_another_site_may_not(bench: Bench) -> None:
    for word in WORDS:
        error_of(await bench.say(word, origin="https://evil.example"), 403)
    assert bench.front.trains.said == []


async def test_a_word_is_no_get(bench: Bench) -> None:
    for word in WORDS:
        error_of(await bench.http.get(f"/api/v1/training/{word}"), 405)
