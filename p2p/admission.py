"""Who may connect to us now: counts and rates per address and in all.

Rules: core. Before its handshake a connection costs its peer nothing, so those are few, and when there are too many
the oldest yields: an honest handshake is done long before its turn comes. Loopback is this machine's own.

Source: SECURITY.md F7; go-libp2p swarm/connmgr limits (8 per IPv4 address, 0.2 new a second).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

from p2p.host_config import HostConfig

GROUPS_MAX = 4096  # addresses whose rate is remembered; the longest unseen is forgotten


@dataclass(slots=True)
class _Group:
    pending: int = 0
    live: int = 0
    tokens: float = 0.0
    filled_at: float = 0.0


@dataclass(slots=True, eq=False)
class Ticket:
    """One inbound connection, from accept to close."""

    group: str
    loopback: bool
    established: bool = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """Not now, and why; the word is a counter's name."""

    reason: str


class Admission:
    """Counts inbound connections. Times are monotonic seconds."""

    def __init__(self, config: HostConfig) -> None:
        self._config = config
        self._pending: OrderedDict[int, Ticket] = OrderedDict()
        self._groups: OrderedDict[str, _Group] = OrderedDict()

    @property
    def pending(self) -> int:
        """Connections whose handshake is not done."""
        return len(self._pending)

    def open(self, ip: str, now: float) -> tuple[Ticket | Refusal, Ticket | None]:
        """A connection from `ip` came: take it or not, and which other pending one must yield for it."""
        ticket = Ticket(*_group_of(ip))
        group = self._group(ticket.group, now)
        config = self._config
        if ticket.loopback:
            if group.pending >= config.pending_loopback_max:
                return Refusal("pending_per_ip"), None
        elif group.pending >= config.pending_per_ip_max:
            return Refusal("pending_per_ip"), None
        elif group.live >= config.connections_per_ip_max:
            return Refusal("connections_per_ip"), None
        elif group.tokens < 1.0:
            return Refusal("accept_rate"), None
        else:
            group.tokens -= 1.0
        yielding = None
        if len(self._pending) >= config.pending_max:
            yielding = next(iter(self._pending.values()))
            self.close(yielding)
        self._pending[id(ticket)] = ticket
        group.pending += 1
        return ticket, yielding

    def establish(self, ticket: Ticket) -> None:
        """The handshake is done. A ticket that yielded meanwhile stays closed."""
        if self._pending.pop(id(ticket), None) is not None:
            group = self._groups[ticket.group]
            group.pending -= 1
            group.live += 1
            ticket.established = True

    def close(self, ticket: Ticket) -> None:
        """The connection is gone. Once more is the same as once."""
        group = self._groups.get(ticket.group)
        if self._pending.pop(id(ticket), None) is not None:
            assert group is not None
            group.pending -= 1
        elif ticket.established:
            ticket.established = False
            assert group is not None
            group.live -= 1

    def _group(self, name: str, now: float) -> _Group:
        group = self._groups.get(name)
        burst = float(self._config.accepts_per_ip_burst)
        if group is None:
            self._forget_one()
            group = self._groups[name] = _Group(tokens=burst, filled_at=now)
        group.tokens = min(burst, group.tokens + (now - group.filled_at) * self._config.accepts_per_ip_s)
        group.filled_at = now
        self._groups.move_to_end(name)
        return group

    def _forget_one(self) -> None:
        """Keep the table bounded; addresses with live connections are bounded by those and stay."""
        if len(self._groups) >= GROUPS_MAX:
            idle = next((name for name, group in self._groups.items() if not group.pending and not group.live), None)
            if idle is not None:
                del self._groups[idle]


def _group_of(ip: str) -> tuple[str, bool]:
    """IPv4 by address, IPv6 by /56 (one site), and whether it is loopback. An odd text is a group of its own."""
    try:
        parsed = ip_address(ip.partition("%")[0])
    except ValueError:
        return ip, False
    if isinstance(parsed, IPv6Address):
        mapped = parsed.ipv4_mapped
        if mapped is not None:
            return str(mapped), mapped.is_loopback
        return f"{int(parsed) >> 72:x}/56", parsed.is_loopback
    return str(parsed), parsed.is_loopback
