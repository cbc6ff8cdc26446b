"""What the dashboard watches: one snapshot a second of the whole node, told to every open page as it changes.

Rules: however many pages watch, the node is asked once a second (its status every other), and not at all while none
does. A snapshot is cut into sections; a page gets a section when it has changed since that page's last event, so a slow
page skips what it missed and no queue grows. The samples of the last minutes come whole with the first event, then one
by one. A stream ends when its client leaves or the node stops, in words. Nothing here is made up or made smooth.

Source: WHATWG HTML, "Server-sent events".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import msgspec
import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from node.errors import NoRoom
from node.front import Front
from node.requester import LOCAL, account_of
from node.web.answers import wait_gone

EVERY_S = 1.0
STATUS_S = 2.0  # the status takes a millisecond to make, and its speeds are new every SAMPLE_S only
KEEP_ALIVE_S = 10.0  # a proxy or a page that hears nothing so long would take the node for dead
WATCHERS_MAX = 32
WATCHERS_EACH_MAX = 8  # of one client elsewhere, so that it leaves places for others
RETRY_S = 10.0
PEERS_TOLD_MAX = 64  # of each event; /api/v1/peers has all
SLOW_ROWS = 64  # with more peers than these, the list is made every SLOW_S only: it takes time for each
SLOW_S = 5.0
MEGABYTE = 1_000_000
FAR = float("inf")
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",  # nginx must not hold events back
}
END = b'event: end\ndata: {"why":"the node is stopping"}\n\n'
KEEP_ALIVE = b": keep-alive\n\n"
_ENGINE = ("slots_total", "slots_free", "queue_length", "queue_max", "kv_tokens_total", "kv_tokens_free")
_PEER = ("peer_id", "connected", "relayed", "address", "rtt_ms", "requests", "slots_free", "slots_total", "device")


class Live:
    """The snapshot that all watchers share. Owned by whichever of them wakes first in a second."""

    def __init__(self, front: Front, routes: frozenset[str]) -> None:
        """routes: the node's paths, so that a page asks only for what is there."""
        self._front = front
        self._routes = routes
        self._sections: dict[str, tuple[int, bytes]] = {}  # name -> number of its last change, JSON
        self._number = 0
        self._looked = self._peers_looked = self._status_looked = -FAR
        self._peers: dict[str, Any] = {"count": 0, "rows": []}
        self._uptime_s = 0.0
        self.watchers: Counter[str] = Counter()  # open pages, by the account of who watches

    def look(self, now: float) -> float:
        """Take a snapshot, if the last is a second old; when to look again."""
        if now - self._looked >= EVERY_S * 0.9:
            self._looked = now
            self._number += 1
            for name, told in self._told(now).items():
                encoded = msgspec.json.encode(told)
                if name not in self._sections or self._sections[name][1] != encoded:
                    self._sections[name] = (self._number, encoded)
        return self._looked + EVERY_S

    def event(self, seen: int) -> tuple[bytes, int]:
        """What has changed since the snapshot `seen` (0: all), as one event; b"" for nothing. And what is seen then."""
        parts = [b'"%s":%s' % (name.encode(), told) for name, (number, told) in self._sections.items() if number > seen]
        if seen == 0 or seen < self._number - 1:  # new, or it missed some
            samples = [asdict(sample) for sample in self._front.recent.samples]
            parts.append(b'"history":%s,"uptime_s":%.1f' % (msgspec.json.encode(samples), self._uptime_s))
        if not parts:
            return b"", self._number
        return b"id: %d\ndata: {%s}\n\n" % (self._number, b",".join(parts)), self._number

    def _told(self, now: float) -> dict[str, Any]:
        training = self._front.training.status()
        rounds = [_round(each) for each in training.pop("rounds", ())]
        samples = self._front.recent.samples
        return {
            **self._status(now),
            "peers": self._peer_rows(now),
            "models": [asdict(row) for row in self._front.models()],
            "training": training,
            "rounds": rounds,
            "sample": asdict(samples[-1]) if samples else None,
            "self": "/api/v1/self" in self._routes and self._front.itself is not None,
        }

    def _status(self, now: float) -> dict[str, Any]:
        if now - self._status_looked < STATUS_S * 0.9:
            return {}
        self._status_looked = now
        status = self._front.status()
        self._uptime_s = float(status.get("node", {}).get("uptime_s", 0.0))
        return {"node": _node(status), "health": _health(status), "load": _load(status), "model": _model(status)}

    def _peer_rows(self, now: float) -> dict[str, Any]:
        if now - self._peers_looked < SLOW_S and self._peers["count"] > SLOW_ROWS:
            return self._peers
        self._peers_looked = now
        rows = self._front.peers()
        rows.sort(key=_nearness)
        self._peers = {"count": len(rows), "rows": [_peer(row) for row in rows[:PEERS_TOLD_MAX]]}
        return self._peers


