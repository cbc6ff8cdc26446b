"""Asking others for what this node does not know: the question's wire form, whom to ask, when to give up.

Rules: core. A question is for a sample of what a peer knows, or for who serves a model. A peer that knows nobody asks
its own neighbours once, if it is asked to; they ask nobody. A name that nobody knew is not searched for again at once,
and searches are few, because a stranger may ask this node's door for any name.
Source: Chawathe et al., "Making Gnutella-like P2P systems scalable" (2003): search by neighbours' indices, one hop on.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Annotated

from msgspec import Meta, Struct

from crypto.canonical import Limits, decode_struct, encode_struct
from crypto.errors import BadEncoding
from crypto.identity import PeerId
from gossip.errors import RemoteProtocolError
from gossip.messages import Name
from p2p.allowance import Buckets

FIND_PROTOCOL = "/openagi/find/1"  # one question, then adverts, one a frame, then the end
FIND_ADVERTS_MAX = 32  # in one answer
FOUND_ADVERTS = 8  # that are asked for when a model is wanted
_LIMITS = Limits(bytes_max=1024, items_max=16, array_max=0, depth_max=1)  # of a question
ASKED_AT_ONCE = 4
ASKED_MAX = 16  # neighbours of ours in one search
ONWARD_MAX = 8  # neighbours that a peer asks on our behalf
ONWARD_RATE_PER_S, ONWARD_BURST = 2.0, 16.0  # of all such questions together, so that nobody asks many through us
SEARCH_RATE_PER_S, SEARCH_BURST = 1.0, 8.0  # of our own
SEARCH_S = 3.0
ONWARD_S = 1.0
UNKNOWN_S = 10.0  # a name that was not found is believed unknown
UNKNOWN_NAMES_MAX = 256
SAMPLE_S = 20.0  # between samples from a neighbour
SAMPLE_ADVERTS = 32


class Find(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A question. model None: a sample. onward: who does not know may ask its neighbours."""

    model: Name | None = None
    limit: Annotated[int, Meta(ge=1, le=FIND_ADVERTS_MAX)] = FIND_ADVERTS_MAX
    onward: bool = False


def find_to_wire(find: Find) -> bytes:
    """The question's frame."""
    return encode_struct(find)


def find_of(raw: bytes) -> Find:
    """The question of a frame. Raises: RemoteProtocolError, and nothing else, for any bytes."""
    try:
        return decode_struct(raw, Find, _LIMITS)
    except BadEncoding as exc:
        raise RemoteProtocolError(f"a question that cannot be read: {exc}") from exc


class Searches:
    """Which names are worth a search now, and how often others may have us ask."""

    def __init__(self) -> None:
        self._own = Buckets(rate_per_s=SEARCH_RATE_PER_S, burst=SEARCH_BURST)
        self._onward = Buckets(rate_per_s=ONWARD_RATE_PER_S, burst=ONWARD_BURST)
        self._unknown: OrderedDict[str, float] = OrderedDict()  # name -> until when, oldest first

    def may_search(self, model: str, now: float) -> bool:
        """Whether to search for a model that no known peer serves."""
        if self._unknown.get(model, now) > now:
            return False
        return self._own.take("own", now)

    def may_ask_onward(self, now: float) -> bool:
        """Whether to ask our neighbours on somebody's behalf."""
        return self._onward.take("onward", now)

    def not_found(self, model: str, now: float) -> None:
        """A search ended with nothing."""
        self._unknown[model] = now + UNKNOWN_S
        self._unknown.move_to_end(model)
        if len(self._unknown) > UNKNOWN_NAMES_MAX:
            self._unknown.popitem(last=False)


class Search:
    """One search under way: who is asked next, until somebody knows."""

    def __init__(self, peers: Iterable[PeerId], limit: int) -> None:
        """Peers in the order in which they are asked; at most `limit` of them."""
        self._left = deque(list(peers)[:limit])
        self._asking = 0
        self.is_found = False

    def next(self) -> PeerId | None:
        """Whom to ask now; None: nobody, for now or at all (`is_over`)."""
        if self.is_found or not self._left or self._asking >= ASKED_AT_ONCE:
            return None
        self._asking += 1
        return self._left.popleft()

    def answered(self, *, is_found: bool) -> None:
        """One that was asked has answered, or never will."""
        self._asking -= 1
        self.is_found |= is_found

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to come."""
        return self.is_found or not (self._left or self._asking)
