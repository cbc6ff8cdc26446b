"""A swarm of four, asked without pause through two doors while the node that serves is killed: the contract holds.

The long form, with more nodes and faults: `python -m bench.real_swarm`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest

from bench.real_clients import ERROR, LEFT, REFUSED, RESULT, Client, DoorNow
from node.commands.processes import Cluster, NodeProcess
from tests.real.conftest import eventually, peers_serving

pytestmark = [pytest.mark.real, pytest.mark.slow]
CLIENTS = 3
HANG_S = 300.0  # a guard for a busy machine, never a measurement


def test_a_swarm_loses_no_request_when_a_serving_node_is_killed(cluster: Cluster) -> None:
    address = cluster.reserve("server-1")
    servers = {name: cluster.start(name, join=[address]) for name in ("server-1", "server-2")}
    doors = [cluster.start(f"door-{n}", "--model", "none", join=[address]) for n in (1, 2)]
    for node in (*servers.values(), *doors):
        node.wait_ready(HANG_S)
    for door in doors:
        eventually(f"{door.name} sees both servers", lambda door=door: peers_serving(door) >= 2, HANG_S)  # type: ignore[misc]
    doors_now = [DoorNow(name=door.name, url=door.url, killed=lambda: False) for door in doors]
    clients, done = [Client(lambda: doors_now, seed) for seed in range(CLIENTS)], threading.Event()
    threads = [threading.Thread(target=client.run, args=(done,), daemon=True) for client in clients]
    for thread in threads:
        thread.start()
    try:
        killed = serving_now(clients, servers)
        killed.process.kill()
        killed.process.wait()
        at = time.monotonic()
        eventually("requests asked after the kill have ended", lambda: ended_since(clients, at) >= CLIENTS, HANG_S)
    finally:
        done.set()
        for thread in threads:
            thread.join(timeout=HANG_S)
    assert not any(thread.is_alive() for thread in threads)
    requests = [request for client in clients for request in client.requests]
    ends = Counter(request.end for request in requests)
    assert set(ends) <= {RESULT, ERROR, REFUSED, LEFT}, [(one.end, one.why) for one in requests]
    interrupted = [one for one in requests if one.began < at < one.ended and one.served_by == killed.peer_id]
    assert interrupted, "nobody was being served by the node that was killed"
    assert [one.end for one in interrupted if one.end != LEFT] == [RESULT for one in interrupted if one.end != LEFT], [
        one.why for one in interrupted
    ]


def serving_now(clients: list[Client], servers: dict[str, NodeProcess]) -> NodeProcess:
    """A node that is in the middle of a long answer."""
    by_id = {node.peer_id: node for node in servers.values()}

    def found() -> list[NodeProcess]:
        current = [client.current for client in clients]
        return [
            by_id[one.served_by]
            for one in current
            if one is not None and one.streamed and one.tokens > 100 and 0 < len(one.arrivals) < one.tokens // 3
        ]

    seen: list[NodeProcess] = []
    eventually("an answer under way", lambda: seen.extend(found()) or seen, HANG_S)  # type: ignore[func-returns-value]
    return seen[0]


def ended_since(clients: list[Client], at: float) -> int:
    return sum(request.began > at and bool(request.end) for client in clients for request in client.requests)
