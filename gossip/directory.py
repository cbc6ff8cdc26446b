"""Who offers what: the newest signed advert of each peer, until it expires.

Rules: core. A higher sequence wins; the same sequence with other bytes is equivocation, and both are kept as evidence.
An advert that its publisher sends lives from its receipt, by our monotonic clock, as long as it says, at most
ADVERT_LIFE_MS_MAX; one that a third peer hands on lives for what is left of that by the wall clock; a copy of it
does not prolong it. Else the wall clock serves only to refuse what is too old or from the future. A peer's sequence is
remembered after its advert ended, until no replay of it could pass as fresh. Nothing here can be made to grow: see
ADVERTS_MAX and gossip/view.py. Who is at fault for a refused advert: the publisher for its form, the sender for its
content.
Source: NETWORK.md "Protocols"; SECURITY.md P7, P9, P10, P12.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice

from msgspec import Struct

from crypto.envelope import Envelope, open_envelope
from crypto.errors import BadEncoding, BadSignature, WrongNetwork
from crypto.identity import PeerId
from gossip.errors import RemoteProtocolError
from gossip.messages import ADVERT_DOMAIN, ADVERT_LIFE_MS_MAX, Advert, ModelKind, advert_of
from gossip.offer import Offer, ServedModel
from gossip.view import OFFERS_MAX, Preference, sample, served_models, surplus

ADVERTS_MAX = 4096  # at most 20 MB, whoever sends them
OFFERS_SLACK = 1 / 8  # of the offers' room, so that tidying up is done now and then only
ENDS_PER_OFFER_MAX = 4  # ends that are noted for each offer that there is room for, most of offers replaced since
HANDED_LIFE_MS_MIN = 10_000  # of an advert that a third peer hands on, when its sender's clock is behind ours
SKEW_MS = 60_000  # clocks of honest machines differ by seconds; this is generous
FLOOR_KEEP_S = (ADVERT_LIFE_MS_MAX + 2 * SKEW_MS) / 1000 + 30.0  # after that any replay has expired by its own time
EVIDENCE_MAX = 64  # pairs of contradicting adverts, newest kept
OFFSETS_MAX = 64  # peers with another time than ours, for the diagnosis
_ANY_TIME_MS = 1 << 63  # the times are checked here, after the signature, so that we know whose clock is off


class Outcome(StrEnum):
    """What became of a received advert."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"  # the same bytes again: gossip does that
    STALE = "stale"  # an older sequence than one already seen, or a replay
    EXPIRED = "expired"
    FUTURE = "future"  # the sender's clock is ahead of ours by more than SKEW_MS
    MALFORMED = "malformed"
    BAD_SIGNATURE = "bad_signature"
    WRONG_NETWORK = "wrong_network"
    WRONG_SENDER = "wrong_sender"  # published by another peer than the one that signed it
    EQUIVOCATION = "equivocation"  # two statements under one sequence by one process
    TWO_INSTANCES = "two_instances"  # two statements under one sequence by two processes: a copied identity
    OWN = "own"  # our own words came back
    DUPLICATE_IDENTITY = "duplicate_identity"  # another process speaks with our key
    FULL = "full"


