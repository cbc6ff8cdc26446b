"""What one node keeps of a network that is too large to know: which offers stay, which are handed on.

Rules: core, pure functions. Models that few serve go first, so that somebody remembers them; of the others each node
keeps, and hands on, its own choice, which nobody can foresee: a hash under a secret of this process. Half of the room
at most is for what is rare, since a liar can name as many models as it likes.
Source: Jelasity et al., "Gossip-based peer sampling" (2007), for views exchanged at random; docs/ARCHITECTURE.md
"A network too large to know".
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable

from crypto.identity import PeerId
from gossip.messages import ModelKind
from gossip.offer import Offer, ServedModel

OFFERS_MAX = 512  # live offers: one in twenty of 10,000 peers, and some 400 kB
RARE_PEERS_MAX = 4  # a model that no more of the offers name is rare


class Preference:
    """This process's own order of peers: fixed, evenly spread, and not to be foreseen by others."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._of: dict[PeerId, float] = {}

    def __call__(self, peer: PeerId) -> float:
        """From 0 (kept before all others) up to 1."""
        if (known := self._of.get(peer)) is not None:
            return known
        mark = hashlib.blake2b(peer.encode(), key=self._secret, digest_size=6).digest()
        if len(self._of) >= 8 * OFFERS_MAX:
            self._of.clear()
        self._of[peer] = place = int.from_bytes(mark) / 2**48
        return place


def surplus(
    offers: Collection[Offer], room: int, preference: Preference, is_protected: Callable[[PeerId], bool]
) -> list[PeerId]:
    """Whose offers to let go so that at most `room` stay, as far as the protected allow."""
    count = len(offers) - room
    if count <= 0:
        return []
    rare = set(rarest(offers, room // 2, preference))
    loose = [offer.peer for offer in offers if offer.peer not in rare and not is_protected(offer.peer)]
    return sorted(loose, key=preference, reverse=True)[:count]


def rarest(offers: Collection[Offer], limit: int, preference: Preference) -> list[PeerId]:
    """At most `limit` of the peers that serve a model which few serve, in this node's own order."""
    return sorted(_rare(offers), key=preference)[:limit]


def sample(offers: Collection[Offer], limit: int, rng: random.Random) -> list[PeerId]:
    """At most `limit` peers to tell another node of: up to half of them for rare models, the rest as chance has it."""
    rare = _rare(offers)
    chosen = dict.fromkeys(rng.sample(rare, min(len(rare), limit // 2)))
    others = [offer.peer for offer in offers if offer.peer not in chosen]
    chosen |= dict.fromkeys(rng.sample(others, min(len(others), limit - len(chosen))))
    return list(chosen)


def served_models(offers: Iterable[Offer]) -> tuple[ServedModel, ...]:
    """What these serve: one row for each (name, revision, kind), by name."""
    rows: dict[tuple[str, str, ModelKind], ServedModel] = {}
    for offer in offers:
        for model in {(m.name, m.revision, m.kind): m for m in offer.capacity.models}.values():
            key = (model.name, model.revision, model.kind)
            row = rows.get(key)
            rows[key] = ServedModel(
                name=model.name,
                revision=model.revision,
                kind=model.kind,
                peers=1 + (row.peers if row else 0),
                context_tokens=max(model.context_tokens, row.context_tokens if row else 0),
                embeds=model.embeds or (row is not None and row.embeds),
            )
    return tuple(rows[key] for key in sorted(rows))


def _rare(offers: Collection[Offer]) -> list[PeerId]:
    serving = Counter(name for offer in offers for name in _names(offer))
    return [offer.peer for offer in offers if any(serving[name] <= RARE_PEERS_MAX for name in _names(offer))]


def _names(offer: Offer) -> set[str]:
    return {model.name for model in offer.capacity.models}
