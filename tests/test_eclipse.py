"""64 honest nodes among 256 sybils of four /24s: the cores that choose peers, in a small loop of seconds, seeded.

Book, Roster and Admission of each honest node are the real ones; a dial is a call, and takes no time. Sybils answer
every dial, dial everybody without pause, and know only each other.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from crypto.identity import PeerId, peer_id_of
from p2p.address import Address, Scope
from p2p.admission import Admission, Refusal, Ticket
from p2p.book import ANCHOR_AFTER_S, PEERS_PER_GROUP_MAX, Book, Source
from p2p.hello import EXCHANGE_PEERS_MAX, PROTOCOL_VERSION, Hello
from p2p.host_config import HostConfig
from p2p.roster import AskPeers, Disconnect, Greet, Probe, Roster

HONEST, SYBILS, SYBIL_GROUPS = 64, 256, 4
SYBIL_DIALS_PER_S = 8  # at each honest node
DIALS_MAX = 4


def address_of(number: int) -> Address:
    """Of peer `number`: honest ones live in networks of their own, sybils in four."""
    peer = peer_id_of(number.to_bytes(32, "big"))
    sybil = number - HONEST
    host = f"20.{number}.1.1" if sybil < 0 else f"45.{sybil % SYBIL_GROUPS}.7.{sybil // SYBIL_GROUPS + 1}"
    return Address(text=f"/ip4/{host}/tcp/4001/p2p/{peer}", host=host, port=4001, peer=peer, scope=Scope.PUBLIC)


ADDRESSES = [address_of(number) for number in range(HONEST + SYBILS)]
NUMBER = {address.peer: number for number, address in enumerate(ADDRESSES)}


def hello(address: Address) -> Hello:
    fields = {"protocol": PROTOCOL_VERSION, "network": "main", "agent": "test", "instance": "0" * 32}
    return Hello(**fields, addresses=[address.text], seen_at="")  # type: ignore[arg-type]


@dataclass
class Node:
    """An honest node's cores, and the places that its inbound peers hold."""

    address: Address
    rng: random.Random
    book: Book = field(init=False)
    roster: Roster = field(init=False)
    admission: Admission = field(init=False)
    tickets: dict[PeerId, Ticket] = field(default_factory=dict)
    began: float = 0.0
    met_honest: float | None = None

    def __post_init__(self) -> None:
        self.book = Book(self.address.peer, self.rng)
        self.roster = Roster(self.rng)
        self.admission = Admission(HostConfig())

    def honest_outbound(self) -> int:
        dialled = (member for member in self.roster.members.values() if member.dialled is not None)
        return sum(NUMBER[member.peer] < HONEST for member in dialled)


