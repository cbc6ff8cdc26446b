"""Gossip floods at a real host: who forwards too much, or forgeries, is cut and told of; nothing of it is kept."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.pubsub.pb import rpc_pb2
from libp2p.utils import encode_varint_prefixed

from bench.flood_end import published
from crypto.identity import Identity
from gossip.messages import advert_topic
from p2p.neighbours import SIGNATURES_BURST
from p2p.transport import PeerChange
from tests.libp2p_peers import Stranger, node, stranger, until

pytestmark = pytest.mark.slow
NETWORK = "flood"
TOPIC = advert_topic(NETWORK)
MESHSUB = "/meshsub/1.1.0"


async def send(eve: Stranger, *frames: rpc_pb2.RPC) -> None:
    """Frames on one gossip stream, until it breaks or they are all out."""
    try:
        stream = await eve.stream(MESHSUB)
        for frame in frames:
            await stream.write(encode_varint_prefixed(frame.SerializeToString()))
    except BaseLibp2pError:
        pass  # cut: what the test waits for


async def test_who_hands_on_too_many_messages_of_others_is_cut_and_told_of() -> None:
    writers = [Identity.make() for _ in range(40)]
    messages = [published(writers[n % 40], NETWORK, n) for n in range(2_400)]
    frames = [rpc_pb2.RPC(publish=messages[first : first + 50]) for first in range(0, len(messages), 50)]
    heard, changes = [], list[PeerChange]()
    async with node(topics=frozenset({TOPIC})) as bob:
        bob.watch(changes.append)
        await bob.subscribe(TOPIC, lambda peer, raw: bool(heard.append(raw)) or True)
        async with stranger(bob) as eve:
            await send(eve, *frames, *frames, *frames)
            await until(lambda: bob.statistics().drops.get("gossip_flood") == 1, 30)
            await until(lambda: not bob.peers())
        assert "gossip" in changes[-1].breach
        assert bob.statistics().drops["gossip_over_quota"] > 100
        assert SIGNATURES_BURST <= len(heard) < 2_000


async def test_what_goes_no_further_is_looked_at_once_however_many_copies_come() -> None:
    message, heard = published(Identity.make(), NETWORK, 1), list[bytes]()
    async with node(topics=frozenset({TOPIC})) as bob:
        await bob.subscribe(TOPIC, lambda _peer, raw: bool(heard.append(raw)))
        async with stranger(bob) as eve, stranger(bob) as mallory:
            for each in (eve, mallory, eve):
                await send(each, rpc_pb2.RPC(publish=[message]))
            await until(lambda: len(heard) >= 1)
            await trio.sleep(0.5)
    assert len(heard) == 1


async def test_forged_messages_cut_who_hands_them_on() -> None:
    async with node(topics=frozenset({TOPIC})) as bob:
        await bob.subscribe(TOPIC, lambda peer, raw: True)
        async with stranger(bob) as eve:
            for number in range(4):
                forged = published(Identity.make(), NETWORK, number)
                forged.data += b"!"
                await send(eve, rpc_pb2.RPC(publish=[forged]))
                await trio.sleep(1.1)
            await until(lambda: not bob.peers())
        assert bob.statistics().drops["gossip_forged"] >= 3


async def test_control_messages_on_other_topics_are_neither_heeded_nor_remembered() -> None:
    control = rpc_pb2.ControlMessage()
    for number in range(40):
        control.prune.add(topicID=f"topic-{number}", backoff=1 << 62)
        control.graft.add(topicID=f"topic-{number}")
        control.ihave.add(topicID=f"topic-{number}", messageIDs=[b"ab"])
    control.prune.add(topicID=TOPIC, backoff=1 << 62)
    many = [rpc_pb2.RPC.SubOpts(subscribe=True, topicid=f"topic-{number}") for number in range(33)]
    async with node(topics=frozenset({TOPIC})) as bob:
        await bob.subscribe(TOPIC, lambda peer, raw: True)
        async with stranger(bob) as eve:
            message = published(Identity.make(), NETWORK, 1)
            message.topicIDs[:] = ["elsewhere"]
            await send(
                eve,
                rpc_pb2.RPC(control=control, publish=[message]),
                rpc_pb2.RPC(subscriptions=many),
                rpc_pb2.RPC(subscriptions=many[:3]),
            )
            await until(lambda: bob.statistics().drops.get("gossip_topic") == 4)
            drops = bob.statistics().drops
            assert drops["gossip_control"] == 160  # 40 prunes, 40 grafts, 40 ihaves and their 40 ids
            assert drops["gossip_subscriptions"] == 1
            router: Any = bob._pubsub.router
            assert "topic-1" not in str(router.back_off) + str(dict(router.graft_flood_tracking))
            assert set(bob._pubsub.peer_topics) <= {TOPIC}
            assert await eve.alive()


async def test_a_frame_that_is_too_large_ends_its_stream_and_is_counted() -> None:
    async with node(topics=frozenset({TOPIC})) as bob:
        await bob.subscribe(TOPIC, lambda peer, raw: True)
        async with stranger(bob) as eve:
            await send(eve, rpc_pb2.RPC(publish=[rpc_pb2.Message(data=bytes(70_000))]))
            await until(lambda: bob.statistics().drops.get("gossip_frame_too_large") == 1)
            assert await eve.alive()
