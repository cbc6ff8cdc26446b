"""SIGTERM at random instants of a node under load: every request ends in a way that its client can tell, and exit 0.

The whole of it, a hundred instants: `python -m pytest tests/real/test_stop.py -m soak -s`, which prints the counts.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from crypto.identity import Identity
from gossip.saved import Keeper
from node.commands.processes import Cluster, NodeProcess
from p2p.book import Book
from p2p.bootstrap import BookFile
from tests.real.conftest import PATIENCE_S, sees

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="signals")]
CLIENTS = 4
INSTANT_S_MAX = 1.5
TOKENS_MAX = 150
SEED = 20261122


def outcome(url: str, rng: random.Random) -> str:
    """Ask once; how it ended. Whatever begins with "unresolved" must not be."""
    body = {"model": "default", "prompt": "Once upon a time", "max_tokens": rng.randint(1, TOKENS_MAX)}
    stream = rng.random() < 0.6
    try:
        with httpx.stream(
            "POST", f"{url}/v1/completions", json={**body, "stream": stream}, timeout=PATIENCE_S
        ) as response:
            if response.status_code != 200 or not stream:
                return _whole(response)
            return _streamed(response)
    except httpx.TimeoutException as exc:
        return f"unresolved: {type(exc).__name__}"
    except httpx.TransportError as exc:  # the library tells its user that the connection ended
        return f"connection: {type(exc).__name__}"


def _whole(response: httpx.Response) -> str:
    told = json.loads(response.read())
    if response.status_code == 200:
        return "result" if told["choices"][0]["finish_reason"] in ("stop", "length") else f"unresolved: {told}"
    return _error(told, str(response.status_code))


def _error(told: dict[str, dict[str, str]], where: str) -> str:
    error = told.get("error", {})
    if isinstance(error.get("message"), str) and error.get("type") and "code" in error:
        return f"error: {where} {error['code']}"
    return f"unresolved: {where} without an error of OpenAI's shape: {told}"


def _streamed(response: httpx.Response) -> str:
    ended = "unresolved: a stream that ends without a word"
    for line in response.iter_lines():
        if line == "data: [DONE]":
            return ended
        if line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                ended = _error(event, "stream")
            elif any(choice["finish_reason"] for choice in event["choices"]):
                ended = "result"
    return "unresolved: no [DONE], and no error of the connection"


@pytest.mark.parametrize(
    ("status", "content", "ended"),
    [
        (200, 'data: {"choices": [{"finish_reason": "length"}]}\n\ndata: [DONE]\n\n', "result"),
        (200, 'data: {"choices": [{"finish_reason": null}]}\n\n', "unresolved"),  # cut, and nobody is told
        (200, 'data: {"choices": [{"finish_reason": null}]}\n\ndata: [DONE]\n\n', "unresolved"),
        (200, 'data: {"error": {"message": "m", "type": "t", "code": "c"}}\n\ndata: [DONE]\n\n', "error"),
        (200, 'data: {"error": {"message": "m"}}\n\ndata: [DONE]\n\n', "unresolved"),
        (503, '{"error": {"message": "m", "type": "t", "code": null}}', "error"),
        (503, '{"detail": "m"}', "unresolved"),
        (200, '{"choices": [{"finish_reason": null}]}', "unresolved"),
    ],
)
def test_this_test_can_tell_the_ends_apart(status: int, content: str, ended: str) -> None:
    response = httpx.Response(status, content=content)
    streamed = status == 200 and content.startswith("data")
    assert (_streamed(response) if streamed else _whole(response)).startswith(ended)


def ask_until(done: threading.Event, url: str, seed: int) -> Counter[str]:
    """Ask without pause until told to end."""
    rng, ends = random.Random(seed), Counter[str]()
    while not done.is_set():
        ended = outcome(url, rng)
        ends[ended] += 1
        if ended != "result":
            time.sleep(0.05)  # nobody is there: no use in asking a thousand times a second
    return ends


def state_loads(root: Path) -> None:
    """The state files of a node that has ended are whole, and nothing is left beside."""
    left = sorted(item.name for item in root.iterdir())  # first, since reading sweeps
    assert not [name for name in left if "tmp" in name or "corrupt" in name or "heard" in name], left
    keeper, book = Keeper(root / "gossip.json"), BookFile(root / "addresses.json")
    assert keeper.load().sequence > 0
    book.load(Book(Identity.make().peer_id, random.Random(0)), 0.0)
    for status in (keeper.status(), book.status()):
        assert status is not None
        assert (status.set_aside, status.failures) == ("", {})


def stop_at_random_instants(cluster: Cluster, instants: int) -> Counter[str]:
    """Stop the one that serves and the door in turn, under load through the door; how all requests ended."""
    rng, ends = random.Random(SEED), Counter[str]()
    addresses = {name: cluster.reserve(name) for name in ("server", "door")}

    def start(name: str) -> NodeProcess:
        model = ("--model", "none") if name == "door" else ("--max-batch", "4")
        return cluster.start(name, *model, join=[address for other, address in addresses.items() if other != name])

    nodes = {name: start(name) for name in addresses}
    for instant in range(instants):
        for node in nodes.values():
            node.wait_ready()
        sees(nodes["door"], 1)
        name = ("server", "door")[instant % 2]
        victim, done = nodes[name], threading.Event()
        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(ask_until, done, nodes["door"].url, rng.randrange(1 << 30)) for _ in range(CLIENTS)]
            try:
                time.sleep(rng.uniform(0.0, INSTANT_S_MAX))
                victim.process.send_signal(signal.SIGTERM)
                code = victim.process.wait(timeout=PATIENCE_S)
            finally:
                done.set()
            for client in clients:
                ends += client.result(timeout=2 * PATIENCE_S)
        assert code == 0, victim.log[-4000:]
        unresolved = {end: count for end, count in ends.items() if end.startswith("unresolved")}
        assert not unresolved, f"instant {instant} of seed {SEED}, {name} stopped: {unresolved}\n{victim.log[-4000:]}"
        state_loads(cluster.root / name)
        nodes[name] = start(name)
    return ends


def test_a_stop_under_load_leaves_no_request_unresolved(cluster: Cluster) -> None:
    ends = stop_at_random_instants(cluster, 3)
    assert ends["result"] > 0


@pytest.mark.soak
def test_a_hundred_stops_under_load_leave_no_request_unresolved(cluster: Cluster) -> None:
    began = time.monotonic()
    ends = stop_at_random_instants(cluster, 100)
    print(json.dumps({"instants": 100, "seed": SEED, "requests": ends.total(), "ends": dict(sorted(ends.items()))}))
    print(f"{time.monotonic() - began:.0f} s")
