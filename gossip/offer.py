"""One peer's live advert, and one model as the network serves it.

Rules: core, data only. Times are monotonic seconds of this node.
"""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import Struct

from crypto.identity import PeerId
from gossip.messages import Advert, Capacity, ModelKind


class Offer(Struct, frozen=True, kw_only=True, gc=False):
    """A live advert. received_s: when it was said, as far as we can tell; expires_s: when it ends."""

    peer: PeerId
    sequence: int
    advert: Advert
    received_s: float
    expires_s: float

    @property
    def capacity(self) -> Capacity:
        """What the peer says it can do."""
        return self.advert.capacity


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model as the network serves it: context_tokens is the longest that any of `peers` peers offers."""

    name: str
    revision: str
    kind: ModelKind
    peers: int
    context_tokens: int
    embeds: bool
