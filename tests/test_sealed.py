"""Sealed requests through whole nodes over the loopback network, asked by the client of docs/clients/sealed.py."""

from __future__ import annotations

import base64
import json
import logging
import shutil
from collections.abc import AsyncIterator, Callable
from functools import partial
from random import Random
from typing import Any

import httpx
import pytest
import trio
from starlette.types import Message, Receive, Scope, Send
from trio.testing import MockClock

from crypto.identity import Identity
from crypto.sealing import KIND_LAST, KIND_MORE, KIND_SALT, PAD_BYTES, AnswerOpener, Context, seal_request
from gossip.breaker import State
from model.step import Priority
from node.errors import NotReady, PeerFailed, RequestError
from node.front import Route, RouteHint
from node.metrics import prometheus_text
from node.sealed import KEEP_ALIVE_S, KIND_RELAY, SEALED_BYTES_MAX, SILENT_S_MAX, SealedCall
from node.web.app import build_app
from node.web.serve import serve
from p2p.calls import Incoming
from p2p.errors import RemoteError
from p2p.transport import Stream
from tests.fake_front import FakeFront
from tests.fake_runtime import FakeRuntime, facts
from tests.node_swarm import Node, Swarm, ask, eventually, work
from tests.sealed_client import load
from tests.test_house import ROOT

CLIENT = load()
CANARY = "canary-3f9a77"
IDS = (b"s" * 32, b"i" * 16)  # the secret of an asker, a request id
CHAT = "/v1/chat/completions"
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": CANARY}], "max_tokens": 6, "seed": 1}


