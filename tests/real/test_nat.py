"""Two nodes behind NAT, each in a home of its own, and public nodes that relay: real processes in real namespaces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from node.commands.processes import Cluster, NodeProcess
from tests.real.conftest import eventually
from tests.real.namespaces import Wide, asked, inside, told, wide

pytestmark = [pytest.mark.real, pytest.mark.slow]

FOUND_S = 150.0  # hang guards, on a machine with much else to do
READY_S = 300.0


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


def two_homes(cluster: Cluster, net: Wide, ports: str) -> tuple[dict[str, str], dict[str, NodeProcess]]:
    """Two public nodes that hold no model, and two nodes in homes of their own, one of which serves."""
    hosts = {
        "relay": net.public("r", "11.0.1.1/8"),
        "witness": net.public("s", "11.0.2.1/8"),
        "door": net.home("d", "11.0.3.1/8", ports=ports),
        "server": net.home("e", "11.0.4.1/8", ports=ports),
    }
    none, at_home = ("--model", "none"), ("--listen", "/ip4/192.168.1.2/tcp/4001")
    nodes: dict[str, NodeProcess] = {}

    def start(name: str, *flags: str, join: list[str]) -> None:
        known = [nodes[each] for each in join]
        nodes[name] = cluster.start(name, *flags, join=known, inside=inside(hosts[name]))

    start("relay", *none, "--listen", "/ip4/11.0.1.1/tcp/4001", join=[])
    nodes["relay"].wait_ready()
    start("witness", *none, "--listen", "/ip4/11.0.2.1/tcp/4001", join=["relay"])
    nodes["witness"].wait_ready()
    start("door", *none, *at_home, join=["relay", "witness"])
    start("server", *at_home, join=["relay", "witness"])
    for name in ("door", "server"):
        nodes[name].wait_ready(READY_S)
    return hosts, nodes


def test_two_homes_serve_each_other_through_a_relay(cluster: Cluster, internet: Wide) -> None:
    """Routers that show another port to each destination: no hole can be punched, and nobody says that one was."""
    hosts, nodes = two_homes(cluster, internet, "random")
    door, server, relay = nodes["door"], nodes["server"], nodes["relay"]
    for node in (door, server):
        said = becomes(hosts[node.name], node, "relayed")
        assert set(said["relays"]) <= {relay.peer_id, nodes["witness"].peer_id}
        assert "0 of 2 reached 11.0." in said["reason"]
        assert any("/p2p-circuit/" in each for each in told(hosts[node.name], node)["node"]["listen"])
    eventually("the homes are connected", lambda: row(hosts["door"], door, server) is not None, FOUND_S)

    answer = asked(hosts["door"], door)
    assert answer["served_by"] == server.peer_id
    assert answer["text"]
    seen = row(hosts["door"], door, server)
    assert seen is not None
    assert seen["relayed"]
    assert seen["address"].endswith("/p2p-circuit")
    assert reach(hosts["door"], door)["relayed_peers"] == 1
    carried = [reach(hosts[name], nodes[name])["carried"] for name in ("relay", "witness")]
    assert sum(each["bytes_total"] for each in carried) > 1000
    becomes(hosts["relay"], relay, "public")
    eventually("a hole was tried in vain", lambda: punch_failed(hosts, nodes), FOUND_S)
    assert reach(hosts["door"], door)["punched"] == reach(hosts["server"], server)["punched"] == 0


def punch_failed(hosts: dict[str, str], nodes: dict[str, NodeProcess]) -> bool:
    drops = [told(hosts[name], nodes[name])["transport"]["drops"] for name in ("door", "server")]
    return any(reason.startswith("punch_") for each in drops for reason in each)


def test_two_homes_come_to_a_direct_connection(cluster: Cluster, internet: Wide) -> None:
    """Routers that keep the port: both sides dial at once, and what they say of the connection is what it is."""
    hosts, nodes = two_homes(cluster, internet, "")
    door, server = nodes["door"], nodes["server"]

    def direct() -> bool:
        rows = row(hosts["door"], door, server), row(hosts["server"], server, door)
        return all(each is not None and not each["relayed"] for each in rows)

    eventually("the homes are connected directly", direct, FOUND_S)
    seen = row(hosts["door"], door, server)
    assert seen is not None
    assert seen["address"] == "/ip4/11.0.4.1/tcp/4001"
    assert reach(hosts["door"], door)["punched"] + reach(hosts["server"], server)["punched"] == 2
    for node in (door, server):
        said = reach(hosts[node.name], node)
        assert (said["verdict"], said["relayed_peers"]) == ("relayed", 0), "others still need the relay"
    for _ in range(3):
        assert asked(hosts["door"], door)["served_by"] == server.peer_id

    def circuits() -> int:
        return sum(reach(hosts[name], nodes[name])["carried"]["circuits"] for name in ("relay", "witness"))

    eventually("the relays carry nothing any more", lambda: circuits() == 0, FOUND_S)
    assert asked(hosts["door"], door)["served_by"] == server.peer_id


def test_ipv6_beside_ipv4(cluster: Cluster, internet: Wide) -> None:
    """A node of both families, one of IPv4 and two of IPv6: listening, adverts, dialling, the book, the verdict."""
    addresses = {
        "both": ("11.0.1.1/8", "2a00:0:1::1/16"),
        "four": ("11.0.2.1/8",),
        "six": ("2a00:0:3::1/16",),
        "seven": ("2a00:0:4::1/16",),
    }
    hosts = {name: internet.public(name[:2], *each) for name, each in addresses.items()}
    nodes: dict[str, NodeProcess] = {}
    for name, each in addresses.items():
        flags = [] if name == "six" else ["--model", "none"]
        for address in each:
            ip = address.partition("/")[0]
            flags += ["--listen", f"/ip{6 if ':' in ip else 4}/{ip}/tcp/4001"]
        known = nodes["both"].ready["listen"] if nodes else []
        mine = [at for at in known if at.startswith("/ip6/") == (name != "four")]
        nodes[name] = cluster.start(name, *flags, join=mine, inside=inside(hosts[name])).wait_ready(READY_S)
    both = nodes["both"]
    assert {at.split("/")[1] for at in both.ready["listen"]} == {"ip4", "ip6"}

    said = becomes(hosts["both"], both, "public")
    eventually("both families were tried", lambda: "IPv4: " in reach(hosts["both"], both)["reason"], FOUND_S)
    said = reach(hosts["both"], both)
    assert "IPv6: 2 of 2 reached 2a00:0:1::1" in said["reason"]
    assert said["public_addresses"] == ["/ip6/2a00:0:1::1/tcp/4001"], "of IPv4 one peer alone could tell"
    seven, six = nodes["seven"], nodes["six"]
    eventually("two of IPv6 find each other", lambda: row(hosts["seven"], seven, six) is not None, FOUND_S)
    seen = row(hosts["seven"], seven, six)
    assert seen is not None
    assert seen["address"].startswith("/ip6/2a00:0:3::1/tcp/")
    assert asked(hosts["seven"], seven)["served_by"] == six.peer_id
    assert asked(hosts["both"], both)["served_by"] == six.peer_id
    four = row(hosts["both"], both, nodes["four"])
    assert four is not None
    assert four["address"].startswith("/ip4/11.0.2.1/tcp/")