class Receipt(Struct, frozen=True, kw_only=True, gc=False):
    """The outcome, whose advert it was (None when that is not certain), one sentence for the log.

    sequence: of an accepted advert; nothing up to it is accepted again. A Struct, as Offer and _Entry are: they are
    made for every advert that is heard, and a dataclass takes five times as long.
    """

    outcome: Outcome
    peer: PeerId | None = None
    sequence: int = 0
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Two signed adverts of one peer that contradict each other; anybody can check them."""

    peer: PeerId
    first: bytes
    second: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryStatistics:
    """Counts since start: outcomes by name, offers evicted to make room; live offers and known sequences now."""

    outcomes: dict[str, int]
    evicted: int
    offers: int
    peers_known: int
    clock_offset_ms: int | None  # median of peers' clocks minus ours, refused ones too; None without peers
    clock_peers: int = 0  # of how many


class _Entry(Struct, gc=False):
    sequence: int
    instance: str
    raw: bytes  # empty: only the sequence is known, from before a restart
    offset_ms: int | None  # of its clock from ours; unknown when only copies came


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """Who keeps the directory. first_sequence: what this process said first, so that older echoes are known as such."""

    peer: PeerId
    instance: str
    first_sequence: int


class Directory:
    """The adverts of a network as one node knows them. `protected` peers are never evicted."""

    def __init__(
        self,
        *,
        own: Own,
        network: str,
        protected: Callable[[PeerId], bool] = lambda _peer: False,
        preference: Preference | None = None,
        adverts_max: int = ADVERTS_MAX,
        offers_max: int = OFFERS_MAX,
    ) -> None:
        """preference: which offers stay when there are more than offers_max."""
        assert adverts_max > 0
        self._own = own
        self._network = network
        self._protected = protected
        self._preference = preference or Preference(b"")
        self._adverts_max, self._offers_max = adverts_max, offers_max
        self._entries: dict[PeerId, _Entry] = {}  # in the order of first receipt: the eviction order
        self._senders: dict[bytes, PeerId] = {}  # of the entries' bytes: what is known need not be checked again
        self._offers: dict[PeerId, Offer] = {}
        self._ends: list[tuple[float, PeerId, int]] = []  # a heap: when which offer ends
        self._touched: OrderedDict[PeerId, float] = OrderedDict()  # when an entry was last made; oldest first
        self._evidence: list[Evidence] = []
        self._outcomes: Counter[Outcome] = Counter()
        self._evicted = 0
        self._offsets: dict[PeerId, int] = {}  # of the clocks that differ too much, in ms from ours

    # --- in ---

    def receive(self, raw: bytes, *, publisher: PeerId | None, now: float, now_ms: int) -> Receipt:
        """Take in an advert as it came from the network; never raises, whatever the bytes.

        publisher: the peer that the transport says published it; None for one handed on by a third peer on request.
        """
        receipt = self._receive(raw, publisher, now, now_ms)
        self._outcomes[receipt.outcome] += 1
        return receipt

    def _receive(self, raw: bytes, publisher: PeerId | None, now: float, now_ms: int) -> Receipt:
        known = self._senders.get(raw)
        if known is not None and publisher in (None, known):
            return Receipt(outcome=Outcome.DUPLICATE, peer=known)
        try:
            envelope = open_envelope(
                raw, domain=ADVERT_DOMAIN, network=self._network, now_ms=now_ms, skew_ms=_ANY_TIME_MS
            )
        except BadEncoding as exc:
            return Receipt(outcome=Outcome.MALFORMED, detail=str(exc))
        except BadSignature as exc:
            return Receipt(outcome=Outcome.BAD_SIGNATURE, detail=str(exc))
        except WrongNetwork as exc:
            return Receipt(outcome=Outcome.WRONG_NETWORK, detail=str(exc))
        sender = envelope.sender
        if publisher is not None and publisher != sender:
            return Receipt(outcome=Outcome.WRONG_SENDER, detail=f"{publisher} published an advert signed by {sender}")
        try:
            advert = advert_of(envelope)
        except RemoteProtocolError as exc:
            return Receipt(outcome=Outcome.MALFORMED, peer=sender, detail=str(exc))
        if sender == self._own.peer:
            return self._echo(envelope, advert)
        refused = _refuse_by_time(envelope, now_ms)
        if refused is not None:
            if publisher is not None:  # a copy's age says nothing of its sender's clock
                self._note_offset(sender, envelope.time_ms - now_ms)
            return refused
        life_ms = min(ADVERT_LIFE_MS_MAX, envelope.expires_ms - envelope.time_ms)
        age_ms = 0
        if publisher is None:
            age_ms = min(max(0, now_ms - envelope.time_ms), max(0, life_ms - HANDED_LIFE_MS_MIN))
        offer = Offer(
            peer=sender,
            sequence=envelope.sequence,
            advert=advert,
            received_s=now - age_ms / 1000,
            expires_s=now + (life_ms - age_ms) / 1000,
        )
        return self._newest(raw, envelope, offer, now, None if publisher is None else envelope.time_ms - now_ms)

    def _note_offset(self, peer: PeerId, offset_ms: int) -> None:
        self._offsets.pop(peer, None)
        self._offsets[peer] = offset_ms
        if len(self._offsets) > OFFSETS_MAX:
            del self._offsets[next(iter(self._offsets))]

    def _echo(self, envelope: Envelope, advert: Advert) -> Receipt:
        if advert.instance == self._own.instance or envelope.sequence < self._own.first_sequence:
            return Receipt(outcome=Outcome.OWN, peer=self._own.peer)
        return Receipt(
            outcome=Outcome.DUPLICATE_IDENTITY,
            peer=self._own.peer,
            detail=f"another process (instance {advert.instance}, at {', '.join(advert.addresses) or 'no address'}) "
            "speaks with this node's identity: stop one of the two, and give it a data directory of its own",
        )

    def _newest(self, raw: bytes, envelope: Envelope, offer: Offer, now: float, offset_ms: int | None) -> Receipt:
        sender = envelope.sender
        entry = self._entries.get(sender)
        if entry is not None and envelope.sequence <= entry.sequence:
            if envelope.sequence < entry.sequence or not entry.raw:
                return Receipt(outcome=Outcome.STALE, peer=sender)
            return self._contradiction(entry, sender, raw, offer.advert)  # the same bytes are among _senders
        if entry is None and not self._make_room(now):
            return Receipt(outcome=Outcome.FULL, peer=sender, detail=f"{self._adverts_max} peers are known already")
        if entry is not None:
            self._senders.pop(entry.raw, None)
        self._entries[sender] = _Entry(
            sequence=envelope.sequence,
            instance=offer.advert.instance,
            raw=raw,
            offset_ms=offset_ms,
        )
        self._senders[raw] = sender
        self._touch(sender, now)
        if offer.advert.is_goodbye:
            self._offers.pop(sender, None)
        else:
            self._offers[sender] = offer
            heapq.heappush(self._ends, (offer.expires_s, sender, offer.sequence))
            self._tidy()
            if len(self._ends) > ENDS_PER_OFFER_MAX * self._offers_max:
                self._ends = [(each.expires_s, peer, each.sequence) for peer, each in self._offers.items()]
                heapq.heapify(self._ends)
        return Receipt(outcome=Outcome.ACCEPTED, peer=sender, sequence=envelope.sequence)

    def _tidy(self) -> None:
        """Let go of offers when there are too many of them."""
        if len(self._offers) > self._offers_max * (1 + OFFERS_SLACK):
            for peer in surplus(self._offers.values(), self._offers_max, self._preference, self._protected):
                del self._offers[peer]
                self._evicted += 1

    def _contradiction(self, entry: _Entry, sender: PeerId, raw: bytes, advert: Advert) -> Receipt:
        self._evidence.append(Evidence(peer=sender, first=entry.raw, second=raw))
        del self._evidence[:-EVIDENCE_MAX]
        one_process = entry.instance == advert.instance
        return Receipt(
            outcome=Outcome.EQUIVOCATION if one_process else Outcome.TWO_INSTANCES,
            peer=sender,
            detail=f"{sender} signed two different adverts with sequence {entry.sequence}"
            + ("" if one_process else f" from two processes ({entry.instance} and {advert.instance})"),
        )

    def _make_room(self, now: float) -> bool:
        """Whether there is room for one more peer, after the first in line without protection had to go."""
        if len(self._entries) < self._adverts_max:
            return True
        self.tick(now)
        if len(self._entries) < self._adverts_max:
            return True
        for peer in self._entries:
            if not self._protected(peer):
                self._remove(peer)
                self._evicted += 1
                return True
        return False

    def _remove(self, peer: PeerId) -> None:
        self._senders.pop(self._entries.pop(peer).raw, None)
        self._offers.pop(peer, None)
        del self._touched[peer]

    def _touch(self, peer: PeerId, now: float) -> None:
        self._touched[peer] = now
        self._touched.move_to_end(peer)

    def forget(self, peer: PeerId) -> None:
        """Drop a peer's offer (it is banned, say); its sequence stays known."""
        self._offers.pop(peer, None)

    def tick(self, now: float) -> tuple[PeerId, ...]:
        """End what expired; returns the peers whose offers ended."""
        gone = list[PeerId]()
        while self._ends and self._ends[0][0] <= now:
            _, peer, sequence = heapq.heappop(self._ends)
            offer = self._offers.get(peer)
            if offer is not None and offer.sequence == sequence:
                del self._offers[peer]
                gone.append(peer)
        while self._touched and next(iter(self._touched.values())) + FLOOR_KEEP_S <= now:
            self._remove(next(iter(self._touched)))
        return tuple(gone)

    def deadline(self, now: float) -> float:
        """When the next offer expires; the longest life from now when there is none."""
        return min((offer.expires_s for offer in self._live(now)), default=now + ADVERT_LIFE_MS_MAX / 1000)

    # --- out ---

    def offers(self, now: float, *, model: str | None = None, kind: ModelKind | None = None) -> tuple[Offer, ...]:
        """Live offers, of a model and of a kind if asked; full or broken peers are among them."""
        return tuple(offer for offer in self._live(now) if _offers_it(offer, model, kind))

    def offer_of(self, peer: PeerId, now: float) -> Offer | None:
        """A peer's live offer."""
        offer = self._offers.get(peer)
        return offer if offer is not None and offer.expires_s > now else None

    def models(self, now: float) -> tuple[ServedModel, ...]:
        """What the network serves, as far as it is known: one row for each (name, revision, kind), by name."""
        return served_models(self._live(now))

    def recent(self, now: float, limit: int) -> list[bytes]:
        """The signed bytes of at most `limit` live adverts, latest first, for a peer that has just joined."""
        live = ((self._touched[offer.peer], offer.peer) for offer in self._live(now))
        return self._raws(peer for _, peer in islice(sorted(live, key=lambda pair: -pair[0]), limit))

    def sample(self, now: float, limit: int, rng: random.Random) -> list[bytes]:
        """The signed bytes of at most `limit` live adverts, the rare before the others, for a peer that wants more."""
        return self._raws(sample(self._live(now), limit, rng))

    def serving(self, model: str, now: float, limit: int, rng: random.Random) -> list[bytes]:
        """The signed bytes of at most `limit` live adverts of peers that serve a model."""
        offers = self.offers(now, model=model)
        return self._raws(offer.peer for offer in rng.sample(offers, min(limit, len(offers))))

    def _raws(self, peers: Iterable[PeerId]) -> list[bytes]:
        return [self._entries[peer].raw for peer in peers]

    def evidence(self) -> tuple[Evidence, ...]:
        """Contradictions seen, oldest first."""
        return tuple(self._evidence)

    def floors(self) -> dict[PeerId, int]:
        """The highest sequence seen of each peer, to be kept over a restart."""
        return {peer: entry.sequence for peer, entry in self._entries.items()}

    def restore(self, floors: Mapping[PeerId, int], now: float) -> None:
        """Take back what `floors` gave before a restart, so that nothing older is believed again."""
        for peer, sequence in islice(floors.items(), self._adverts_max):
            if peer not in self._entries:
                self._entries[peer] = _Entry(sequence, "", b"", None)
                self._touch(peer, now)

    def statistics(self, now: float) -> DirectoryStatistics:
        """A snapshot of the counters."""
        live = {offer.peer: self._entries[offer.peer].offset_ms for offer in self._live(now)}
        offsets = sorted(offset for offset in {**self._offsets, **live}.values() if offset is not None)
        return DirectoryStatistics(
            outcomes={outcome.value: count for outcome, count in self._outcomes.items()},
            evicted=self._evicted,
            offers=len(live),
            peers_known=len(self._entries),
            clock_offset_ms=offsets[len(offsets) // 2] if offsets else None,
            clock_peers=len(offsets),
        )

    def _live(self, now: float) -> list[Offer]:
        return [offer for offer in self._offers.values() if offer.expires_s > now]


def _refuse_by_time(envelope: Envelope, now_ms: int) -> Receipt | None:
    """A refusal when the statement's own time is over or not yet come, by our wall clock give or take SKEW_MS."""
    ahead_ms = envelope.time_ms - now_ms
    if ahead_ms > SKEW_MS:
        detail = f"{envelope.sender}'s clock is {ahead_ms // 1000} s ahead of ours: one of the two is wrong"
        return Receipt(outcome=Outcome.FUTURE, peer=envelope.sender, detail=detail)
    ends_ms = min(envelope.expires_ms, envelope.time_ms + ADVERT_LIFE_MS_MAX)
    if ends_ms + SKEW_MS < now_ms:
        detail = f"{envelope.sender}'s advert ended {(now_ms - ends_ms) // 1000} s ago by our clock"
        return Receipt(outcome=Outcome.EXPIRED, peer=envelope.sender, detail=detail)
    return None


def _offers_it(offer: Offer, model: str | None, kind: ModelKind | None) -> bool:
    return any(
        (model is None or served.name == model) and (kind is None or served.can(kind))
        for served in offer.capacity.models
    )
