"""What a node adds to the server behind it: the same answers asked of the server and through the node, in turns.

Rules: the two are asked in turns, and the ratio is of each pair; absolute times on a shared machine say little. The
server is a small one in this process, whose tokens are there as fast as they are taken: what is measured is cost.
Run: python -m bench.outside [--quick] [--json FILE]
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import httpx
import trio

from bench.harness import Row, options, report
from node.upstream import Upstream
from node.upstream_http import Server
from node.upstream_watch import UpstreamConfig
from node.web.door import Door, DoorConfig
from node.web.serve import serve
from node.work import Finished, GenerateWork, Piece, Sampling

PROMPT = "Once upon a time"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """A server whose every token is ready."""
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return
    body = b""
    while True:
        part = await receive()
        body += part.get("body", b"")
        if not part.get("more_body"):
            break
    asked = json.loads(body) if body else {}
    if asked.get("stream"):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        async for content in _events(asked["max_tokens"]):
            event = b"data: " + content + b"\n\n"
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
        return
    told = {"data": [{"id": "tale", "owned_by": "someone"}], "choices": [{"text": "x"}]}
    status = 404 if scope["path"].startswith(("/api", "/v1/embeddings")) else 200
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps(told).encode(), "more_body": False})


async def _events(count: int) -> AsyncIterator[bytes]:
    for number in range(count):
        yield json.dumps({"id": "x", "choices": [{"index": 0, "text": f" w{number}", "finish_reason": None}]}).encode()
    yield json.dumps({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}).encode()


async def direct(client: httpx.AsyncClient, url: str, tokens: int) -> int:
    """Ask the server itself, reading each line as a client would; the events that came."""
    body = {"model": "tale", "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "stream": True}
    events = 0
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                json.loads(line[6:])
                events += 1
    return events


async def through(upstream: Upstream, tokens: int) -> int:
    """Ask through the node's backend; the tokens that came."""
    sampling = Sampling(max_tokens=tokens, temperature=0.0)
    made = 0
    async with upstream.generate(GenerateWork(request_id="q", text=PROMPT, sampling=sampling)) as items:
        async for item in items:
            made += len(item.tokens) if isinstance(item, Piece) else 0
            if isinstance(item, Finished):
                return made
    raise RuntimeError("no whole answer")


async def measured(ask: Callable[[], Awaitable[int]]) -> tuple[float, float]:
    """Seconds of wall and of this process's CPU for each token."""
    wall, cpu = time.perf_counter(), time.process_time()
    made = await ask()
    return (time.perf_counter() - wall) / made, (time.process_time() - cpu) / made


async def run(tokens: int, turns: int) -> list[Row]:
    """The figures."""
    async with trio.open_nursery() as nursery:
        port = await nursery.start(serve, Door(app, DoorConfig()), "127.0.0.1", 0)
        url = f"http://127.0.0.1:{port}"
        upstream = Upstream(Server(url, None), UpstreamConfig(), peer="us", on_change=lambda: None)
        await nursery.start(upstream.run)
        async with httpx.AsyncClient(trust_env=False, timeout=60.0) as client:
            asks = (partial(direct, client, url, tokens), partial(through, upstream, tokens))
            for ask in asks:
                await ask()
            pairs = [[await measured(ask) for ask in asks] for _ in range(turns)]
        nursery.cancel_scope.cancel()
    itself, by_node = [[statistics.median(pair[side][kind] for pair in pairs) for kind in (0, 1)] for side in (0, 1)]
    ratio = statistics.median(pair[1][0] / pair[0][0] for pair in pairs)
    rival = "the server itself"
    return [
        Row(
            figure="wall_us_token",
            value=1e6 * by_node[0],
            unit="us",
            better="lower",
            rival=rival,
            rival_value=1e6 * itself[0],
        ),
        Row(
            figure="cpu_us_token",
            value=1e6 * by_node[1],
            unit="us, both ends",
            better="lower",
            rival=rival,
            rival_value=1e6 * itself[1],
        ),
        Row(figure="wall_ratio", value=ratio, unit="x the server itself, median of pairs", better="lower"),
    ]


if __name__ == "__main__":
    chosen = options(__doc__)
    report("outside", trio.run(run, *((200, 3) if chosen.quick else (1_000, 9))), chosen)
