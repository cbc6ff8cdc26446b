"""Gossipsub that outlives what peers publish.

Rules: `/meshsub/1.1.0` only, one beat a second, no adaptation, no scores: standing is ours (gossip/standing.py).
A message reaches its receiver once, in the validator, after its signature; nothing is queued for us here.

Source: NETWORK.md section 3; SECURITY.md F1, F2, F8, F11.
"""

from __future__ import annotations

import time
from typing import Any

from libp2p.host.exceptions import StreamFailure
from libp2p.network.exceptions import SwarmException
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pubsub import Pubsub

from p2p.guard import ContainedTasks, Drops

RPC_BYTES_MAX = 65_536  # one inbound pubsub frame
SUBSCRIPTIONS_MAX = 32  # topics of one peer
HEARTBEAT_S = 1


class GuardedGossipSub(GossipSub):  # type: ignore[misc]  # libp2p's types are not followed
    """The router, with contained tasks and the settings of Rules."""

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

    @property
    def manager(self) -> Any:
        """The service's manager, whose tasks are contained."""
        return ContainedTasks(super().manager, self._drops)


class GuardedPubsub(Pubsub):  # type: ignore[misc]  # libp2p's types are not followed
    """Pubsub whose tasks are contained.

    Around: a frame or a key that does not decode, or a validator that raises, ends the service and the process.
    """

    def __init__(self, host: Any, router: GuardedGossipSub, topics: frozenset[str], drops: Drops) -> None:
        self._drops = drops
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

    def notify_subscriptions(self, publish_message: Any) -> None:
        """Nothing: the validator has delivered it; libp2p's queue of 32 would only fill and complain."""
