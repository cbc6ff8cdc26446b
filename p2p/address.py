"""What a dialable address is: a multiaddr of one TCP port at one host, with the id of the peer that answers there.

Rules: a name is believed from the operator only, an IP from anybody but never a nearer one than the teller's own:
a stranger on the internet cannot make us dial our own machine or our own LAN. Nothing here resolves a name. A relayed
address is the relay's own, then /p2p-circuit and the peer behind it; host, scope and group are the relay's. A peer that
is seen through a relay may be anywhere, so it counts as public.
Source: https://github.com/multiformats/multiaddr; SECURITY.md S1, S2 (groups of one /24 or /56).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from crypto.errors import BadKey
from crypto.identity import PeerId, public_key_of
from p2p.errors import BadAddress

ADDRESS_CHARS_MAX = 256  # the longest we make is 100; a DNS name may take 253, and nobody needs that
_DNS_LABEL = "[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
_DNS_NAME = re.compile(rf"^(?=.{{1,200}}$)({_DNS_LABEL}\.)*{_DNS_LABEL}\.?$", re.ASCII)
_EXAMPLE = "/ip4/203.0.113.7/tcp/4001/p2p/12D3KooW..."
_CIRCUIT = "p2p-circuit"
CIRCUIT_END = f"/{_CIRCUIT}"  # of a relayed address without the peer behind the relay


class Scope(IntEnum):
    """From how far away an address means the same machine; a larger number is farther."""

    LOOPBACK = 0
    PRIVATE = 1
    PUBLIC = 2
    NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """A parsed address; `text` is the whole multiaddr. `relay`: the peer that answers at host and port for `peer`."""

    text: str
    host: str
    port: int
    peer: PeerId
    scope: Scope
    relay: PeerId | None = None

    @property
    def group(self) -> str | None:
        """The /24 or /56 that a public address shares with its neighbours; None where neighbours are no threat."""
        return _group(self.host) if self.scope is Scope.PUBLIC else None

    @property
    def bare(self) -> str:
        """The address without the peer's id."""
        return self.text.rsplit("/p2p/", 1)[0]


def parse_address(text: str, *, checked: PeerId | None = None) -> Address:
    """Read a multiaddr. Raises BadAddress that says what came and what was wanted.

    `checked`: a peer id known to be one, since checking takes 0.1 ms.
    """
    if len(text) > ADDRESS_CHARS_MAX:
        raise BadAddress(f"an address of {len(text)} characters; at most {ADDRESS_CHARS_MAX}, as {_EXAMPLE}")
    parts = text.split("/")
    if parts[0] != "" or len(parts) < 3:
        raise BadAddress(f"{text!r} is not a multiaddr; wanted one like {_EXAMPLE}")
    if "p2p" not in parts:
        raise BadAddress(f"{text!r} does not say which peer answers there; add /p2p/ and its id, as {_EXAMPLE}")
    relayed = len(parts) == 10 and parts[7] == _CIRCUIT and parts[8] == "p2p"
    if not (len(parts) == 7 or relayed) or parts[3] != "tcp" or parts[5] != "p2p":
        if _CIRCUIT in parts:
            raise BadAddress(f"{text!r} is not one peer behind one relay; wanted {_EXAMPLE}/{_CIRCUIT}/p2p/12D3KooW...")
        raise BadAddress(f"{text!r} is not plain TCP; wanted /ip4, /ip6 or /dns, /tcp, /p2p, as {_EXAMPLE}")
    host, scope = _host(parts[1], parts[2])
    peer = checked if parts[-1] == checked else _peer(parts[-1])
    relay = _peer(parts[6]) if relayed else None
    if relay == peer:
        raise BadAddress(f"{text!r} names one peer as relay and as the peer behind it; give its direct address")
    return Address(text=text, host=host, port=_port(parts[4]), peer=peer, scope=scope, relay=relay)


def _host(kind: str, value: str) -> tuple[str, Scope]:
    if kind in ("dns", "dns4", "dns6"):
        if not _DNS_NAME.match(value):
            raise BadAddress(f"{value!r} is not a host name")
        return value, Scope.NAMED
    if kind not in ("ip4", "ip6"):
        raise BadAddress(f"/{kind}/ cannot be dialled; wanted /ip4/, /ip6/ or /dns/, as {_EXAMPLE}")
    try:
        ip = ipaddress.IPv4Address(value) if kind == "ip4" else ipaddress.IPv6Address(value)
    except ValueError:
        raise BadAddress(f"{value!r} is not an {'IPv4' if kind == 'ip4' else 'IPv6'} address") from None
    return value, scope_of(ip)


