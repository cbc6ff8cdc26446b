"""Gossipsub that outlives what peers publish.

Rules: `/meshsub/1.1.0` only, one beat a second, no adaptation, no scores: standing is ours (gossip/standing.py).
A message reaches its receiver once, in the validator, after its signature; nothing is queued for us here. Before its
signature its neighbour's quota is asked (p2p/neighbours.py). Every drop is counted.

Source: NETWORK.md section 3; SECURITY.md F1, F2, F8, F11.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import trio
from libp2p.exceptions import ParseError
from libp2p.host.exceptions import StreamFailure
from libp2p.io.exceptions import IncompleteReadError, IOException, MessageTooLarge
from libp2p.network.connection.exceptions import RawConnError
from libp2p.network.exceptions import SwarmException
from libp2p.network.stream.exceptions import StreamError
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.validators import signature_validator

from crypto.identity import PeerId
from p2p.guard import ContainedTasks, Drops, reset_quietly
from p2p.neighbours import Neighbours

RPC_BYTES_MAX = 65_536  # one inbound pubsub frame
SUBSCRIPTIONS_MAX = 32  # topics of one peer
BACKOFF_S_MAX = 600  # for so long at most a neighbour may ask not to be grafted
HEARTBEAT_S = 1
READ_BYTES = 16_384  # of a neighbour's stream at a time, at most
LENGTH_BYTES_MAX = 10  # of a frame's length: 64 bits


class Frames:
    """A neighbour's frames, each after its length as a varint; read as many bytes at a time as are there.

    Around: libp2p reads the length byte by byte, each with three locks and a wait of its own: a third of all that an
    idle node does.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._left = bytearray()

    async def next(self) -> bytes:
        """One frame. Raises MessageTooLarge, ParseError, IncompleteReadError, and what the stream raises."""
        while (found := self._found()) is None:
            piece = await self._stream.read(READ_BYTES)
            if not piece:
                got = len(self._left)
                raise IncompleteReadError(f"the stream ended with {got} bytes of a frame", received_bytes=got)
            self._left += piece
        begin, end = found
        frame = bytes(self._left[begin:end])
        del self._left[:end]
        return frame

    def _found(self) -> tuple[int, int] | None:
        """Where the next frame begins and ends, once it is whole."""
        size = 0
        for at, byte in enumerate(self._left[:LENGTH_BYTES_MAX]):
            size |= (byte & 0x7F) << 7 * at
            if not byte & 0x80:
                if size > RPC_BYTES_MAX:
                    raise MessageTooLarge(f"a gossip frame of {size} bytes, at most {RPC_BYTES_MAX} are taken")
                return (at + 1, at + 1 + size) if len(self._left) > at + size else None
        if len(self._left) >= LENGTH_BYTES_MAX:
            raise ParseError("a gossip frame whose length has over 64 bits")
        return None


class GuardedGossipSub(GossipSub):  # type: ignore[misc]  # libp2p's types are not followed
    """The router, with contained tasks and the settings of Rules.

    Around: it scores without being asked to. When all have the score 0 it takes two more peers into the mesh at each
    beat until there are over 12, cuts down to 6, and those that are cut refuse and are refused for a minute: of many
    nodes some run out of peers that would have them.
    """

    def __init__(self, drops: Drops) -> None:
        self._drops = drops
        super().__init__(
            [PROTOCOL_ID_V11],
            degree=6,
            degree_low=4,
            degree_high=12,
            heartbeat_interval=HEARTBEAT_S,
            adaptive_gossip_enabled=False,
            spam_protection_enabled=False,
            eclipse_protection_enabled=False,
        )
        self.scorer = None

    @property
    def manager(self) -> Any:
        """The service's manager, whose tasks are contained."""
        return ContainedTasks(super().manager, self._drops)

    def _periodic_security_cleanup(self) -> None:
        """At each beat: forget what is of no use any more.

        Around: libp2p keeps the time of every message for figures that it makes only when it adapts, a peer's wait
        until that peer is grafted again, and, of a peer that is gone and never took our gossip stream, what waited for
        that stream.
        """
        super()._periodic_security_cleanup()
        self.recent_message_deliveries.clear()
        now = int(time.time())
        for waits in self.back_off.values():
            for peer_id in [each for each, until in waits.items() if until <= now]:
                del waits[peer_id]
        self.pubsub.forget_gone({*self._pending_messages, *self.peer_protocol, *self.dont_send_message_ids})

    def _check_equivocation(self, _message: Any) -> bool:
        """Always: a second message of an id is never looked at (GuardedPubsub.push_msg).

        Around: libp2p keeps the last thousand messages to compare with.
        """
        return True


