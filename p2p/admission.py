"""Who may connect to us now: counts and rates per address, per public subnet and in all; whose place is kept.

Rules: core. Before its handshake a connection costs its peer nothing, so those are few. When all places are taken the
most crowded network yields (of those before the handshake its oldest, of the others its newest), never one that is as
small as the newcomer's: whoever fills our places fills them against itself. Strangers never get the last places: some
are kept for peers that we know, and some for our own dials. Addresses of one public subnet (/24, IPv6 /56) cost their
owner as good as nothing and share a bound; those of a private network or of this machine cost a machine or are the
operator's own, so that they are counted singly (private) or only before the handshake (loopback).

Source: SECURITY.md F7, S1; go-libp2p swarm/connmgr limits (8 per IPv4 address, 0.2 new a second); bitcoin's
AttemptToEvictConnection (the most crowded group yields).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from p2p.host_config import HostConfig

GROUPS_MAX = 4096  # addresses and subnets whose rate is remembered; the longest unseen is forgotten


@dataclass(slots=True)
class _Group:
    pending: int = 0
    live: int = 0
    tokens: float = 0.0
    filled_at: float = 0.0


@dataclass(slots=True, eq=False)
class Ticket:
    """One inbound connection, from accept to close. `subnet`: None unless it is public."""

    host: str
    subnet: str | None
    loopback: bool
    established: bool = False
    known: bool = False

    @property
    def crowd(self) -> str:
        """The network whose size counts when somebody has to yield."""
        return self.subnet or self.host


@dataclass(frozen=True, slots=True)
class Refusal:
    """Not now, and why; the word is a counter's name."""

    reason: str


class Admission:
    """Counts inbound connections. Times are monotonic seconds."""

    def __init__(self, config: HostConfig) -> None:
        self._config = config
        self._pending: OrderedDict[int, Ticket] = OrderedDict()
        self._live: OrderedDict[int, Ticket] = OrderedDict()
        self._groups: OrderedDict[str, _Group] = OrderedDict()

    @property
    def pending(self) -> int:
        """Connections whose handshake is not done."""
        return len(self._pending)

    @property
    def live(self) -> int:
        """Inbound connections whose handshake is done."""
        return len(self._live)

    def open(self, ip: str, now: float) -> tuple[Ticket | Refusal, Ticket | None]:
        """A connection from `ip` came: take it or not, and which other pending one must yield for it."""
        ticket = _ticket(ip)
        refusal = self._refusal(ticket, now)
        if refusal is not None:
            return refusal, None
        yielding = None
        if len(self._pending) >= self._config.pending_max:
            yielding = _yielding(list(self._pending.values()), ticket) or next(iter(self._pending.values()))
            self.close(yielding)
        self._pending[id(ticket)] = ticket
        for name in _names(ticket):
            self._groups[name].pending += 1
        return ticket, yielding

    def _refusal(self, ticket: Ticket, now: float) -> Refusal | None:
        """Why a connection is not taken; its tokens are taken when it is."""
        config = self._config
        host = self._group(ticket.host, config.accepts_per_ip_s, config.accepts_per_ip_burst, now)
        if ticket.loopback:
            return Refusal("pending_per_ip") if host.pending >= config.pending_loopback_max else None
        if host.pending >= config.pending_per_ip_max:
            return Refusal("pending_per_ip")
        if host.live >= config.connections_per_ip_max:
            return Refusal("connections_per_ip")
        groups = [host]
        if ticket.subnet is not None:
            subnet = self._group(ticket.subnet, config.accepts_per_subnet_s, config.accepts_per_subnet_burst, now)
            if subnet.pending >= config.pending_per_subnet_max:
                return Refusal("pending_per_subnet")
            if subnet.live >= config.connections_per_subnet_max:
                return Refusal("connections_per_subnet")
            groups.append(subnet)
        if any(group.tokens < 1.0 for group in groups):
            return Refusal("accept_rate")
        for group in groups:
            group.tokens -= 1.0
        return None

    def establish(self, ticket: Ticket, *, known: bool = False) -> tuple[Refusal | None, Ticket | None]:
        """The handshake is done: why it gets no place all the same, or which live one must yield for it.

        known: a peer that places are kept for. A ticket that yielded meanwhile stays closed.
        """
        if id(ticket) not in self._pending:
            return Refusal("pending_yielded"), None
        strangers = [each for each in self._live.values() if not each.known]
        places = self._config.inbound_max
        yielding = None
        if len(self._live) >= places or (not known and len(strangers) >= places - self._config.places_kept):
            yielding = _yielding(list(reversed(strangers)), None if known else ticket)
            if yielding is None:
                self.close(ticket)
                return Refusal("no_place"), None
            self.close(yielding)
        del self._pending[id(ticket)]
        self._live[id(ticket)] = ticket
        for name in _names(ticket):
            group = self._groups[name]
            group.pending -= 1
            group.live += 1
        ticket.established, ticket.known = True, known
        return None, yielding

    def close(self, ticket: Ticket) -> None:
        """The connection is gone. Once more is the same as once."""
        if self._pending.pop(id(ticket), None) is not None:
            for name in _names(ticket):
                self._groups[name].pending -= 1
        elif self._live.pop(id(ticket), None) is not None:
            ticket.established = False
            for name in _names(ticket):
                self._groups[name].live -= 1

    def _group(self, name: str, rate_s: float, burst: float, now: float) -> _Group:
        group = self._groups.get(name)
        if group is None:
            self._forget_one()
            group = self._groups[name] = _Group(tokens=burst, filled_at=now)
        group.tokens = min(burst, group.tokens + (now - group.filled_at) * rate_s)
        group.filled_at = now
        self._groups.move_to_end(name)
        return group

    def _forget_one(self) -> None:
        """Keep the table bounded; addresses with live connections are bounded by those and stay."""
        if len(self._groups) >= GROUPS_MAX:
            idle = next((name for name, group in self._groups.items() if not group.pending and not group.live), None)
            if idle is not None:
                del self._groups[idle]


def _yielding(tickets: Sequence[Ticket], newcomer: Ticket | None) -> Ticket | None:
    """The first of the most crowded network; None when that is hardly larger than the newcomer's (None: no matter)."""
    sizes = Counter(ticket.crowd for ticket in tickets)
    if not sizes:
        return None
    most, size = sizes.most_common(1)[0]
    if newcomer is not None and size < sizes[newcomer.crowd] + 2:
        return None  # to swap the two would make no network smaller than the other
    return next(ticket for ticket in tickets if ticket.crowd == most)


def _names(ticket: Ticket) -> tuple[str, ...]:
    return (ticket.host,) if ticket.subnet is None else (ticket.host, ticket.subnet)


def _ticket(ip: str) -> Ticket:
    """IPv4 by address and /24; IPv6 by /64 (one link, all of it one machine's to use) and /56 (one site).

    An odd text is a host of its own.
    """
    try:
        parsed: IPv4Address | IPv6Address = ip_address(ip.partition("%")[0])
    except ValueError:
        return Ticket(host=ip, subnet=None, loopback=False)
    if isinstance(parsed, IPv6Address):
        parsed = parsed.ipv4_mapped or parsed
    bits = int(parsed)
    if isinstance(parsed, IPv6Address):
        host, subnet = (str(parsed) if parsed.is_loopback else f"{bits >> 64:x}/64"), f"{bits >> 72:x}/56"
    else:
        host, subnet = str(parsed), f"{bits >> 8:x}/24"
    return Ticket(host=host, subnet=subnet if parsed.is_global else None, loopback=parsed.is_loopback)