class Events:
    """GET /api/v1/events."""

    def __init__(self, live: Live, stop: trio.Event) -> None:
        self._live = live
        self._stop = stop

    async def events(self, request: Request) -> ASGIApp:
        """The stream. Raises NoRoom."""
        await trio.lowlevel.checkpoint()
        watchers, account = self._live.watchers, account_of(request.client.host if request.client else None)
        has_place = account == LOCAL or watchers[account] < WATCHERS_EACH_MAX
        if not has_place or watchers.total() >= WATCHERS_MAX:
            raise NoRoom(
                f"as many pages watch this node as may (WATCHERS_MAX {WATCHERS_MAX}, of one client elsewhere "
                f"{WATCHERS_EACH_MAX}): close one, or ask /api/v1/status",
                retry_after_s=RETRY_S,
            )
        if request.method != "GET":
            return Response(headers=HEADERS)
        return Watch(self._live, self._stop, account)


class Watch:
    """An ASGI response: what changes, for as long as the client stays and the node runs."""

    def __init__(self, live: Live, stop: trio.Event, account: str) -> None:
        """account: who watches (node/requester.py)."""
        self._live = live
        self._stop = stop
        self._account = account

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Tell until the client leaves or the node stops."""

        async def watch(cancel_scope: trio.CancelScope) -> None:
            await wait_gone(receive)
            cancel_scope.cancel()

        self._live.watchers[self._account] += 1
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch, nursery.cancel_scope)
                await self._tell(send)
                nursery.cancel_scope.cancel()
        finally:
            self._live.watchers[self._account] -= 1
            self._live.watchers += Counter()  # forgets who has none

    async def _tell(self, send: Send) -> None:
        headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        seen, told_at = 0, trio.current_time()
        while not self._stop.is_set():
            again = self._live.look(trio.current_time())
            event, seen = self._live.event(seen)
            if not event and trio.current_time() - told_at >= KEEP_ALIVE_S:
                event = KEEP_ALIVE
            if event:
                told_at = trio.current_time()
                await send({"type": "http.response.body", "body": event, "more_body": True})
            with trio.move_on_at(again):
                await self._stop.wait()
        await send({"type": "http.response.body", "body": END})


def _node(status: Mapping[str, Any]) -> dict[str, Any]:
    node = dict(status.get("node", {}))
    told = {name: node.get(name) for name in ("peer_id", "version", "network", "phase", "http", "listen")}
    return {**told, "memory_mb": round(node.get("rss_bytes", 0) / MEGABYTE)}


def _health(status: Mapping[str, Any]) -> dict[str, Any]:
    peering, reach, disk = status.get("peering", {}), status.get("reach"), status.get("disk", {})
    return {
        "readiness": status.get("readiness"),
        "reach": None if reach is None else {name: reach.get(name) for name in ("verdict", "reason", "advice")},
        "set_aside": disk.get("set_aside", []),
        "connected": peering.get("connected", 0),
        "known": peering.get("known", 0),
        "bootstrap": [str(each)[:300] for each in peering.get("refusals", [])][:5],
        "backend": status.get("backend"),
    }


def _load(status: Mapping[str, Any]) -> dict[str, Any]:
    inference = status.get("inference", {})
    told = {name: inference.get(name) for name in ("requests", "errors", "cancelled", "running", "completion_tokens")}
    for name in ("recent", "latency"):
        told[name] = status.get(name)
    takeovers = inference.get("counts", {}).get("takeovers", 0)
    return {**told, "takeovers": takeovers, "blobs": _blobs(status.get("blobs"))}


def _blobs(blobs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Bytes of bulk, which is what training sends."""
    return {way: sum(((blobs or {}).get(way) or {}).values()) for way in ("given", "fetched")}


def _model(status: Mapping[str, Any]) -> dict[str, Any] | None:
    model = status.get("model")
    if model is None:
        return None
    engine = model.get("engine", {})
    return {
        "models": model.get("models", []),
        "device": model.get("device"),
        "running": model.get("running", 0),
        **{name: engine.get(name) for name in _ENGINE},
    }


def _peer(row: Mapping[str, Any]) -> dict[str, Any]:
    observed = row.get("observed", {})
    return {
        **{name: row.get(name) for name in _PEER},
        "queue_length": row.get("queue_length"),
        "tok_s": row.get("decode_tok_s"),
        "state": observed.get("state"),
        "models": [{"name": model["name"], "revision": model["revision"]} for model in row.get("models", [])],
    }


def _nearness(row: Mapping[str, Any]) -> tuple[bool, bool, float, str]:
    """Connected peers first, of these whom requests go to or come from, then by the way there."""
    requests = row.get("requests") or {}
    busy = any(requests.get(name) for name in ("to_now", "from_now"))
    rtt_ms = row.get("rtt_ms")
    return not row.get("connected"), not busy, FAR if rtt_ms is None else rtt_ms, str(row.get("peer_id"))


def _round(told: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "round": told["round"],
        "loss": told["held_out_loss"],
        "seconds": round(told["seconds"], 2),
        "contributed": len(told["contributed"]),
        "missing": list(told["missing"]),
        "not_counted": told["not_counted"],
        "rule": told["rule"],
    }
