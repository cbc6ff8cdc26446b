"""Who asks: on whose account a request is served, and how near they stand to this node.

Rules: core. This node's own clients go before peers in good standing, and those before strangers. Own clients that
come from this machine are one requester, those of elsewhere one for each address, a peer is one. What is kept of
answers, and what may wait, is counted by requester (node/cache.py, model/scheduler.py).
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from model.step import Priority

LOCAL = "own"  # all clients on this machine
STRANGER_PREFIX = "stranger:"  # opens the account of a client whom nobody vouched for
IPV6_PREFIX = 64  # one household has as many addresses as it likes


@dataclass(frozen=True, slots=True)
class Requester:
    """name: the account, unlike all others' of its class."""

    name: str
    priority: Priority


OWN = Requester(LOCAL, Priority.OWN)


def of_peer(peer: str, *, is_good: bool) -> Requester:
    """A peer that calls this node. is_good: it is in good standing here."""
    return Requester(peer, Priority.PEER if is_good else Priority.STRANGER)


def of_client(account: str) -> Requester:
    """A client of this node's own HTTP door; one that nobody vouched for comes after peers, as at theirs."""
    is_stranger = account.startswith(STRANGER_PREFIX)
    return Requester(account, Priority.STRANGER if is_stranger else Priority.OWN)


def account_of(host: str | None) -> str:
    """The name of a client of the HTTP door, by the address it comes from; None: not known, as over a local socket."""
    if host is None:
        return LOCAL
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if address.is_loopback:
        return LOCAL
    if isinstance(address, ipaddress.IPv6Address):
        return account_of(str(address.ipv4_mapped)) if address.ipv4_mapped else _network(address)
    return str(address)


def _network(address: ipaddress.IPv6Address) -> str:
    return str(ipaddress.ip_network((address, IPV6_PREFIX), strict=False))