class Door:
    """A node's HTTP door, and what passes it: every byte that its application is given or gives."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.passed = bytearray()
        app = build_app(node.state, Random(7))

        async def tapped(scope: Scope, receive: Receive, send: Send) -> None:
            async def receiving() -> Message:
                message = await receive()
                self.passed += message.get("body", b"")
                return message

            async def sending(message: Message) -> None:
                self.passed += message.get("body", b"") + repr(message.get("headers")).encode()
                await send(message)

            await app(scope, receiving, sending)

        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app=tapped), base_url="http://127.0.0.1:8765")

    async def get(self, path: str) -> Any:
        return (await self.http.get(path)).json()

    async def post(self, path: str, body: object) -> httpx.Response:
        return await self.http.post(path, json=body)

    async def statement_of(self, peer: str) -> bytes:
        told = await self.get(f"/api/v1/peers/{peer}/sealing-key")
        return base64.b64decode(told["statement"])

    async def request(self, peer: Node, body: object = None, path: str = CHAT) -> Any:
        return CLIENT.Request(peer.id, await self.statement_of(peer.id), path, ASKED if body is None else body)

    async def send(self, request: Any) -> httpx.Response:
        return await self.http.post("/api/v1/sealed", content=request.to_json())

    async def sealed(self, peer: Node, body: object = None, path: str = CHAT) -> tuple[dict[str, Any], bytes]:
        """The head and body of one sealed answer."""
        request = await self.request(peer, body, path)
        response = await self.send(request)
        assert response.status_code == 200, response.text
        contents = [request.open(frame) for frame in frames_of(response.content)]
        assert request.is_whole
        return json.loads(contents[1]), b"".join(contents[2:])


def frames_of(content: bytes) -> list[bytes]:
    """The frames of an answer of the sealed route, signs of life left out."""
    frames, at = [], 0
    while at < len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        frames.append(content[at + 4 : at + 4 + size])
        at += 4 + size
    return [frame for frame in frames if frame]


def call_of(request: Any, remaining_ms: int = 120_000) -> SealedCall:
    return SealedCall(request_id=request.id, key=request.key, sealed=request.sealed, remaining_ms=remaining_ms)


def told(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body: dict[str, Any] = response.json()
    assert body["error"]["code"] == code
    return body


def plain_of(body: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key not in ("id", "created", "latency_ms")}


class Three:
    """The entry, the peer that serves, and one that stands by."""

    def __init__(self, swarm: Swarm, entry: Node, peer: Node, other: Node) -> None:
        self.swarm, self.entry, self.peer, self.other = swarm, entry, peer, other
        self.door = Door(entry)


@pytest.fixture
async def swarm() -> AsyncIterator[Swarm]:
    async with Swarm().running() as running:
        yield running


@pytest.fixture
async def three(swarm: Swarm) -> Three:
    entry, peer, other = await swarm.start(), await swarm.start(FakeRuntime()), await swarm.start(FakeRuntime())
    await swarm.settled()
    return Three(swarm, entry, peer, other)


# --- what can be sealed ---


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, ASKED),
        (CHAT, {**ASKED, "stream": True}),
        ("/v1/completions", {"prompt": CANARY, "max_tokens": 5}),
        ("/v1/embeddings", {"input": [CANARY, "b"]}),
        ("/api/v1/model/inference", {"text": CANARY, "max_tokens": 4}),
    ],
)
async def test_what_can_be_asked_can_be_asked_sealed(
    three: Three, autojump_clock: MockClock, path: str, body: dict[str, Any]
) -> None:
    head, got = await three.door.sealed(three.peer, body, path)
    plain = await three.door.http.post(path, json=body, headers={"x-peer": three.peer.id})
    assert head["status"] == plain.status_code == 200
    assert head["headers"]["x-served-by"] == three.peer.id
    assert head["headers"]["content-type"] == plain.headers["content-type"]
    if body.get("stream"):
        said = [list(CLIENT.words(iter([each]), path)) for each in (got, plain.content)]
        assert "".join(said[0]) == "".join(said[1]) != ""
        assert got.endswith(b"data: [DONE]\n\n")
    else:
        assert plain_of(json.loads(got)) == plain_of(plain.json())
    assert not three.other.engine.added


async def test_the_entry_may_be_the_peer_itself(swarm: Swarm, autojump_clock: MockClock) -> None:
    node = await swarm.start(FakeRuntime())
    head, body = await Door(node).sealed(node)
    assert head["status"] == 200
    assert json.loads(body)["choices"][0]["message"]["content"]
    assert node.engine.added[-1].priority is Priority.OWN
    request = await Door(node).request(node)
    door = Door(node)
    assert (await door.send(request)).status_code == 200
    told(await door.send(request), 409, "replayed")
    request = await door.request(node)
    request.sealed = request.sealed[:-1] + b"\0"
    told(await door.send(request), 400, "bad_seal")
    request.key = bytes(32)
    assert told(await door.send(request), 409, "sealing_key")["sealing_key"]


async def test_it_is_answered_on_the_account_of_the_peer_that_relays_it(
    three: Three, autojump_clock: MockClock
) -> None:
    await three.door.sealed(three.peer)
    asked = three.peer.engine.added[-1]
    assert (asked.requester, asked.priority) == (three.entry.id, Priority.STRANGER)
    assert asked.private
    statistics = three.peer.relay.serving.statistics()
    assert (statistics.opened, statistics.answered, statistics.cut) == (1, 1, 0)
    assert three.entry.inference.counts["sealed_relayed"] == 1


async def test_the_operators_defaults_count_for_what_is_sealed(three: Three, autojump_clock: MockClock) -> None:
    _, body = await three.door.sealed(three.peer, {"messages": ASKED["messages"]})
    assert json.loads(body)["usage"]["completion_tokens"] == 7


async def test_it_is_never_routed_on(three: Three, autojump_clock: MockClock) -> None:
    three.other.engine.facts = facts(name="rare")
    three.other.offer()
    await eventually(lambda: any(row.id == "rare" for row in three.peer.state.models()), 30)
    assert (await three.door.post(CHAT, {**ASKED, "model": "rare"})).status_code == 200
    before = len(three.other.engine.added)
    head, body = await three.door.sealed(three.peer, {**ASKED, "model": "rare"})
    assert head["status"] == 404
    assert json.loads(body)["error"]["code"] == "unknown_model"
    assert len(three.other.engine.added) == before


async def test_nothing_of_it_is_kept(three: Three, autojump_clock: MockClock) -> None:
    body = {**ASKED, "temperature": 0}
    for private in (True, False):
        for _ in range(2):
            text = json.dumps({"path": CHAT, "body": body, "private": private}).encode()
            head, _ = await spelt(three, text + b" \n\t" * 100)
            assert head["status"] == 200
            assert "x-cache" not in head["headers"]
    assert [asked.private for asked in three.peer.engine.added] == [True, True, False, False]


async def test_a_long_answer_is_cut_into_frames(three: Three, autojump_clock: MockClock) -> None:
    head, body = await three.door.sealed(three.peer, {"input": ["a"] * 200}, "/v1/embeddings")
    assert head["status"] == 200
    assert len(json.loads(body)["data"]) == 200


# --- who sees what ---


class Tap:
    """A stream whose frames are written down."""

    def __init__(self, stream: Stream, passed: bytearray) -> None:
        self._stream, self._passed = stream, passed
        self.peer = stream.peer
        self.close, self.reset = stream.close, stream.reset

    async def send(self, frame: bytes) -> None:
        self._passed += frame
        await self._stream.send(frame)

    async def receive(self) -> bytes:
        frame = await self._stream.receive()
        self._passed.extend(frame)
        return frame


@pytest.mark.parametrize("is_sealed", [True, False])
async def test_the_node_in_between_sees_neither_prompt_nor_answer(
    three: Three,
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    is_sealed: bool,
) -> None:
    """With a plain request the very same taps find both."""
    caplog.set_level(logging.DEBUG)
    passed = bytearray()
    transport = three.entry.network.transport
    open_stream = transport.open_stream

    async def tapped(peer: Any, protocol: str) -> Any:
        return Tap(await open_stream(peer, protocol), passed)

    monkeypatch.setattr(transport, "open_stream", tapped)
    body = {**ASKED, "stream": True, "max_tokens": 30, "model": "tale"}
    wrong = {**ASKED, "top_p": CANARY}  # an error that quotes what came
    if is_sealed:
        _, answer = await three.door.sealed(three.peer, body)
        head, error = await three.door.sealed(three.peer, wrong)
        assert head["status"] == 400
        said = list(CLIENT.words(iter([answer]), CHAT))
    else:
        plain = await three.door.http.post(CHAT, json=body, headers={"x-peer": three.peer.id})
        error = (await three.door.post(CHAT, wrong)).content
        said = list(CLIENT.words(iter([plain.content]), CHAT))
    assert CANARY.encode() in error
    words = [word for word in "".join(said).split(" ") if len(word) > 3]
    assert len(words) > 20
    seen = {
        "door": bytes(three.door.passed),
        "frames": bytes(passed),
        "status": json.dumps(three.entry.state.status(), default=str).encode(),
        "metrics": prometheus_text(three.entry.state.status()).encode(),
        "peers": json.dumps(three.entry.state.peers(), default=str).encode(),
        "log": caplog.text.encode(),
    }
    secret = [CANARY, base64.b64encode(CANARY.encode()).decode()[:-2], CANARY.encode().hex(), *words]
    found = {(place, word) for place, bytes_ in seen.items() for word in secret if word.encode() in bytes_}
    if is_sealed:
        assert found == set()
    else:
        assert {("door", CANARY), ("frames", CANARY), ("door", words[0]), ("frames", words[0])} <= found
    assert len(seen["door"]) > 1000
    assert len(seen["frames"]) > 1000


async def test_frames_of_single_tokens_are_of_one_length(three: Three, autojump_clock: MockClock) -> None:
    request = await three.door.request(three.peer, {**ASKED, "stream": True, "max_tokens": 30})
    frames = frames_of((await three.door.send(request)).content)
    assert [frames[0][0], frames[-1][0]] == [KIND_SALT, KIND_LAST]
    assert {frame[0] for frame in frames[1:-1]} == {KIND_MORE}
    assert len(frames) > 12
    assert {len(frame) for frame in frames[1:]} == {1 + PAD_BYTES + 16}


# --- what does not open ---


async def test_a_key_that_is_no_more_is_answered_with_the_present_one(
    three: Three, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = await three.door.request(three.peer)
    monkeypatch.setattr("crypto.sealing_keys.LIFE_S", 0.0)
    monkeypatch.setattr("crypto.sealing_keys.GRACE_S", 0.0)
    await trio.sleep(1)
    three.peer.relay.serving.tick()
    monkeypatch.undo()
    body = told(await three.door.send(request), 409, "sealing_key")
    assert body["error"]["retryable"] is True
    anew = CLIENT.Request(three.peer.id, base64.b64decode(body["sealing_key"]), CHAT, ASKED)
    assert anew.key != request.key
    assert (await three.door.send(anew)).status_code == 200
    assert three.peer.relay.serving.statistics().drops == {"other_key": 1}


async def test_what_was_sent_twice_or_changed_is_refused(three: Three, autojump_clock: MockClock) -> None:
    request = await three.door.request(three.peer)
    assert (await three.door.send(request)).status_code == 200
    told(await three.door.send(request), 409, "replayed")
    other = await three.door.request(three.peer)
    other.id = bytes(16)
    told(await three.door.send(other), 400, "bad_seal")
    assert len(three.peer.engine.added) == 1
    assert three.peer.relay.serving.statistics().drops == {"replayed": 1, "bad_seal": 1}
    assert three.entry.score(three.peer.id) == 0


async def test_what_is_sealed_to_one_peer_opens_at_no_other(three: Three, autojump_clock: MockClock) -> None:
    request = await three.door.request(three.peer)
    request.peer = three.other.id
    told(await three.door.send(request), 409, "sealing_key")


async def test_the_client_believes_no_key_of_anybody_else(three: Three, autojump_clock: MockClock) -> None:
    statement = await three.door.statement_of(three.other.id)
    with pytest.raises(CLIENT.Untrue):
        CLIENT.key_of(statement, three.peer.id)
    for at in range(0, len(statement), 7):
        changed = statement[:at] + bytes((statement[at] ^ 1,)) + statement[at + 1 :]
        with pytest.raises(CLIENT.Untrue):
            CLIENT.key_of(changed, three.other.id)
    assert len(CLIENT.key_of(statement, three.other.id)[0]) == 32


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"peer": "12D3KooWnobody"}, 400, "peer"),
        ({"peer": Identity(bytes(32)).peer_id}, 404, "peer"),
        ({"key": "AA"}, 400, "key"),
        ({"key": "=" * 40}, 400, "key"),
        ({"key": "é"}, 400, "key"),
        ({"request_id": base64.b64encode(bytes(15)).decode()}, 400, "request_id"),
        ({"sealed": base64.b64encode(bytes(79)).decode()}, 400, "sealed"),
        ({"sealed": base64.b64encode(bytes(SEALED_BYTES_MAX + 1)).decode()}, 400, "sealed"),
        ({"more": 1}, 400, "more"),
        ({"key": None}, 400, "key"),
    ],
)
async def test_a_bad_request_is_refused_at_the_door(
    three: Three, autojump_clock: MockClock, change: dict[str, Any], status: int, param: str
) -> None:
    good = json.loads((await three.door.request(three.peer)).to_json())
    response = await three.door.post("/api/v1/sealed", {**good, **change})
    assert response.status_code == status
    assert response.json()["error"]["param"] == param
    assert three.peer.relay.serving.statistics().opened == 0


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{}", b'{"path":"/v1/completions"}', b'{"path":1,"body":{}}', b"\xff", b"[" * 100_000,
     b'{"path":"/v1/completions","body":' + b"[" * 100_000, b'{"path":"/v1/completions","body":{},"x":1}'],
)  # fmt: skip
async def test_a_bad_plain_text_is_a_sealed_error(three: Three, autojump_clock: MockClock, text: bytes) -> None:
    head, body = await spelt(three, text)
    assert head["status"] == 400
    assert json.loads(body)["error"]["code"] == "bad_request"


async def spelt(three: Three, text: bytes) -> tuple[dict[str, Any], bytes]:
    """The answer to this plain text."""
    public, secret, request_id = CLIENT.key_of(await three.door.statement_of(three.peer.id), three.peer.id)[0], *IDS
    context = Context(network="main", peer=three.peer.id, request_id=request_id)
    sealed = seal_request(text, public=public, secret=secret, context=context)
    fields = {"key": public, "request_id": request_id, "sealed": sealed}
    body = {"peer": three.peer.id, **{name: base64.b64encode(value).decode() for name, value in fields.items()}}
    response = await three.door.post("/api/v1/sealed", body)
    opener = AnswerOpener(secret, context)
    contents = [opener.open(frame) for frame in frames_of(response.content)]
    assert opener.is_ended
    return json.loads(contents[1]), b"".join(contents[2:])


async def test_other_routes_of_the_door_are_not_there(three: Three, autojump_clock: MockClock) -> None:
    for path in ("/api/v1/training/start", "/metrics", "/api/v1/sealed", "/é?x"):
        head, _ = await three.door.sealed(three.peer, {}, path)
        assert head["status"] in (404, 405)


# --- who leaves, dies, is silent or lies ---


async def begun(frames: AsyncIterator[bytes], count: int = 4) -> None:
    for _ in range(count):
        await anext(frames)


async def test_who_leaves_frees_the_slot_at_the_peer(three: Three, autojump_clock: MockClock) -> None:
    request = await three.door.request(three.peer, {**ASKED, "stream": True, "max_tokens": 200})
    async with three.entry.state.sealed(call_of(request), three.peer.id, "own") as frames:
        await begun(frames)
        assert three.peer.engine.busy == 1
    await eventually(lambda: three.peer.engine.busy == 0, 1)
    assert three.entry.inference.running == 0
    await eventually(lambda: three.peer.relay.serving.statistics().cut == 1, 1)


async def test_a_client_that_closes_its_connection_frees_the_slot(three: Three, autojump_clock: MockClock) -> None:
    request = await three.door.request(three.peer, {**ASKED, "stream": True, "max_tokens": 200})
    app = build_app(three.entry.state, Random(7))
    gone, body = trio.Event(), [request.to_json()]

    async def receive() -> Message:
        if body:
            return {"type": "http.request", "body": body.pop()}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if three.peer.engine.busy:
            gone.set()

    scope = {"type": "http", "method": "POST", "path": "/api/v1/sealed", "headers": [], "query_string": b""}
    with trio.fail_after(10):
        await app({**scope, "raw_path": b"", "root_path": "", "client": None}, receive, send)
    await eventually(lambda: three.peer.engine.busy == 0, 1)


async def test_a_peer_that_dies_is_a_last_frame_that_says_so(three: Three, autojump_clock: MockClock) -> None:
    request = await three.door.request(three.peer, {**ASKED, "stream": True, "max_tokens": 200})
    responses: list[httpx.Response] = []

    async def ask() -> None:
        responses.append(await three.door.send(request))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await eventually(lambda: three.peer.engine.busy == 1, 5)
        await trio.sleep(1)
        await three.swarm.crash(three.peer)
    frames = frames_of(responses[0].content)
    assert frames[-1][0] == KIND_RELAY
    assert json.loads(frames[-1][1:])["error"]["code"] == "peer_failed"
    for frame in frames[:-1]:
        request.open(frame)
    assert not request.is_whole


async def test_the_deadline_is_the_requests_own(three: Three, autojump_clock: MockClock) -> None:
    request = await three.door.request(three.peer, {**ASKED, "max_tokens": 200})
    response = await three.door.http.post("/api/v1/sealed", content=request.to_json(), headers={"x-timeout-s": "2"})
    contents = [request.open(frame) for frame in frames_of(response.content)]
    assert json.loads(contents[1])["status"] == 408
    await eventually(lambda: three.peer.engine.busy == 0, 1)


@pytest.mark.slow
async def test_a_peer_that_works_long_shows_life(three: Three, autojump_clock: MockClock) -> None:
    request = await three.door.request(three.peer, {**ASKED, "max_tokens": 500})
    with trio.fail_after(60):
        response = await three.door.send(request)
    assert response.content.count(b"\0\0\0\0") >= 50 / KEEP_ALIVE_S - 1
    assert [request.open(frame) for frame in frames_of(response.content)]
    assert request.is_whole


async def ends_early(incoming: Incoming) -> None:
    await incoming.send(bytes(33))


async def is_silent(incoming: Incoming) -> None:
    await incoming.send(bytes(33))
    await trio.sleep_forever()


async def has_no_such_method(incoming: Incoming) -> None:
    raise RemoteError("unknown_method", "there is none", retryable=False)


def sends(frame: Any) -> Callable[[Incoming], Any]:
    async def handler(incoming: Incoming) -> None:
        await incoming.send(frame)

    return handler


def gives(result: Any) -> Callable[[Incoming], Any]:
    async def handler(incoming: Incoming) -> Any:
        await trio.lowlevel.checkpoint()
        return result

    return handler


@pytest.mark.parametrize(
    ("lie", "why", "is_fault"),
    [
        (ends_early, "before its last frame", False),
        (is_silent, "no sign of life", False),
        (has_no_such_method, "older node", False),
        (sends("text"), "broke the protocol", True),
        (sends(b"\x07junk"), "broke the protocol", True),
        (sends(bytes(40)), "broke the protocol", True),
        (sends(bytes((KIND_RELAY,)) + b"{}"), "broke the protocol", True),
        (sends(b"\x01" + bytes(70_000)), "broke the protocol", True),
        (gives(7), "broke the protocol", True),
        (gives({"statement": b""}), "broke the protocol", True),
    ],
)
async def test_a_peer_that_lies_or_fails_is_one_clear_error(
    swarm: Swarm, autojump_clock: MockClock, lie: Callable[[Incoming], Any], why: str, is_fault: bool
) -> None:
    entry, peer = await swarm.start(), await swarm.start(FakeRuntime(), lies={"sealed": lie})
    await swarm.settled()
    door = Door(entry)
    began = trio.current_time()
    response = await door.send(await door.request(peer))
    assert trio.current_time() - began < SILENT_S_MAX + 1
    body = response.json() if response.status_code != 200 else json.loads(frames_of(response.content)[-1][1:])
    assert body["error"]["code"] == "peer_failed"
    assert why in body["error"]["message"]
    assert (entry.score(peer.id) < 0) is is_fault
    assert entry.inference.running == 0
    assert entry.network.gossip.observations.observed(peer.id, trio.current_time()).state is State.CLOSED


async def test_a_peer_without_a_model_has_no_key(three: Three, autojump_clock: MockClock) -> None:
    door = Door(three.peer)
    told(await door.http.get(f"/api/v1/peers/{three.entry.id}/sealing-key"), 503, "not_ready")
    told(await three.door.http.get(f"/api/v1/peers/{three.entry.id}/sealing-key"), 503, "not_ready")
    told(await three.door.http.get("/api/v1/peers/nobody/sealing-key"), 400, "bad_request")


async def test_a_node_that_stops_relays_no_more(three: Three, autojump_clock: MockClock) -> None:
    request = await three.door.request(three.peer)
    three.entry.inference.draining = True
    told(await three.door.send(request), 503, "not_ready")
    with pytest.raises(NotReady):
        async with three.entry.state.sealed(call_of(request), three.peer.id, "own"):
            pass
    assert three.peer.relay.serving.statistics().opened == 0


async def test_who_has_too_many_is_refused_by_the_serving_peer(three: Three, autojump_clock: MockClock) -> None:
    three.peer.engine.slots, three.peer.engine.queue_max = 1, 2
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            request = await three.door.request(three.peer, {**ASKED, "max_tokens": 100})
            nursery.start_soon(three.door.send, request)
            await trio.sleep(0.1)
        head, body = await three.door.sealed(three.peer)
        nursery.cancel_scope.cancel()
    assert head["status"] in (429, 503)
    assert json.loads(body)["error"]["retryable"] is True


async def test_a_guests_route_is_this_node_alone(three: Three, autojump_clock: MockClock) -> None:
    hint = RouteHint(route=Route.LOCAL, guest=three.entry.id)
    got = await ask(three.peer, work(), hint)
    assert got.started[0].served_by == three.peer.id
    assert (three.peer.engine.added[-1].requester) == three.entry.id
    assert isinstance((await ask(three.entry, work(), hint)).error, RequestError)


# --- the client, over a real socket ---


@pytest.mark.slow
async def test_the_client_starts_again_elsewhere_and_says_so() -> None:
    """A real door; the first peer cuts its answer, the second gives a whole one."""
    said: list[str] = []
    async with Swarm().running() as swarm:
        entry = await swarm.start()
        bad = await swarm.start(FakeRuntime(step_s=0.001), lies={"sealed": ends_early})
        good = await swarm.start(FakeRuntime(step_s=0.001))
        await swarm.settled()
        async with trio.open_nursery() as nursery:
            stop = trio.Event()
            port = await nursery.start(partial(serve, build_app(entry.state, Random(7)), "127.0.0.1", 0, stop=stop))
            node = CLIENT.Node(f"http://127.0.0.1:{port}", timeout_s=10)

            def ask() -> str:
                peers = node.peers_with("tale")
                assert set(peers) == {bad.id, good.id}
                body = {**ASKED, "stream": True}
                parts = CLIENT.ask(node, [bad.id, good.id], CHAT, body, said.append)
                return "".join(CLIENT.words(parts, CHAT))

            with trio.fail_after(20):
                text = await trio.to_thread.run_sync(ask)
            assert text.count("w") == 6
            assert good.relay.serving.statistics().answered == 1
            nursery.cancel_scope.cancel()


@pytest.mark.interop
@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
async def test_the_client_in_javascript_gets_the_same_answer() -> None:
    """docs/clients/sealed.mjs: WebCrypto alone."""
    async with Swarm().running() as swarm:
        entry, peer = await swarm.start(), await swarm.start(FakeRuntime(step_s=0.001))
        await swarm.settled()
        async with trio.open_nursery() as nursery:
            stop = trio.Event()
            port = await nursery.start(partial(serve, build_app(entry.state, Random(7)), "127.0.0.1", 0, stop=stop))
            command = ["node", str(ROOT / "docs/clients/sealed.mjs"), f"http://127.0.0.1:{port}", CANARY]
            with trio.fail_after(60):
                done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
            assert done.returncode == 0, done.stderr.decode()
            assert done.stdout.decode().count("w") == 64
            assert peer.relay.serving.statistics().answered == 1
            nursery.cancel_scope.cancel()


async def test_the_web_passes_frames_and_errors_of_any_front() -> None:
    front = FakeFront()
    front.frames = [bytes(33), PeerFailed("it is gone")]
    app = build_app(front, Random(7))
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1:8765")
    peer = Identity(bytes(32)).peer_id
    body = {
        "peer": peer,
        "key": base64.b64encode(bytes(32)).decode(),
        "request_id": base64.b64encode(bytes(16)).decode(),
    }
    response = await http.post("/api/v1/sealed", json={**body, "sealed": base64.b64encode(bytes(80)).decode()})
    frames = frames_of(response.content)
    assert frames[0] == bytes(33)
    assert json.loads(frames[1][1:])["error"]["code"] == "peer_failed"
    assert front.seals[0][1:] == (peer, "own")
    assert response.headers["cache-control"] == "no-store"
