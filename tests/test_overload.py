"""More requests than there is room for, over HTTP: the real door, node and engine with a tiny model. Real time.

The engine waits at a gate, so that what is refused meanwhile does not depend on how fast the machine is.
"""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
import trio

from model.config import RuntimeConfig
from model.requests import Embeddings, Output
from model.runtime import Runtime
from node.api_key_file import KEYS_FILE, KeyFile, changing_keys
from node.embed_queue import EMBED_QUEUE_MAX
from node.hosting import Hosting
from node.room import Room
from node.web.app import build_app
from node.web.gate import GateConfig
from node.web.settings import WebConfig
from tests.test_api_keys import made
from tests.test_run import PATIENCE_S, Running, running, until
from tests.tiny_models import save_causal

pytestmark = pytest.mark.slow
SLOTS, QUEUE = 2, 6
GREEDY = {"prompt": "the king", "max_tokens": 4, "temperature": 0}


class Gated(Runtime):
    """Does nothing while the gate is closed."""

    gate = threading.Event()

    def encode(self, text: str) -> tuple[int, ...]:
        assert self.gate.wait(4 * PATIENCE_S)
        return super().encode(text)

    def step(self) -> list[Output]:
        assert self.gate.wait(4 * PATIENCE_S)
        return super().step()

    def embed(self, texts: Sequence[str | Sequence[int]]) -> Embeddings:
        assert self.gate.wait(4 * PATIENCE_S)
        return super().embed(texts)


@dataclass
class Site:
    """A node under load, and the answers that came."""

    here: Running
    http: httpx.AsyncClient
    answers: list[httpx.Response] = field(default_factory=list)
    running_max: int = 0
    queued_max: int = 0

    @property
    def hosting(self) -> Hosting:
        hosting = self.here.node._inference.hosting
        assert hosting is not None
        return hosting

    def statuses(self) -> list[int]:
        return [answer.status_code for answer in self.answers]

    async def post(self, path: str, body: dict[str, Any]) -> None:
        answer = await self.http.post(path, json=body)
        self.answers.append(answer)
        self.running_max = max(self.running_max, self.hosting.requests_running)
        self.queued_max = max(self.queued_max, self.hosting.details()["queued_bytes"])

    async def storm(self, count: int, admitted: int, path: str, body: dict[str, Any]) -> None:
        """So many requests while the gate is closed, of which `admitted` wait for it."""
        Gated.gate.clear()
        self.answers.clear()
        async with trio.open_nursery() as nursery:
            for number in range(count):
                nursery.start_soon(self.post, path, {**body, "user": f"client {number}"})
            await until(lambda: len(self.answers) == count - admitted)
            assert self.hosting.requests_running == admitted
            Gated.gate.set()
        await until(lambda: self.hosting.requests_running == 0)
        assert self.hosting.details()["queued_bytes"] == 0


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    save_causal(tmp_path / "tiny")
    config = RuntimeConfig(device="cpu", dtype="float32", threads=1, slots=SLOTS, queue_max=QUEUE)
    Gated.gate.set()

    def load(_config: object) -> Runtime:
        return Gated.load(str(tmp_path / "tiny"), config)

    async with running(tmp_path / "node", load, http="127.0.0.1:0") as here:
        await here.ready()
        async with client(f"http://{here.node.state.http}") as http:
            yield Site(here, http)
        Gated.gate.set()


@asynccontextmanager
async def client(url: str, **more: Any) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, limits=limits, trust_env=False, **more) as http:
        yield http


def check_refusals(answers: list[httpx.Response], count: int, status: int = 503) -> None:
    """Each says when to come again, in OpenAI's shape, before anything was streamed."""
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(refused) == count
    for answer in refused:
        assert answer.status_code == status
        assert int(answer.headers["retry-after"]) >= 1
        error = json.loads(answer.content)["error"]
        assert error["retryable"] is True
        assert error["code"] == ("no_room" if status == 503 else "too_many")


@pytest.mark.parametrize("stream", [False, True])
async def test_text_beyond_the_queue_is_refused_at_once(site: Site, stream: bool) -> None:
    await site.storm(40, SLOTS + QUEUE, "/v1/completions", {**GREEDY, "stream": stream})
    check_refusals(site.answers, 40 - SLOTS - QUEUE)
    assert site.running_max <= SLOTS + QUEUE
    whole = [answer for answer in site.answers if answer.status_code == 200]
    if stream:
        assert all(answer.text.endswith("data: [DONE]\n\n") and '"error"' not in answer.text for answer in whole)
    else:
        assert {answer.json()["usage"]["completion_tokens"] for answer in whole} == {4}
    await site.post("/v1/completions", GREEDY)
    assert site.answers[-1].status_code == 200


