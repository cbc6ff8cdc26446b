"""The other end of `python -m bench.limits`: whoever floods the door with one key, or dribbles bodies into it.

Rules: a process of its own, told what to do by its arguments; it says `ready`, waits for a line, and at its end prints
what it saw as JSON. Raw HTTP over a few kept connections, so that it costs less than the node that it asks.
Run: python -m bench.limits_end flood HOST PORT KEY RATE SECONDS | dribble HOST PORT KEY COUNT SECONDS
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import trio
import trio.lowlevel

CONNECTIONS = 24
ADDRESSES = 6  # of loopback: a node takes at most 256 connections of one
BODY = b'{"prompt": "Once upon a time", "max_tokens": 1, "temperature": 0}'
DRIBBLE_S = 1.0  # a byte a second is never idle for long


def head(key: str, length: int) -> bytes:
    """The head of a completion."""
    lines = ["POST /v1/completions HTTP/1.1", "host: localhost", f"authorization: Bearer {key}"]
    return "\r\n".join([*lines, "content-type: application/json", f"content-length: {length}", "", ""]).encode()


async def connect(host: str, port: int, number: int) -> trio.SocketStream:
    """A connection from one of several addresses of loopback."""
    sock = trio.socket.socket()
    await sock.bind((f"127.0.0.{2 + number % ADDRESSES}", 0))
    await sock.connect((host, port))
    return trio.SocketStream(sock)


async def answer(stream: trio.SocketStream) -> tuple[int, bool]:
    """The status of the next answer, and whether the connection goes on. Raises BrokenResourceError."""
    raw = b""
    while b"\r\n\r\n" not in raw:
        part = await stream.receive_some()
        if not part:
            raise trio.BrokenResourceError
        raw += part
    told, _, rest = raw.partition(b"\r\n\r\n")
    lines = told.lower().split(b"\r\n")
    length = next((int(line[16:]) for line in lines if line.startswith(b"content-length: ")), 0)
    while len(rest) < length:
        part = await stream.receive_some()
        if not part:
            raise trio.BrokenResourceError
        rest += part
    return int(lines[0].split()[1]), b"connection: close" not in lines


async def flood(host: str, port: int, key: str, rate: float, seconds: float) -> dict[str, Any]:
    """`rate` requests a second, whatever comes back; each waits for its answer, and is late when none is free."""
    statuses: Counter[int] = Counter()
    times_s: list[float] = []
    request = head(key, len(BODY)) + BODY
    due, began = 0, trio.current_time()

    async def work(number: int) -> None:
        nonlocal due
        stream: trio.SocketStream | None = None
        while True:
            at, due = began + due / rate, due + 1
            if at >= began + seconds or trio.current_time() >= began + seconds:
                break
            await trio.sleep_until(at)
            asked = time.perf_counter()
            try:
                stream = stream or await connect(host, port, number)
                await stream.send_all(request)
                status, goes_on = await answer(stream)
            except (trio.BrokenResourceError, OSError):
                status, goes_on = 0, False
            statuses[status] += 1
            times_s.append(time.perf_counter() - asked)
            if not goes_on and stream is not None:
                await stream.aclose()
                stream = None

    async with trio.open_nursery() as nursery:
        for number in range(CONNECTIONS):
            nursery.start_soon(work, number)
    took_s = trio.current_time() - began
    return {"statuses": statuses, "times_s": times_s, "per_s": sum(statuses.values()) / took_s}


async def dribble(host: str, port: int, key: str, count: float, seconds: float) -> dict[str, Any]:
    """`count` connections that each begin a body and send a byte of it now and then, anew when they are cut."""
    opened = cut = 0

    async def work(number: int) -> None:
        nonlocal opened, cut
        while True:
            try:
                stream = await connect(host, port, number)
                opened += 1
                async with stream:
                    await stream.send_all(head(key, len(BODY)))
                    while True:
                        await trio.sleep(DRIBBLE_S)
                        await stream.send_all(b" ")
            except (trio.BrokenResourceError, OSError):
                cut += 1
                await trio.sleep(DRIBBLE_S)

    with trio.move_on_after(seconds):
        async with trio.open_nursery() as nursery:
            for number in range(int(count)):
                nursery.start_soon(work, number)
                await trio.lowlevel.checkpoint()
    return {"opened": opened, "cut": cut}


def main() -> None:
    """Do what the arguments say."""
    kind, host, port, key, amount, seconds = sys.argv[1:]
    attacks: dict[str, Callable[..., Any]] = {"flood": flood, "dribble": dribble}
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(trio.run(attacks[kind], host, int(port), key, float(amount), float(seconds))), flush=True)


if __name__ == "__main__":
    main()
