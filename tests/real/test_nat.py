"""Two nodes behind NAT, each in a home of its own, and public nodes that relay: real processes in real namespaces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from node.commands.processes import Cluster, NodeProcess
from tests.real.conftest import eventually
from tests.real.namespaces import Wide, asked, inside, told, wide

pytestmark = [pytest.mark.real, pytest.mark.slow]

FOUND_S = 90.0  # a hang guard


@pytest.fixture
def internet() -> Iterator[Wide]:
    with wide() as net:
        yield net


def reach(host: str, node: NodeProcess) -> dict[str, Any]:
    found: dict[str, Any] = told(host, node)["reach"]
    return found


def becomes(host: str, node: NodeProcess, verdict: str) -> dict[str, Any]:
    """Wait until a node's verdict of itself is that one."""
    eventually(f"{node.name} is {verdict}", lambda: reach(host, node)["verdict"] == verdict, FOUND_S)
    return reach(host, node)


def row(host: str, node: NodeProcess, peer: NodeProcess) -> dict[str, Any] | None:
    """What a node says of one of its peers; None while it is not connected."""
    rows = told(host, node)["peering"]["peers"]
    return next((each for each in rows if each["peer"] == peer.peer_id and each["phase"] == "greeted"), None)


def test_two_homes_serve_each_other_through_a_relay(cluster: Cluster, internet: Wide) -> None:
    near_relay = internet.public("r", "11.0.1.1/8")
    other_public = internet.public("s", "11.0.2.1/8")
    homes = {"door": internet.home("d", "11.0.3.1/8"), "server": internet.home("e", "11.0.4.1/8")}
    none = ("--model", "none")
    relay = cluster.start("relay", *none, "--listen", "/ip4/11.0.1.1/tcp/4001", inside=inside(near_relay)).wait_ready()
    witness = cluster.start(
        "witness", *none, "--listen", "/ip4/11.0.2.1/tcp/4001", join=[relay], inside=inside(other_public)
    ).wait_ready()
    at_home = ("--listen", "/ip4/192.168.1.2/tcp/4001")
    door = cluster.start("door", *none, *at_home, join=[relay, witness], inside=inside(homes["door"]))
    server = cluster.start("server", *at_home, join=[relay, witness], inside=inside(homes["server"]))
    door.wait_ready()
    server.wait_ready()

    for node in (door, server):
        said = becomes(homes[node.name], node, "relayed")
        assert set(said["relays"]) <= {relay.peer_id, witness.peer_id}
        assert "0 of 2 reached" in said["reason"]
    eventually("the homes are connected", lambda: row(homes["door"], door, server) is not None, FOUND_S)
    seen = row(homes["door"], door, server)
    assert seen is not None
    assert seen["relayed"] == seen["address"].endswith("/p2p-circuit")

    answer = asked(homes["door"], door)
    assert answer["served_by"] == server.peer_id
    assert answer["text"]
    carried = [reach(near_relay, relay)["carried"], reach(other_public, witness)["carried"]]
    assert sum(each["circuits_total"] for each in carried) >= 1
    becomes(near_relay, relay, "public")