class Network:
    """Everybody, second by second."""

    def __init__(self, seed: int, *, inbound: bool = True) -> None:
        self.rng = random.Random(seed)
        self.inbound = inbound
        self.now = 0.0
        self.nodes: dict[int, Node] = {}

    def start(self, number: int, saved: bytes | None = None) -> Node:
        """A node with a list of ten peers of which eight are sybils; `saved` instead of it: a restart."""
        node = self.nodes[number] = Node(ADDRESSES[number], random.Random(self.rng.random()), began=self.now)
        if saved is not None:
            node.book.read_json(saved, self.now, 1e9 + self.now)
            return node
        others = self.rng.sample([other for other in range(HONEST) if other != number], 2)
        for other in others + self.rng.sample(range(HONEST, HONEST + SYBILS), 8):
            node.book.add(ADDRESSES[other], Source.EXCHANGE, self.now)
        return node

    def stop(self, number: int) -> bytes:
        node = self.nodes.pop(number)
        for other in self.nodes.values():
            self.part(other, node.address.peer)
        return node.book.to_json(self.now, 1e9 + self.now)

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds)):
            self.now += 1.0
            for node in list(self.nodes.values()):
                if self.inbound:
                    for number in self.rng.sample(range(HONEST, HONEST + SYBILS), SYBIL_DIALS_PER_S):
                        self.dialled(node, ADDRESSES[number])
                self.dial(node)
                self.errands(node)
                for member in node.roster.members.values():
                    if member.dialled is not None:
                        node.book.lasted(member.dialled, self.now - member.since)

    def dial(self, node: Node) -> None:
        limit = min(node.roster.wanted(), DIALS_MAX)
        if limit <= 0:
            return
        busy, groups = frozenset(node.roster.members), node.roster.groups()
        for target in node.book.due(self.now, exclude=busy, groups=groups, alone=node.roster.alone, limit=limit):
            other = self.nodes.get(NUMBER[target.peer])
            if NUMBER[target.peer] < HONEST and (other is None or not self.dialled(other, node.address)):
                node.book.failed(target, self.now, "no place there")
            else:
                node.roster.connected(target.peer, self.now, target)

    def dialled(self, node: Node, caller: Address) -> bool:
        """Somebody comes; whether it is let in."""
        if caller.peer in node.roster.members:
            return True
        ticket, yielding = node.admission.open(caller.host, self.now)
        assert yielding is None, "handshakes take no time here"
        if isinstance(ticket, Refusal):
            return False
        refusal, gone = node.admission.establish(ticket, known=node.book.is_known(caller.peer))
        if gone is not None:
            self.part(node, next(peer for peer, held in node.tickets.items() if held is gone))
        if refusal is None:
            node.tickets[caller.peer] = ticket
            node.roster.connected(caller.peer, self.now, None)
        return refusal is None

    def part(self, node: Node, peer: PeerId) -> None:
        node.roster.lost(peer)
        if (ticket := node.tickets.pop(peer, None)) is not None:
            node.admission.close(ticket)
        other = self.nodes.get(NUMBER[peer])
        if other is not None and node.address.peer in other.roster.members:
            self.part(other, node.address.peer)

    def errands(self, node: Node) -> None:
        for errand in node.roster.tick(self.now):
            match errand:
                case Greet(peer=peer):
                    self.greet(node, peer)
                case Probe(peer=peer):
                    node.roster.pinged(peer, 0.05)
                case AskPeers(peer=peer):
                    for told in self.asked(peer):
                        node.book.add(told, Source.EXCHANGE, self.now)
                case Disconnect(peer=peer):
                    self.part(node, peer)
            node.roster.done(errand.peer)

    def greet(self, node: Node, peer: PeerId) -> None:
        theirs = ADDRESSES[NUMBER[peer]]
        node.roster.greet(peer, hello(theirs), self.now)
        node.book.add(theirs, Source.INBOUND, self.now)
        node.book.vouch(theirs, self.now)
        member = node.roster.members[peer]
        if member.dialled is not None:
            node.book.succeeded(member.dialled, self.now)
        if NUMBER[peer] < HONEST and node.met_honest is None:
            node.met_honest = self.now - node.began

    def asked(self, peer: PeerId) -> list[Address]:
        other = self.nodes.get(NUMBER[peer])
        if NUMBER[peer] >= HONEST:
            return [ADDRESSES[n] for n in self.rng.sample(range(HONEST, HONEST + SYBILS), EXCHANGE_PEERS_MAX)]
        if other is None:
            return []
        shared = other.book.share(self.now, Scope.PUBLIC, EXCHANGE_PEERS_MAX, peer)
        return [ADDRESSES[NUMBER[known]] for known, _ in shared]

    def reach(self) -> int:
        """How many honest nodes gossip reaches that goes by honest nodes alone."""
        reached, edge = {0}, [0]
        while edge:
            members = self.nodes[edge.pop()].roster.members
            new = {NUMBER[peer] for peer in members if NUMBER[peer] < HONEST} - reached
            reached |= new
            edge += new
        return len(reached)


def eclipsed(seed: int, seconds: float) -> Network:
    network = Network(seed)
    for number in range(HONEST):
        network.start(number)
        network.run(0.0 if number % 8 else 1.0)
    network.run(seconds)
    return network


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(2, 12))])
def test_honest_nodes_keep_honest_peers_of_their_own_choosing(seed: int) -> None:
    network = eclipsed(seed, 60.0)
    for node in network.nodes.values():
        groups: Counter[str] = node.roster.groups()
        assert max(groups.values()) <= PEERS_PER_GROUP_MAX
        assert node.honest_outbound() >= 3
        assert node.met_honest is not None
        assert node.met_honest < 60.0, "a list with eight sybils of ten"
    assert network.reach() == HONEST


@pytest.mark.slow
def test_a_restart_among_sybils_comes_back_to_honest_peers() -> None:
    network = eclipsed(3, 10.0)
    network.inbound = False  # their places are taken; this only saves time
    network.run(ANCHOR_AFTER_S + 10.0)
    network.inbound = True
    saved = {number: network.stop(number) for number in range(8)}
    anchors = {number: len(network.start(number, raw).book.anchors) for number, raw in saved.items()}
    assert set(anchors.values()) == {3}
    network.run(60.0)
    for number in range(8):
        node = network.nodes[number]
        assert node.honest_outbound() >= 3
        assert node.met_honest is not None
        assert node.met_honest < 60.0
    assert network.reach() == HONEST


@pytest.mark.slow
def test_a_restarted_node_dials_its_anchors_first() -> None:
    network = Network(4, inbound=False)
    for number in range(HONEST):
        network.start(number)
    network.run(ANCHOR_AFTER_S + 30.0)
    node = network.start(0, network.stop(0))
    assert len(node.book.anchors) == 3
    assert {address.peer for address in node.book.due(network.now, limit=3)} == set(node.book.anchors)
