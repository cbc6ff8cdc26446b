"""Clients that leave: whatever they asked, and whenever they go, nothing of theirs is left under way or charged."""

from __future__ import annotations

import base64
import json
from random import Random
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from node.api_keys import Keyring
from node.errors import NoRoom, RequestError
from node.web.app import build_app
from node.web.gate import Gate, GateConfig
from node.web.settings import WebConfig
from tests.fake_front import PEER, FakeFront, tale
from tests.test_api_keys import made

KEY, TEXT = made(tokens_per_min=1_000_000, concurrent=3, requests_per_s=1e5, burst=1e6)
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 9}
ASKED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {**CHAT, "n": 3},
    "/v1/completions": {"prompt": ["a", "b"], "stream": True, "max_tokens": 9},
    "/v1/embeddings": {"input": ["a", "b"]},
    "/v1/messages": {**CHAT, "stream": True},
    "/v1/messages/count_tokens": {"messages": CHAT["messages"]},
    "/v1/responses": {"input": "hello", "stream": True},
    "/api/chat": {"model": "fairy", "messages": CHAT["messages"]},
    "/api/v1/model/inference": {"text": "a", "max_tokens": 9},
    "/api/v1/sealed": {
        "peer": PEER,
        **{
            name: base64.b64encode(bytes(size)).decode()
            for name, size in (("key", 32), ("request_id", 16), ("sealed", 300))
        },
    },
}


class Ring:
    """Keys as a KeyFile has them."""

    def ring(self, now: float) -> Keyring:
        return Keyring((KEY,))


class Client:
    """Sends its body in parts, and leaves after so many of them or so many seconds, or is cut off by the server."""

    def __init__(self, path: str, parts: int, leaves_s: float, *, is_cut: bool) -> None:
        body = json.dumps(ASKED[path]).encode()
        size = -(-len(body) // 3)
        self.path = path
        self._parts = [body[at : at + size] for at in range(0, len(body), size)][:parts]
        self._is_whole = parts >= 3
        self._leaves_s = leaves_s
        self._is_cut = is_cut

    async def receive(self) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        if self._parts:
            part = self._parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self._parts) or not self._is_whole}
        if self._is_cut:
            await trio.sleep_forever()
        await trio.sleep(self._leaves_s)
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await trio.lowlevel.checkpoint()

    async def ask(self, app: Any) -> None:
        scope = {
            "type": "http",
            "method": "POST",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": b"",
            "headers": [(b"host", b"localhost"), (b"x-api-key", TEXT.encode()), (b"transfer-encoding", b"chunked")],
            "client": ("127.0.0.1", 4711),
        }
        with trio.move_on_after(self._leaves_s if self._is_cut else float("inf")):
            await app(scope, self.receive, self.send)


def ends(front: FakeFront, error: RequestError | None, step_s: float) -> None:
    """Have the front answer at this pace, and end well or in an error."""
    told = tale(["x"] * 4, step_s=step_s)
    front.script = lambda work: told if error is None else [*told[:4], error]
    front.embed_wait_s = step_s
    front.frames = [bytes(33), b"\1" + bytes(528), b"\2" + bytes(528) if error is None else error]


CLIENTS = st.tuples(
    st.sampled_from(sorted(ASKED)), st.integers(0, 3), st.sampled_from([0.0, 0.5, 1.0, 3.5, 60.0]), st.booleans()
)


@pytest.mark.slow
@given(
    clients=st.lists(CLIENTS, min_size=1, max_size=6),
    error=st.sampled_from([None, NoRoom("full")]),
    step_s=st.sampled_from([0.0, 1.0, 30.0]),
)
@settings(max_examples=80, deadline=None)
def test_who_leaves_leaves_nothing(
    clients: list[tuple[str, int, float, bool]], error: RequestError | None, step_s: float
) -> None:
    """And no failure of several answers at once is a bug."""

    async def run() -> None:
        front = FakeFront()
        ends(front, error, step_s)
        ring: Any = Ring()
        app = build_app(front, Random(1), WebConfig(gate=GateConfig(keys=ring, required=True, audience=PEER)))
        async with trio.open_nursery() as nursery:
            for path, parts, leaves_s, is_cut in clients:
                nursery.start_soon(Client(path, parts, leaves_s, is_cut=is_cut).ask, app)
        gate = app._app
        assert isinstance(gate, Gate)
        assert front.running == 0
        assert not gate._meter._running
        assert not gate._meter._tokens

    trio.run(run, clock=MockClock(autojump_threshold=0))
