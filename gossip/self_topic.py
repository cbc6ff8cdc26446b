"""The topic on which nodes tell of their own state: says this node's summary, hears the others'.

Rules: a shell; when to speak is decided in gossip/summaries.py, what to make of others in gossip/claims_hearing.py.
Nothing that is heard here is written to a disk.
Source: docs/PROTOCOLS.md "Gossip"; SELF.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from crypto.identity import Identity, PeerId
from gossip.claims import Claims, ClaimsStatistics
from gossip.claims_hearing import ClaimsHearing
from gossip.summaries import OwnSummary, SelfSummary, checked_summary, seal_summary, summary_topic
from p2p.errors import P2PError
from p2p.transport import Transport

_log = logging.getLogger(__name__)


class SelfTopic:
    """A node's part in that topic."""

    def __init__(
        self,
        transport: Transport,
        identity: Identity,
        network: str,
        now_ms: Callable[[], int],
        own: OwnSummary,
        hearing: ClaimsHearing,
    ) -> None:
        """now_ms: unix milliseconds."""
        self._transport, self._identity, self._network, self._now_ms = transport, identity, network, now_ms
        self.own = own
        self._hearing = hearing
        self._woken = trio.Event()  # the next summary may be due earlier than it was
        self._is_open = False

    @property
    def claims(self) -> Claims:
        """What peers say of themselves."""
        return self._hearing.claims

    def offer(self, summary: SelfSummary) -> None:
        """Say this of ourselves when it is due. Raises: LocalProtocolError (out of bounds; names the field)."""
        self.own.offer(checked_summary(summary), trio.current_time())
        self._woken.set()

    def statistics(self) -> ClaimsStatistics:
        """A snapshot of the counters."""
        return self.claims.statistics(self.own.said)

    async def open(self) -> None:
        """Listen from now on."""
        self._is_open = True
        await self._transport.subscribe(summary_topic(self._network), self._heard)

    def close(self) -> None:
        """Listen no more: the transport has ears for a moment longer."""
        self._is_open = False

    async def speak(self) -> None:
        """Say what is due, until cancelled."""
        while True:
            self._woken = trio.Event()
            with trio.move_on_at(self.own.deadline()):
                await self._woken.wait()
            if trio.current_time() >= self.own.deadline():
                await self._publish()

    async def _publish(self) -> None:
        now_ms, life_ms = self._now_ms(), self.own.life_ms
        summary, sequence = self.own.say(trio.current_time(), now_ms)
        raw = seal_summary(
            self._identity, summary, network=self._network, sequence=sequence, time_ms=now_ms, life_ms=life_ms
        )
        try:
            await self._transport.publish(summary_topic(self._network), raw)
        except P2PError as exc:  # best effort: the next refresh says it again
            self._hearing.drops["summary_publish_failed"] += 1
            _log.warning("a summary could not be published: %s", exc)

    def _heard(self, publisher: PeerId, raw: bytes) -> bool:
        """True when it is worth forwarding."""
        return self._is_open and self._hearing.heard(publisher, raw, trio.current_time(), self._now_ms())