def scope_of(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> Scope:
    """How far an IP address reaches. Raises BadAddress for one that nobody can dial."""
    if ip.is_unspecified:
        raise BadAddress(f"{ip} means every interface and cannot be dialled; give the machine's own address")
    if ip.is_multicast or (isinstance(ip, ipaddress.IPv4Address) and ip.is_reserved):
        raise BadAddress(f"{ip} is not one machine's address")
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    if mapped is not None:
        return scope_of(mapped)
    if ip.is_loopback:
        return Scope.LOOPBACK
    return Scope.PUBLIC if ip.is_global else Scope.PRIVATE


def _port(value: str) -> int:
    if not (value.isascii() and value.isdigit()) or len(value) > 5 or not 1 <= int(value) <= 65535:
        raise BadAddress(f"{value!r} is not a TCP port; wanted 1 to 65535")
    return int(value)


def _peer(value: str) -> PeerId:
    try:
        public_key_of(PeerId(value))
    except BadKey as exc:
        raise BadAddress(f"{value!r} is not a peer id; wanted an Ed25519 one, as 12D3KooW...: {exc}") from exc
    return PeerId(value)


def seen_scope(seen_at: str | None) -> Scope:
    """How far away a connected peer is, from the multiaddr it is seen at; unknown and relayed count as public."""
    parts = (seen_at or "").split("/")
    if len(parts) < 3 or parts[1] not in ("ip4", "ip6") or is_relayed(seen_at):
        return Scope.PUBLIC
    try:
        return scope_of(ipaddress.ip_address(parts[2]))
    except (ValueError, BadAddress):
        return Scope.PUBLIC


def seen_group(seen_at: str | None) -> str | None:
    """The network of a connected peer; None where neighbours are no threat, and behind a relay, whose it would be."""
    return None if is_relayed(seen_at) else network_of(seen_at)


def network_of(address: str | None) -> str | None:
    """The network of a multiaddr's first host (/24, or /56 of IPv6); None when it is private, or no IP address.

    Whatever text a peer says: of a relayed address it is the relay's.
    """
    parts = (address or "").split("/")
    if len(parts) < 3 or parts[1] not in ("ip4", "ip6"):
        return None
    try:
        ip = ipaddress.ip_address(parts[2].split("%")[0])
    except ValueError:
        return None
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if ip.is_private or ip.is_loopback or ip.is_link_local or ip.is_unspecified:
        return None
    return _group(str(ip))


def _group(ip: str) -> str:
    if ":" not in ip:
        return f"{ip.rpartition('.')[0]}.0/24"
    return str(ipaddress.ip_network(f"{ip}/56", strict=False))


def is_relayed(seen_at: str | None) -> bool:
    """Whether a peer seen at that multiaddr is behind a relay."""
    return _CIRCUIT in (seen_at or "").split("/")


def believable(address: Address, teller: Scope) -> bool:
    """Whether to believe an address told by a peer seen at that scope: never one nearer to us than the teller is."""
    return address.scope is not Scope.NAMED and address.scope >= teller


def tellable(address: Address, listener: Scope) -> bool:
    """Whether an address is of any use to a peer seen at that scope."""
    return address.scope >= listener


def told(texts: Iterable[str], peer: PeerId, teller: Scope) -> list[Address]:
    """The usable ones among addresses that a peer told us for `peer`; the rest are passed over, not an error."""
    found: list[Address] = []
    for text in texts:
        try:
            address = parse_address(text, checked=found[0].peer if found else None)
        except BadAddress:
            continue
        if address.peer == peer and believable(address, teller):
            found.append(address)
    return found


def worth_telling(texts: Iterable[str], own: PeerId, listener: Scope, limit: int) -> list[str]:
    """Those of our own addresses that are of use to a peer seen at that scope."""
    found = []
    for text in texts:
        try:
            if tellable(parse_address(text, checked=own), listener):
                found.append(text)
        except BadAddress:
            continue  # the host listens on something that this version does not dial
    return found[:limit]
