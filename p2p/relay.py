"""What this node carries for others as a relay: who has a place, which circuits are open, how much they may use.

Rules: core. A peer reserves for itself alone, over its own direct connection, and its place ends with that connection.
A circuit is opened only to a peer that holds a place. Everything is bounded: places, places of one network, circuits,
circuits of one peer, seconds and bytes of one circuit, bytes a second of all of them, requests of one peer. A place
once given is not taken away for a newcomer's sake. Times are monotonic seconds.

Source: libp2p specs, relay/circuit-v2.md; go-libp2p p2p/protocol/circuitv2/relay/resources.go (the kinds of limits;
its 128 KiB and 2 minutes a circuit are for hole punching only, ours carry requests).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from crypto.identity import PeerId
from p2p.allowance import Allowance, Buckets

ASKERS_MAX = 1024  # peers whose rate of requests is remembered; the longest unheard is forgotten
ASKS_BURST = 8.0  # reserve and connect requests of one peer
ASKS_PER_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayLimits:
    """How much of this node others may use as a relay."""

    reservations_max: int = 64
    reservations_per_group_max: int = 8  # of one /24 or /56
    reservation_s: float = 1800.0
    circuits_max: int = 64
    circuits_per_peer_max: int = 8  # as either end
    circuit_s: float = 3600.0
    circuit_bytes_max: int = 256 << 20  # both directions together
    bytes_per_s: float = 4 << 20  # of all circuits together
    burst_bytes: int = 1 << 20


@dataclass(slots=True, kw_only=True, eq=False)
class Circuit:
    """One open circuit. `bytes_left`: that it may still carry."""

    source: PeerId
    target: PeerId
    until: float
    bytes_left: int


@dataclass(frozen=True, slots=True)
class No:
    """Refused, and why; the word is a counter's name."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayStatistics:
    """What is carried now, and counts since start."""

    offered: bool
    reservations: int
    circuits: int
    circuits_total: int
    bytes_total: int
    refused: dict[str, int]


@dataclass(slots=True, kw_only=True)
class _Place:
    group: str | None
    until: float


class RelayDesk:
    """Gives places and circuits, and counts what they use. `offered`: whether newcomers are taken at all."""

    def __init__(self, limits: RelayLimits, *, offered: bool) -> None:
        self.limits = limits
        self.offered = offered
        self._places: dict[PeerId, _Place] = {}
        self._circuits: set[Circuit] = set()
        self._asks = Buckets(rate_per_s=ASKS_PER_S, burst=ASKS_BURST, keys_max=ASKERS_MAX)
        self._bytes = Allowance(limits.bytes_per_s, limits.burst_bytes)
        self._circuits_total = 0
        self._bytes_total = 0
        self._refused: Counter[str] = Counter()

    def reserve(self, peer: PeerId, group: str | None, now: float) -> float | No:
        """A place for `peer`, new or again: until when, or why not. `group`: its /24 or /56, None for no bound."""
        self._expire(now)
        if not self.offered:
            return self._no("relay_off")
        if not self._asks.take(peer, now):
            return self._no("relay_rate")
        if peer not in self._places:
            if len(self._places) >= self.limits.reservations_max:
                return self._no("relay_reservations")
            alike = sum(place.group == group for place in self._places.values())
            if group is not None and alike >= self.limits.reservations_per_group_max:
                return self._no("relay_reservations_of_group")
        until = now + self.limits.reservation_s
        self._places[peer] = _Place(group=group, until=until)
        return until

    def open(self, source: PeerId, target: PeerId, now: float) -> Circuit | No:
        """A circuit between two peers; the caller closes it whatever happens."""
        self._expire(now)
        if not self._asks.take(source, now):
            return self._no("relay_rate")
        if target not in self._places:
            return self._no("relay_no_reservation")
        if source == target:
            return self._no("relay_to_itself")
        if len(self._circuits) >= self.limits.circuits_max:
            return self._no("relay_circuits")
        for peer in (source, target):
            if sum(peer in (each.source, each.target) for each in self._circuits) >= self.limits.circuits_per_peer_max:
                return self._no("relay_circuits_of_peer")
        circuit = Circuit(
            source=source,
            target=target,
            until=now + self.limits.circuit_s,
            bytes_left=self.limits.circuit_bytes_max,
        )
        self._circuits.add(circuit)
        self._circuits_total += 1
        return circuit

    def close(self, circuit: Circuit) -> None:
        """The circuit is over. Once more is the same as once."""
        self._circuits.discard(circuit)

    def spend(self, circuit: Circuit, size: int, now: float) -> float | No:
        """`size` bytes are to be carried: how many seconds to wait before that, or that the circuit has had enough."""
        if circuit.bytes_left < size:
            return self._no("relay_circuit_bytes")
        circuit.bytes_left -= size
        self._bytes_total += size
        return self._bytes.spend(size, now)

    def overdue(self) -> None:
        """A circuit reached the end of its time."""
        self._no("relay_circuit_time")

    def gone(self, peer: PeerId) -> None:
        """The peer's connection is gone, and its place with it."""
        self._places.pop(peer, None)

    def holds(self, peer: PeerId, now: float) -> bool:
        """Whether a peer has a place."""
        self._expire(now)
        return peer in self._places

    def statistics(self, now: float) -> RelayStatistics:
        """A snapshot."""
        self._expire(now)
        return RelayStatistics(
            offered=self.offered,
            reservations=len(self._places),
            circuits=len(self._circuits),
            circuits_total=self._circuits_total,
            bytes_total=self._bytes_total,
            refused=dict(self._refused),
        )

    def _expire(self, now: float) -> None:
        for peer in [peer for peer, place in self._places.items() if place.until <= now]:
            del self._places[peer]

    def _no(self, reason: str) -> No:
        self._refused[reason] += 1
        return No(reason)
