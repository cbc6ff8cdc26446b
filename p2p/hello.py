"""The first words between two peers: which network, which protocol version, which process, and where it listens.

Rules: the caller sends its Hello, the callee answers with its own and with `refused`, a sentence, when it will not have
the caller; each side judges by its own rules, so both can say why in their own words. The protocol version is read
before anything else, so that a later version may change every other field. An instance is a random word for each start
of a process: one that comes back after another took its place shows two live processes with one identity.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from crypto.canonical import Value
from crypto.identity import PeerId
from p2p.address import ADDRESS_CHARS_MAX
from p2p.errors import RemoteProtocolError

PROTOCOL_VERSION = 1
RPC_PROTOCOL = "/openagi/rpc/1"
HELLO_ADDRESSES_MAX = 16
EXCHANGE_PEERS_MAX = 32  # in one answer; a node asks again later
EXCHANGE_ADDRESSES_MAX = 8
REASON_CHARS_MAX = 300
INSTANCES_PEERS_MAX = 1024  # peers whose former instances are remembered
INSTANCES_MAX = 8  # former ones of one peer: a twin shows within a few words, a restart never comes back

_Message = TypeVar("_Message", bound=Struct)
Text = Annotated[str, Meta(max_length=REASON_CHARS_MAX)]
Instance = Annotated[str, Meta(pattern="^[0-9a-f]{16,64}$")]
AddressText = Annotated[str, Meta(max_length=ADDRESS_CHARS_MAX)]


class Hello(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a peer says of itself. `seen_at`: where it sees us; `twin`: another instance with our identity, if any."""

    protocol: int
    network: Annotated[str, Meta(min_length=1, max_length=64)]
    agent: Annotated[str, Meta(max_length=64)]
    instance: Instance
    addresses: Annotated[list[AddressText], Meta(max_length=HELLO_ADDRESSES_MAX)]
    seen_at: AddressText = ""
    refused: Text = ""
    twin: Text = ""


class Ping(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Both the question and the answer."""

    instance: Instance
    twin: Text = ""


class KnownPeer(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One peer of an exchange."""

    peer: Annotated[str, Meta(max_length=80)]
    addresses: Annotated[list[AddressText], Meta(max_length=EXCHANGE_ADDRESSES_MAX)]


class KnownPeers(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The answer of an exchange."""

    peers: Annotated[list[KnownPeer], Meta(max_length=EXCHANGE_PEERS_MAX)]


def to_value(struct: Struct) -> Value:
    """A message as plain values for a call."""
    plain: Value = msgspec.to_builtins(struct)
    return plain


def read_hello(value: Value) -> Hello | int:
    """A peer's Hello, or its protocol version where that is not ours. Raises RemoteProtocolError."""
    version = value.get("protocol") if isinstance(value, dict) else None
    if isinstance(version, int) and not isinstance(version, bool) and version != PROTOCOL_VERSION:
        return version
    return _read(value, Hello)


def read_ping(value: Value) -> Ping:
    """Raises RemoteProtocolError."""
    return _read(value, Ping)


def read_known_peers(value: Value) -> KnownPeers:
    """Raises RemoteProtocolError."""
    return _read(value, KnownPeers)


def _read(value: Value, kind: type[_Message]) -> _Message:
    try:
        return msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as exc:
        raise RemoteProtocolError(f"not a {kind.__name__}: {exc}") from exc


def misfit(network: str, their_protocol: int, their_network: str) -> str:
    """Why two nodes cannot be of one network, as a sentence for a person; '' when they can."""
    if their_protocol != PROTOCOL_VERSION:
        return f"other protocol version {their_protocol} while ours is {PROTOCOL_VERSION}"
    return f"other network {their_network!r} while ours is {network!r}" if their_network != network else ""


def objection(network: str, hello: Hello | int) -> str:
    """Why the sender of a hello cannot be one of our peers; '' when it can."""
    if isinstance(hello, int):
        return misfit(network, hello, network)
    refused = f"it refused us: {hello.refused}" if hello.refused else ""
    return misfit(network, hello.protocol, hello.network) or refused


class Instances:
    """Which process speaks for each peer, and whether two do."""

    def __init__(self) -> None:
        self._seen: OrderedDict[PeerId, list[str]] = OrderedDict()  # the newest last

    def heard(self, peer: PeerId, instance: str) -> str:
        """Take note of who spoke. Gives the other instance when one that had been replaced speaks again, else ''."""
        seen = self._seen.setdefault(peer, [])
        self._seen.move_to_end(peer)
        if len(self._seen) > INSTANCES_PEERS_MAX:
            self._seen.popitem(last=False)
        if seen and seen[-1] == instance:
            return ""
        twin = seen[-1] if instance in seen else ""
        if instance in seen:
            seen.remove(instance)
        seen.append(instance)
        del seen[:-INSTANCES_MAX]
        return twin
