"""One dial: a name resolved to addresses, each tried in turn, and the reason in words when none answers.

Rules: a shell; when to dial is for others to say. Only the operator's addresses hold names (address.py), so nobody can
have us ask a name server. Source: RFC 6724 (the system's resolver orders the addresses).
"""

from __future__ import annotations

import errno
import socket

import trio

from crypto.identity import PeerId
from p2p.address import Address, Scope
from p2p.errors import P2PError, Refused, RemoteProtocolError, Unreachable
from p2p.transport import Transport

RESOLVED_MAX = 4  # addresses of one name that are tried
CAUSES_MAX = 64  # of an error that are looked at for a reason
_REASONS = {
    errno.ECONNREFUSED: "connection refused: nothing listens at {}; is that node running, at that port?",
    errno.EHOSTUNREACH: "no route to {}; is that machine up, and on the same network?",
    errno.ENETUNREACH: "no network leads to {}; is this machine connected?",
    errno.ECONNRESET: "{} cut the connection; is it another program, a firewall, or a node with another --psk-file?",
    errno.ETIMEDOUT: "{} timed out; is that machine up, and its port open in the firewall?",
}


async def dial(transport: Transport, address: Address) -> PeerId:
    """Connect to the peer of an address. Raises Unreachable, Refused, RemoteProtocolError: of the last tried."""
    if address.scope is not Scope.NAMED:
        return await transport.dial(address.text)
    failure: P2PError | None = None
    for text in await resolve(address):
        try:
            return await transport.dial(text)
        except (Unreachable, Refused, RemoteProtocolError) as exc:
            failure = exc
    raise failure or Unreachable(f"the name {address.host} has no address")


async def resolve(address: Address) -> list[str]:
    """The multiaddrs that a named address stands for, in the system's order. Raises Unreachable."""
    families = {"dns4": socket.AF_INET, "dns6": socket.AF_INET6}
    family = families.get(address.text.split("/")[1], socket.AF_UNSPEC)
    try:
        found = await trio.socket.getaddrinfo(address.host, address.port, family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise Unreachable(f"the name {address.host} cannot be resolved: {why}") from exc
    hosts = dict.fromkeys(("ip6" if row[0] == socket.AF_INET6 else "ip4", str(row[4][0])) for row in found)
    rest = "/".join(address.text.split("/")[3:])
    return [f"/{kind}/{host}/{rest}" for kind, host in hosts][:RESOLVED_MAX]


def dial_reason(exc: BaseException, address: Address) -> str:
    """Why a dial failed, for a person: by the system's error where there is one under it, else in the host's words."""
    pending, seen = [exc], 0
    while pending and seen < CAUSES_MAX:
        cause, seen = pending.pop(), seen + 1
        if isinstance(cause, OSError) and cause.errno in _REASONS:
            return _REASONS[cause.errno].format(address.bare)
        pending += list(cause.exceptions) if isinstance(cause, BaseExceptionGroup) else []
        pending += [under for under in (cause.__cause__, cause.__context__) if under is not None]
    return str(exc)
