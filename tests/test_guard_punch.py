"""p2p/guard_punch.py: what is dialled for a peer's sake, and how often. That it works: tests/real/test_nat.py."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from libp2p.utils.varint import encode_varint_prefixed
from multiaddr import Multiaddr

from crypto.identity import Identity
from p2p.errors import RemoteProtocolError
from p2p.guard_punch import ADDRESSES_MAX, DCUTR, PUNCH_EVERY_S, PUNCHES_MAX
from tests.libp2p_peers import node, stranger, until

pytestmark = pytest.mark.slow


class Said:
    """A stream on which a peer has said something."""

    def __init__(self, message: HolePunch) -> None:
        self._bytes = encode_varint_prefixed(message.SerializeToString())

    async def read(self, n: int) -> bytes:
        await trio.lowlevel.checkpoint()
        taken, self._bytes = self._bytes[:n], self._bytes[n:]
        return taken


def named(*texts: str) -> Said:
    return Said(HolePunch(type=HolePunch.CONNECT, ObsAddrs=[Multiaddr(text).to_bytes() for text in texts]))


async def test_only_public_addresses_are_dialled_and_few() -> None:
    peer = Identity.make().peer_id
    async with node() as alice:
        puncher = alice._puncher
        near = ("/ip4/127.0.0.1/tcp/22", "/ip4/192.168.1.1/tcp/80", "/ip6/::1/tcp/22")
        said = named(*near, "/ip4/11.0.3.1/tcp/4001")
        assert await puncher._addresses(said, peer) == [("11.0.3.1", 4001)]  # type: ignore[arg-type]  # a stand-in
        many = named(*(f"/ip4/11.0.{number}.1/tcp/4001" for number in range(20)))
        assert len(await puncher._addresses(many, peer)) == ADDRESSES_MAX  # type: ignore[arg-type]
        for nothing in (
            named(*near),
            named(),
            named("/ip4/11.0.3.1/udp/4001/quic-v1"),
            named("/dns4/example.org/tcp/1"),
        ):
            with pytest.raises(RemoteProtocolError):
                await puncher._addresses(nothing, peer)  # type: ignore[arg-type]


async def test_a_peer_has_us_dial_once_in_a_while_and_all_of_them_few_times_at_once() -> None:
    async with node() as alice:
        puncher, peers = alice._puncher, [Identity.make().peer_id for _ in range(PUNCHES_MAX + 1)]
        assert puncher._may(peers[0])
        assert not puncher._may(peers[0])
        puncher._last[peers[0]] -= PUNCH_EVERY_S
        assert puncher._may(peers[0])
        puncher._running = PUNCHES_MAX
        assert not puncher._may(peers[1])


async def test_nobody_begins_over_a_direct_connection() -> None:
    async with node() as alice, stranger(alice) as eve:
        alice.relay.observed = ("11.0.3.1",)
        with suppress(BaseLibp2pError):  # the reset may come before the protocol is agreed
            await eve.stream(DCUTR)
        await until(lambda: alice.statistics().drops.get("punch_not_now") == 1)
        assert await eve.alive()


async def test_the_port_that_punching_shares_is_taken_for_everybody_else() -> None:
    async with node() as alice:
        port = int(alice.addresses()[0].split("/")[4])
        with pytest.raises(OSError, match="in use"):
            await trio.open_tcp_listeners(port, host="127.0.0.1")