class GuardedPubsub(Pubsub):  # type: ignore[misc]  # libp2p's types are not followed
    """Pubsub whose tasks are contained.

    Around: a frame or a key that does not decode, or a validator that raises, ends the service and the process.
    """

    def __init__(self, host: Any, router: GuardedGossipSub, topics: frozenset[str], drops: Drops) -> None:
        self._drops = drops
        self._topics = topics
        self._neighbours = Neighbours()
        self.on_flood: Callable[[PeerId], None] = lambda _peer: None  # called (sync) for a neighbour to cut off
        super().__init__(
            host,
            router,
            strict_signing=True,
            max_subscriptions_per_rpc=SUBSCRIPTIONS_MAX,
            max_subscriptions_per_peer=SUBSCRIPTIONS_MAX,
            max_inbound_rpc_size=RPC_BYTES_MAX,
            allowed_topics=topics,
        )
        # Message ids are peer and counter: from nanoseconds, so that a restart never repeats one.
        self.counter = time.time_ns()

    @property
    def manager(self) -> Any:
        """The service's manager, whose tasks are contained."""
        return ContainedTasks(super().manager, self._drops)

    async def continuously_read_stream(self, stream: Any) -> None:
        """Read a neighbour's frames until its stream ends; one that does not decode ends it with an exception.

        Around: libp2p reads as fast as a peer writes, checks a signature of each frame's sender record, for which we
        have no use, says nothing of what it drops, and hands control messages on any topic to the router, which
        remembers them.
        """
        peer_id = stream.muxed_conn.peer_id
        peer = PeerId(peer_id.to_base58())
        frames = Frames(stream)
        try:
            while self.manager.is_running:
                rpc = rpc_pb2.RPC()
                rpc.ParseFromString(await frames.next())
                await trio.sleep(self._neighbours.read(peer, _units(rpc), trio.current_time()))
                for message in rpc.publish:
                    if self._is_subscribed_to_msg(message):
                        alone = rpc_pb2.Message()
                        alone.CopyFrom(message)  # a part of a frame, while it is remembered, keeps the whole frame
                        self.manager.run_task(self.push_msg, peer_id, alone)
                    else:
                        self._drops.count("gossip_topic")
                self._subscribed(peer_id, rpc.subscriptions)
                if rpc.HasField("control"):
                    await self.router.handle_rpc(rpc_pb2.RPC(control=self._allowed(rpc.control)), peer_id)
                if self._neighbours.is_out(peer, trio.current_time()):
                    self._drops.count("gossip_flood")
                    self.on_flood(peer)
                    return
        except MessageTooLarge:
            self._drops.count("gossip_frame_too_large")
            await reset_quietly(stream, self._drops)
            self._handle_dead_peer(peer_id)
        except (StreamError, IOException, RawConnError):
            pass  # the stream or its connection is over

    def _subscribed(self, peer_id: Any, subscriptions: Any) -> None:
        if len(subscriptions) > SUBSCRIPTIONS_MAX:
            self._drops.count("gossip_subscriptions")
            return
        for each in subscriptions:
            if each.topicid in self._topics:
                self.handle_subscription(peer_id, each)
            else:
                self._drops.count("gossip_topic")

    def _allowed(self, control: Any) -> Any:
        """What of a control message the router may see: our topics, no peers to dial, no wait beyond BACKOFF_S_MAX."""
        kept = rpc_pb2.ControlMessage(iwant=control.iwant)
        kept.ihave.extend(each for each in control.ihave if each.topicID in self._topics)
        kept.graft.extend(each for each in control.graft if each.topicID in self._topics)
        for each in control.prune:
            if each.topicID in self._topics:
                kept.prune.add(topicID=each.topicID, backoff=min(each.backoff, BACKOFF_S_MAX))
        passed_over = _entries(control) - _entries(kept)
        if passed_over:
            self._drops.counts["gossip_control"] += passed_over
        return kept

    async def push_msg(self, msg_forwarder: Any, msg: Any) -> None:
        """Deliver a message and forward it, unless it was seen, is over its neighbour's quota, forged or not wanted.

        Around: libp2p checks the signature of whatever comes; what fails costs its sender nothing, is counted nowhere
        and is written out whole for a log that nobody reads.
        """
        if self._is_msg_seen(msg):
            return  # gossip does that
        if msg_forwarder != self.my_id:
            peer, now = PeerId(msg_forwarder.to_base58()), trio.current_time()
            if not self._neighbours.may_check(peer, now):
                self._drops.count("gossip_over_quota")
                return
            if msg.from_id == self.my_id.to_bytes() or not signature_validator(msg):
                self._drops.count("gossip_forged")
                self._neighbours.strike(peer, now)
                return
        is_wanted = all(each.validator(msg_forwarder, msg) for each in self.get_msg_validators(msg))
        self._mark_msg_seen(msg)  # also what goes no further: its other copies cost nothing
        if is_wanted:  # else the receiver has counted why
            await self.router.publish(msg_forwarder, msg)

    def get_hello_packet(self) -> Any:
        """What we are subscribed to, without the sender's record (see guard.no_record)."""
        packet = super().get_hello_packet()
        packet.ClearField("senderRecord")
        return packet

    async def _handle_new_peer(self, peer_id: Any) -> None:
        """Open the gossip stream to a peer; a failure is of the kind after which libp2p tries again while connected.

        Around: it gives a peer up for good when one negotiation takes too long, as they do when many nodes start at
        once: both stay connected, and no gossip passes between them.
        """
        try:
            await super()._handle_new_peer(peer_id)
        except StreamFailure as exc:
            raise SwarmException(str(exc)) from exc

    def _handle_dead_peer(self, peer_id: Any) -> None:
        """Our gossip stream to a peer ended: what it subscribed to is forgotten only when it is gone.

        Around: libp2p opens the stream again but forgets the subscriptions, which came over the peer's own stream and
        do not come again: nothing that we publish would reach that peer any more.
        """
        topics = [topic for topic, peers in self.peer_topics.items() if peer_id in peers]
        super()._handle_dead_peer(peer_id)
        if topics and self._peer_is_connected(peer_id):
            self._peer_subscription_count[peer_id] = len(topics)
            for topic in topics:
                self.peer_topics.setdefault(topic, set()).add(peer_id)

    def forget_gone(self, known: set[Any]) -> None:
        """Forget all of those that are not connected, of these and of whom we have streams or subscriptions of.

        Around: libp2p lets the router forget only who had taken our gossip stream, and takes subscriptions from
        frames that were read before a connection ended.
        """
        for peer_id in known.union(self.peers, *self.peer_topics.values()):
            if not self._peer_is_connected(peer_id):
                self._handle_dead_peer(peer_id)
                self.router.remove_peer(peer_id)

    def notify_subscriptions(self, publish_message: Any) -> None:
        """Nothing: the validator has delivered it; libp2p's queue of 32 would only fill and complain."""


def _units(rpc: Any) -> int:
    """What a frame costs to look at."""
    return len(rpc.publish) + len(rpc.subscriptions) + (_entries(rpc.control) if rpc.HasField("control") else 0)


def _entries(control: Any) -> int:
    ids = sum(len(each.messageIDs) for kind in (control.ihave, control.iwant, control.idontwant) for each in kind)
    return ids + sum(len(kind) for kind in (control.ihave, control.iwant, control.graft, control.prune))
