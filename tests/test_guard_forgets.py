"""What libp2p keeps for ever, and a node of ours forgets: of gossip that is over, and of peers that are gone."""

from __future__ import annotations

import gc
from typing import Any

import psutil
import pytest
import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.utils import encode_varint_prefixed

from p2p.transport import GOSSIP_BYTES_MAX
from tests.libp2p_peers import TOPIC, Stranger, node, stranger, until

pytestmark = [pytest.mark.slow, pytest.mark.alone]
FRAMES, FRAME_BYTES = 300, 60_000


async def say(eve: Stranger, *frames: rpc_pb2.RPC) -> None:
    """On a gossip stream that stays open."""
    stream = await eve.stream("/meshsub/1.1.0")
    for frame in frames:
        await stream.write(encode_varint_prefixed(frame.SerializeToString()))


async def test_what_waits_for_a_gossip_stream_goes_with_the_peer_that_never_took_one() -> None:
    subscribed = rpc_pb2.RPC(subscriptions=[rpc_pb2.RPC.SubOpts(subscribe=True, topicid=TOPIC)])
    async with node() as bob:
        await bob.subscribe(TOPIC, lambda _peer, _payload: True)
        pubsub, router = bob._pubsub, bob._pubsub.router
        key_pair = create_new_key_pair()
        peer = ID.from_pubkey(key_pair.public_key)
        async with stranger(bob, key_pair=key_pair) as eve:  # without a handler for our gossip stream
            await say(eve, subscribed)
            await until(lambda: peer in pubsub.peer_topics.get(TOPIC, ()))
            await bob.publish(TOPIC, bytes(GOSSIP_BYTES_MAX))
            assert peer in router._pending_messages
            await trio.sleep(2)  # beats: who is connected is not forgotten
            assert peer in router._pending_messages
            assert peer in pubsub.peer_topics[TOPIC]
        await until(lambda: not bob.peers())
        await until(lambda: peer not in router._pending_messages)
        pubsub.peer_topics[TOPIC] = {peer}  # a frame of its was read before the end, and is looked at after it
        await until(lambda: TOPIC not in pubsub.peer_topics)


async def test_neither_times_of_messages_nor_waits_that_are_over_are_kept() -> None:
    router: Any
    async with node() as bob:
        await bob.subscribe(TOPIC, lambda _peer, _payload: True)
        router = bob._pubsub.router
        control = rpc_pb2.ControlMessage()
        control.prune.add(topicID=TOPIC, backoff=1)
        async with stranger(bob) as eve:
            for _ in range(3):
                await bob.publish(TOPIC, b"hello")
            await say(eve, rpc_pb2.RPC(control=control))
            await until(lambda: router.back_off.get(TOPIC))
            await until(lambda: not router.back_off[TOPIC])
            await until(lambda: not any(router.recent_message_deliveries.values()))
        assert not router.equivocation_detection


async def test_libp2p_keeps_every_message_to_compare_with() -> None:
    router, message = GossipSub([PROTOCOL_ID_V11], degree=6, degree_low=4, degree_high=12), rpc_pb2.Message(data=b"x")
    assert router._check_equivocation(message)
    assert router.equivocation_detection  # else this workaround is not needed any more


async def test_a_message_that_is_remembered_does_not_keep_the_frame_it_came_in() -> None:
    message = rpc_pb2.Message(data=b"x" * 100, topicIDs=[TOPIC])
    filling = rpc_pb2.Message(data=bytes(FRAME_BYTES), topicIDs=["elsewhere"])
    kept = list[Any]()

    async def keep(_forwarder: ID, each: Any) -> None:
        await trio.lowlevel.checkpoint()
        kept.append(each)

    async with node() as bob:
        await bob.subscribe(TOPIC, lambda _peer, _payload: True)
        bob._pubsub.push_msg = keep
        async with stranger(bob) as eve:
            frame = rpc_pb2.RPC(publish=[message, filling])
            await say(eve, *[frame] * 20)
            await until(lambda: len(kept) == 20)
            gc.collect()
            before = psutil.Process().memory_info().rss
            await say(eve, *[frame] * FRAMES)
            await until(lambda: len(kept) == 20 + FRAMES, 60)
            gc.collect()
            assert psutil.Process().memory_info().rss - before < FRAMES * FRAME_BYTES / 3


async def test_a_peer_that_pinged_is_forgotten() -> None:
    async with node() as bob:
        handler: Any = bob._host.multiselect.handlers["/ipfs/ping/1.0.0"]
        while not hasattr(handler, "__self__"):
            handler = handler.__wrapped__
        streams = handler.__self__._inbound_streams
        async with stranger(bob) as eve:
            assert await eve.alive()
            await until(lambda: not streams)
