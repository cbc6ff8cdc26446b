"""Which of this machine's addresses other machines can really reach.

Rules: pure; the caller lists the interfaces. Containers' bridges, tunnels and virtual pairs are left out: a peer that
dials them gets nobody or, worse, someone else. Loopback stays, for nodes on the same machine.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

ADDRESSES_MAX = 16  # what one node listens on and tells others
# Linux, BSD, macOS and Windows names of bridges, container pairs, tunnels, hypervisors and VPNs.
_VIRTUAL = re.compile(
    r"^(docker|br-|veth|virbr|vnet|cni|flannel|cali|lxc|lxd|podman|kube|weave|ovs|tun|tap|utun|wg|tailscale|zt|ppp|"
    r"ipsec|gif|stf|awdl|llw|bridge|vmnet|vboxnet|dummy|sit|ip6tnl|gre|teql|isatap|teredo|vethernet|hyper-v)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class InterfaceAddress:
    """One address of one interface, as the system lists it."""

    name: str
    address: str
    up: bool = True


def usable(addresses: Iterable[InterfaceAddress]) -> tuple[str, ...]:
    """The IP addresses worth listening on and telling: public and private ones first, loopback last, in given order."""
    reachable: list[str] = []
    loopback: list[str] = []
    for each in addresses:
        ip = _parse(each.address)
        if ip is None or not each.up or ip.is_unspecified or ip.is_multicast or ip.is_link_local:
            continue  # a link-local address means nothing without the zone, which is the dialer's own
        if ip.is_loopback:
            loopback.append(str(ip))
        elif not _VIRTUAL.match(each.name):
            reachable.append(str(ip))
    return tuple(dict.fromkeys(reachable + [ip for ip in loopback if ip == "127.0.0.1"]))[:ADDRESSES_MAX]


def _parse(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None  # a hardware address: the system lists those too


def multiaddr_text(ip: str, port: int) -> str:
    """The TCP multiaddr of an IP address and port, without /p2p/."""
    return f"/ip{6 if ':' in ip else 4}/{ip}/tcp/{port}"


def is_wildcard(address: str) -> bool:
    """Whether a multiaddr names every interface; such an address is never told to others."""
    return address.startswith(("/ip4/0.0.0.0/", "/ip6/::/"))