async def test_embeddings_beyond_the_queue_are_refused_at_once(site: Site) -> None:
    await site.storm(EMBED_QUEUE_MAX + 20, EMBED_QUEUE_MAX, "/v1/embeddings", {"input": ["the king"] * 3})
    check_refusals(site.answers, 20)
    assert site.running_max <= EMBED_QUEUE_MAX
    vectors = [answer.json()["data"][2]["embedding"] for answer in site.answers if answer.status_code == 200]
    assert vectors[1:] == vectors[:-1]


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/completions", {"prompt": "x" * 100_000}), ("/v1/embeddings", {"input": "x" * 100_000})],
    ids=["text", "embeddings"],
)
async def test_what_waits_is_bounded_in_bytes(site: Site, path: str, body: dict[str, Any]) -> None:
    site.hosting._waiting.room = Room("requests", 450_000)
    site.hosting.embedding._queue.room = Room("embedding requests", 450_000)
    await site.storm(20, 4, path, body)
    check_refusals([answer for answer in site.answers if answer.status_code != 400], 16)
    assert site.queued_max <= 450_000


async def test_one_client_of_elsewhere_is_told_that_it_takes_too_much_and_others_are_served(
    site: Site, tmp_path: Path
) -> None:
    key, text = made(burst=100.0, concurrent=100)  # the door's own limits let it
    with changing_keys(tmp_path / KEYS_FILE) as keys:
        keys.append(key)
    gate = GateConfig(keys=KeyFile(tmp_path / KEYS_FILE), required=True)
    app = build_app(site.here.node.state, Random(1), WebConfig(gate=gate))
    most = SLOTS + QUEUE // 2
    transport = httpx.ASGITransport(app=app, client=("203.0.113.9", 1))
    async with client("http://127.0.0.1", transport=transport, headers={"authorization": f"Bearer {text}"}) as http:
        elsewhere = Site(site.here, http)
        Gated.gate.clear()
        async with trio.open_nursery() as nursery:
            for _ in range(most + 3):
                nursery.start_soon(elsewhere.post, "/v1/completions", GREEDY)
            await until(lambda: len(elsewhere.answers) == 3)
            check_refusals(elsewhere.answers, 3, 429)
            nursery.start_soon(site.post, "/v1/completions", GREEDY)
            await until(lambda: site.hosting.requests_running == most + 1)
            Gated.gate.set()
        assert elsewhere.statuses() == [429] * 3 + [200] * most
        assert site.statuses() == [200]


async def test_what_is_refused_costs_the_engine_nothing(site: Site) -> None:
    """Not even to turn its prompt into tokens, which takes a long one's tenths of a second."""
    encoded: list[str] = []
    whole = site.hosting.runtime.encode

    def encode(text: str) -> tuple[int, ...]:
        encoded.append(text)
        return whole(text)

    site.hosting.runtime.encode = encode  # type: ignore[method-assign]  # a watch on the real one
    await site.storm(40, SLOTS + QUEUE, "/v1/completions", GREEDY)
    assert len(encoded) == SLOTS + QUEUE


async def test_metrics_tell_of_the_queue_and_of_what_is_kept(site: Site) -> None:
    for _ in range(3):
        await site.post("/v1/completions", GREEDY)
        await site.post("/v1/embeddings", {"input": ["a", "b"]})
    assert site.answers[2].headers["x-cache"] == "hit"
    assert site.answers[0].json()["choices"] == site.answers[2].json()["choices"]
    assert site.answers[0].json()["usage"] == site.answers[2].json()["usage"]
    assert site.answers[1].json()["data"] == site.answers[3].json()["data"]
    text = (await site.http.get("/metrics")).text
    for line in (
        'openagi_response_cache_queries_total{kind="completion"} 3.0',
        'openagi_response_cache_hits_total{kind="completion"} 2.0',
        'openagi_response_cache_hits_total{kind="embedding"} 4.0',
        "openagi_embedding_texts_total 2.0",
        "openagi_queued_bytes 0.0",
    ):
        assert f"\n{line}\n" in text
    status = (await site.http.get("/api/v1/status")).json()["model"]
    assert status["cache"]["entries"] == 3
    assert status["embedding"]["padding_share"] >= 0
