"""The routes of a node's own state and memory, over a real memory: what is told, to whom, and what is refused."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
import trio
from trio.testing import MockClock

from node.api_key_file import KEYS_FILE, KeyFile, changing_keys
from node.api_keys import KeyScope
from node.consciousness_fields import FIELDS, figures_and_words
from node.errors import NotReady
from node.self_face import QUESTION_CHARS_MAX, RECALLED_MAX
from node.web import schema_itself as told
from node.web.app import build_app
from node.web.caller import Need, need_of
from node.web.gate import GateConfig
from node.web.itself import BEGIN_S, KEEP_ALIVE_S
from node.web.schema_itself import PATHS_MAX, SNAPSHOTS_MAX, SUBJECT_CHARS_MAX
from node.web.settings import WebConfig
from tests.fake_front import FakeFront
from tests.fake_self import FakeSelf, measured
from tests.test_api_keys import made
from tests.test_web_routes import error_of
from tests.test_web_stream import Call

SECRET = "the heron stands in the reeds"
MEMORY: list[tuple[str, str, dict[str, Any] | None]] = [
    ("GET", "/api/v1/memory?q=heron", None),
    ("POST", "/api/v1/memory", {"text": SECRET}),
    ("DELETE", "/api/v1/memory?subject=birds", None),
    ("GET", "/api/v1/memory/verify", None),
]


class Bench:
    """A front with a memory, and a client that comes from an address of its own."""

    def __init__(self, folder: Path, client: str = "127.0.0.1", gate: GateConfig | None = None) -> None:
        self.front = FakeFront()
        self.itself = FakeSelf(folder).live()
        self.front.itself = self.itself
        self.app = build_app(self.front, Random(7), WebConfig(gate=gate or GateConfig()))
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False, client=(client, 50_000))
        self.http = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8765")

    async def ask(self, method: str, path: str, body: object = None, **headers: str) -> httpx.Response:
        return await self.http.request(method, path, json=body, headers=headers)

    async def get(self, path: str, **headers: str) -> httpx.Response:
        return await self.ask("GET", path, **headers)

    async def note(self, text: str, subject: str = "") -> int:
        made = (await self.ask("POST", "/api/v1/memory", {"text": text, "subject": subject})).json()["id"]
        assert isinstance(made, int)
        return made


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    async with bench.http:
        yield bench
    bench.itself.close()


async def test_the_state_is_told_with_units_and_formulas(bench: Bench) -> None:
    response = await bench.get("/api/v1/self")
    assert response.status_code == 200
    told.SelfTold.model_validate_json(response.text)
    body = response.json()
    assert [(row["path"], row["unit"], row["formula"], row["source"]) for row in body["fields"]] == [
        (row.path, row.unit, row.formula, row.source) for row in FIELDS
    ]
    figures, words = measured(bench.itself)
    for row in body["fields"]:
        if row["path"] in figures:
            assert row["value"] == figures[row["path"]]
        elif row["path"] in words and not isinstance(row["value"], list):
            assert row["value"] == words[row["path"]]
    assert body["doing"].startswith("run 3; a; running")
    assert body["prediction"]["figures"]["latency_s"]["value"] == 2.0


async def test_what_the_state_tells_is_nothing_that_people_wrote(bench: Bench) -> None:
    await bench.note(SECRET, "birds")
    bench.itself.snapshot()
    response = await bench.get("/api/v1/self")
    for word in ("heron", "reeds", "birds"):
        assert word not in response.text


async def test_history_is_oldest_first_and_has_gaps(bench: Bench) -> None:
    bench.itself.snapshot()
    path = "path=load.loop_lag_ms&path=identity.stop_reason&path=identity.phase&path=load.loop_lag_ms"
    response = await bench.get(f"/api/v1/self/history?{path}&n=5")
    told.HistoryTold.model_validate_json(response.text)
    body = response.json()
    assert body["ts_ms"] == sorted(body["ts_ms"])
    assert body["figures"] == {"load.loop_lag_ms": [3.5, 3.5]}
    assert body["words"] == {"identity.stop_reason": [None, None], "identity.phase": ["running", "running"]}
    newest = (await bench.get("/api/v1/self/history?path=memory.head_id&n=1")).json()
    assert newest["figures"]["memory.head_id"] == [figures_and_words(bench.itself.state)[0]["memory.head_id"]]


async def test_a_note_is_recalled_by_words_by_meaning_and_forgotten(bench: Bench) -> None:
    first = await bench.note(SECRET, "birds")
    await bench.note("an oak grows slowly", "trees")
    found = (await bench.get("/api/v1/memory?q=heron")).json()
    told.Recalled.model_validate(found)
    [event] = found["events"]
    assert (event["id"], event["kind"], event["body"]) == (first, "note", {"text": SECRET, "subject": "birds"})
    assert event["hash"] == bench.itself.store.search("heron", 1)[0].hash.hex()
    alike = (await bench.get("/api/v1/memory?q=heron reeds&by=meaning")).json()["events"]
    assert alike[0]["id"] == first
    assert alike[0]["likeness"] > alike[1]["likeness"]
    by_subject = (await bench.get("/api/v1/memory?subject=trees")).json()["events"]
    assert [each["body"]["text"] for each in by_subject] == ["an oak grows slowly"]
    assert [each["kind"] for each in (await bench.get("/api/v1/memory?kind=merge&n=3")).json()["events"]] == ["merge"]
    assert (await bench.ask("DELETE", "/api/v1/memory?subject=birds")).json() == {"forgotten": 1}
    assert (await bench.get("/api/v1/memory?q=heron")).json() == {"events": []}
    whole = (await bench.get("/api/v1/memory/verify")).json()
    told.Verified.model_validate(whole)
    assert whole["is_whole"]
    assert SECRET.encode() not in bench.itself.world.raw()


async def test_the_newest_is_first_and_n_bounds_it(bench: Bench) -> None:
    ids = [await bench.note(f"bird number {n}") for n in range(4)]
    found = (await bench.get("/api/v1/memory?q=bird&n=3")).json()["events"]
    assert [each["id"] for each in found] == ids[:0:-1]


BAD: list[tuple[str, str, str]] = [
    ("/api/v1/self?all=1", "all", "unknown"),
    ("/api/v1/self/history", "path", "missing"),
    ("/api/v1/self/history?path=load.mood", "path", "no member"),
    ("/api/v1/self/history?path=load.loop_lag_ms&n=0", "n", "greater than or equal to 1"),
    (f"/api/v1/self/history?path=load.loop_lag_ms&n={SNAPSHOTS_MAX + 1}", "n", "less than or equal"),
    ("/api/v1/self/history?path=load.loop_lag_ms&n=few", "n", "integer"),
    ("/api/v1/self/history?" + "&".join(["path=load.loop_lag_ms"] * (PATHS_MAX + 1)), "path", "at most 16"),
    ("/api/v1/self/history?path=" + "a" * 65, "path.0", "at most 64"),
    ("/api/v1/memory?n=1&n=2", "n", "twice"),
    (f"/api/v1/memory?n={RECALLED_MAX + 1}", "n", "less than or equal"),
    ("/api/v1/memory?by=mood", "by", "words"),
    ("/api/v1/memory?kind=mood", "kind", "note"),
    ("/api/v1/memory?subject=", "subject", "at least 1"),
    ("/api/v1/memory?subject=" + "a" * (SUBJECT_CHARS_MAX + 1), "subject", "at most 128"),
    ("/api/v1/memory?q=" + "a" * (QUESTION_CHARS_MAX + 1), "q", "at most 1000"),
    ("/api/v1/memory/verify?fast=1", "fast", "unknown"),
]


@pytest.mark.parametrize(("path", "param", "words"), BAD, ids=[each[0][:60] for each in BAD])
async def test_a_bad_question_is_named(bench: Bench, path: str, param: str, words: str) -> None:
    error = error_of(await bench.get(path), 400)
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [({}, "text"), ({"text": ""}, "text"), ({"text": "a" * 12_001}, "text"), ({"text": "a", "mood": 1}, "mood"),
     ({"text": "a", "subject": "b" * 129}, "subject"), ({"text": 3}, "text"), ([], None)],
    ids=str,
)  # fmt: skip
async def test_a_bad_note_is_named(bench: Bench, body: object, param: str | None) -> None:
    assert error_of(await bench.ask("POST", "/api/v1/memory", body), 400)["param"] == param


@pytest.mark.parametrize("path", ["/api/v1/memory", "/api/v1/memory?subject=", "/api/v1/memory?subjects=a"])
async def test_to_forget_needs_a_subject(bench: Bench, path: str) -> None:
    assert "subject" in error_of(await bench.ask("DELETE", path), 400)["message"]


async def test_what_cannot_be_done_now_is_said(bench: Bench) -> None:
    bench.itself.fails = NotReady("the disk is full: make room")
    for method, path, body in MEMORY:
        error = error_of(await bench.ask(method, path, body), 503)
        assert (error["code"], error["retryable"]) == ("not_ready", True)


async def test_a_node_without_memory_says_so(bench: Bench) -> None:
    bench.front.itself = None
    state: list[tuple[str, str, dict[str, Any] | None]] = [
        ("GET", "/api/v1/self", None),
        ("GET", "/api/v1/self/history?path=load.loop_lag_ms", None),
    ]
    for method, path, body in [*state, *MEMORY]:
        error = error_of(await bench.ask(method, path, body), 404)
        assert "keeps no memory (--no-memory)" in error["message"]


# --- who may ---


def keys(folder: Path, *scopes: KeyScope) -> tuple[GateConfig, str]:
    key, secret = made(scopes=scopes)
    with changing_keys(folder / KEYS_FILE) as kept:
        kept.append(key)
    return GateConfig(keys=KeyFile(folder / KEYS_FILE), required=True), secret


def test_memory_is_for_the_operator_whatever_the_method() -> None:
    for method in ("GET", "HEAD", "POST", "DELETE"):
        assert need_of(method, "/api/v1/memory") is Need.ADMIN
        assert need_of(method, "/api/v1/memory/verify") is Need.ADMIN
    assert need_of("GET", "/api/v1/self") is Need.METRICS
    assert need_of("GET", "/api/v1/self/history") is Need.METRICS


@pytest.mark.parametrize("scope", [KeyScope.METRICS, KeyScope.INFER, KeyScope.TRAIN])
async def test_another_key_than_the_operators_is_refused_the_memory(tmp_path: Path, scope: KeyScope) -> None:
    gate, secret = keys(tmp_path, scope)
    bench = Bench(tmp_path, gate=gate)
    async with bench.http:
        for method, path, body in MEMORY:
            error = error_of(await bench.ask(method, path, body, authorization=f"Bearer {secret}"), 403)
            assert error["code"] == "lacks_scope"
        state = await bench.get("/api/v1/self", authorization=f"Bearer {secret}")
        assert state.status_code == (200 if scope is KeyScope.METRICS else 403)
        assert (await bench.get("/api/v1/memory")).status_code == 401
    assert bench.itself.store.search("heron", 1) == []
    bench.itself.close()


async def test_the_operators_key_is_taken_from_anywhere(tmp_path: Path) -> None:
    gate, secret = keys(tmp_path, KeyScope.ADMIN)
    bench = Bench(tmp_path, client="203.0.113.9", gate=gate)
    async with bench.http:
        for method, path, body in MEMORY:
            assert (await bench.ask(method, path, body, authorization=f"Bearer {secret}")).status_code == 200
    bench.itself.close()


@pytest.mark.parametrize(
    ("client", "headers", "words"),
    [("203.0.113.9", {}, "127.0.0.1"), ("192.168.1.5", {}, "127.0.0.1"), ("127.0.0.1", {"via": "1.1 x"}, "via"),
     ("127.0.0.1", {"x-forwarded-for": "203.0.113.9"}, "proxy")],
    ids=str,
)  # fmt: skip
async def test_on_an_open_node_the_memory_is_for_this_machine(
    tmp_path: Path, client: str, headers: dict[str, str], words: str
) -> None:
    bench = Bench(tmp_path, client=client)
    async with bench.http:
        for method, path, body in MEMORY:
            error = error_of(await bench.ask(method, path, body, **headers), 403)
            assert words in error["message"]
    assert bench.itself.verified == 0
    counted = bench.app.counts.drops
    assert counted["memory_from_elsewhere"] + counted["memory_by_proxy"] == len(MEMORY)
    bench.itself.close()


# --- a walk ---


def walk() -> Call:
    call = Call("/api/v1/memory/verify", {})
    call.scope |= {"method": "GET", "client": ("127.0.0.1", 50_000)}
    return call


async def test_a_long_walk_shows_life_until_it_is_over(bench: Bench, autojump_clock: MockClock) -> None:
    bench.itself.verify_s = BEGIN_S + 3.5 * KEEP_ALIVE_S
    call = walk()
    await bench.app(call.scope, call.receive, call.send)  # type: ignore[arg-type]
    assert call.text().startswith("\n\n\n\n{")
    assert json.loads(call.text())["is_whole"]


async def test_a_walk_that_fails_late_ends_in_an_error(bench: Bench, autojump_clock: MockClock) -> None:
    call = walk()

    async def verify() -> dict[str, Any]:
        await trio.sleep(BEGIN_S + 1)
        raise NotReady("the memory is closed")

    bench.itself.verify = verify  # type: ignore[method-assign]
    await bench.app(call.scope, call.receive, call.send)  # type: ignore[arg-type]
    assert json.loads(call.text())["error"]["code"] == "not_ready"


async def test_a_walk_ends_with_its_client(bench: Bench, autojump_clock: MockClock) -> None:
    bench.itself.verify_s = 1e6
    call = walk()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.app, call.scope, call.receive, call.send)  # type: ignore[arg-type]
        await trio.sleep(BEGIN_S + KEEP_ALIVE_S)
        second = error_of(await bench.get("/api/v1/memory/verify"), 503)
        assert "WALKS_MAX" in second["message"]
        call.leave()
    assert bench.itself.verified == 0
    bench.itself.verify_s = 0.0
    assert (await bench.get("/api/v1/memory/verify")).json()["is_whole"], "its place is free again"


async def test_head_does_not_walk(bench: Bench) -> None:
    assert (await bench.ask("HEAD", "/api/v1/memory/verify")).status_code == 200
    assert bench.itself.verified == 0


async def test_a_flipped_byte_is_named(bench: Bench) -> None:
    made = await bench.note(SECRET)
    bench.itself.close()
    bench.itself.world.tamper("UPDATE events SET ts_ms = ts_ms + 1 WHERE id = ?", (made - 1,))
    bench.itself.store = bench.itself.world.open()
    found = (await bench.get("/api/v1/memory/verify")).json()
    told.Verified.model_validate(found)
    assert (found["is_whole"], found["fault"]["id"]) == (False, made - 1)
