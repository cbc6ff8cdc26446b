"""Which peers to ask, best first: a pure function of what is needed, offered and observed.

Rules: core, without state; chance is an argument. A peer is judged by the seconds an answer would take: what was
measured counts in full, what is only claimed is capped. Peers are drawn by chance in proportion to their slots and the
better of two drawn goes first (many clients with the same view must not all take the same best peer); a small part
of the draws skips the comparison, so that a bad first sample is not for ever. A peer that never finished a request
for us gets one at a time while a proven one has room, and of such peers only one of each public network (/24, IPv6
/56) is tried for a request before all others: identities are cheap, networks less so. Withdrawn, expired, excluded and
cut-off peers are never chosen. What a peer claims of its own state (gossip/claims.py) orders two peers only where own
observation rates them alike and bears both claims out.
Source: SERVING.md "Routing"; M. Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing" (2001);
P. Efraimidis, P. Spirakis, "Weighted random sampling with a reservoir" (2006).
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from crypto.identity import PeerId
from gossip.breaker import State
from gossip.messages import ModelKind, ModelOffer
from gossip.observations import Observations, Observed
from gossip.offer import Offer
from p2p.address import network_of

CANDIDATES_MAX = 8  # no request tries more peers than that
EXPLORE_SHARE = 0.05  # of draws that skip the comparison
QUEUE_PER_SLOT = 2  # SECURITY.md 5: a queue longer than that is no room
ANSWER_TOKENS = 64.0  # a typical answer, to turn tokens a second into seconds
RTT_S_DEFAULT = 0.05
DIAL_S = 0.3  # what a missing connection costs first
FIRST_TOKEN_S_DEFAULT = 0.5
CLAIMED_TOK_S = (5.0, 50.0)  # claims beyond these are not believed before they are measured
CLAIMED_SLOTS_MAX = 8  # of a peer that never finished a request for us
UNPROVEN_S = 0.3  # the handicap of such a peer
FAILURE_S = 10.0  # what a failed attempt costs: noticing and asking another
STICKY_FACTOR = 2.0  # a peer that holds the conversation's prefix may be so much slower
ALIKE_SHARE = 0.05  # of the cost: averages of a dozen samples tell no smaller difference


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a request needs. model None: any of the kind. tokens: prompt and answer together, 0 = not known.

    exclude: peers that already failed this request. sticky: the peer that holds the conversation's prefix.
    only: the one peer that the user wants, cut off or not.
    """

    model: str | None = None
    revision: str | None = None
    kind: str = ModelKind.CAUSAL
    tokens: int = 0
    exclude: frozenset[PeerId] = frozenset()
    sticky: PeerId | None = None
    only: PeerId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A peer to ask, for which model, and the seconds an answer is expected to take."""

    offer: Offer
    model: ModelOffer
    cost_s: float
    in_doubt: bool  # unproven, and already trying a request of ours or remembered for failing
    hint: float = 0.0  # see gossip.claims.hint: 0 is none

    @property
    def peer(self) -> PeerId:
        """Whom to ask."""
        return self.offer.peer

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where it says it can be dialled."""
        return self.offer.advert.addresses


class Why(StrEnum):
    """Why nobody can be asked."""

    NONE_SERVES = "none_serves"
    TOO_LONG = "too_long"  # longer than the context of all that serve it
    ALL_FULL = "all_full"
    ALL_BROKEN = "all_broken"  # cut off, or already failed this request


@dataclass(frozen=True, slots=True, kw_only=True)
class WhyNot:
    """Why the ranking is empty. serving: live peers that serve the model at all, the counts beside it are of these."""

    why: Why
    serving: int = 0
    too_short: int = 0
    full: int = 0
    broken: int = 0
    context_tokens_max: int = 0
    retry_after_s: float | None = None

    @classmethod
    def none_serves(cls) -> WhyNot:
        """Nobody serves it."""
        return cls(why=Why.NONE_SERVES)

    def __str__(self) -> str:
        match self.why:
            case Why.NONE_SERVES:
                return "no live peer serves it"
            case Why.TOO_LONG:
                return (
                    f"longer than the {self.context_tokens_max} tokens that the {self.serving} peers serving it allow"
                )
            case Why.ALL_FULL | Why.ALL_BROKEN:
                return f"of {self.serving} peers serving it {self.full} are full and {self.broken} failing"


def no_hint(_peer: PeerId, _seen: Observed, _now: float) -> float:
    """Nobody claims anything."""
    return 0.0


def rank(
    need: Need,
    offers: Iterable[Offer],
    observations: Observations,
    now: float,
    rng: random.Random,
    hint: Callable[[PeerId, Observed, float], float] = no_hint,
) -> tuple[Candidate, ...] | WhyNot:
    """At most CANDIDATES_MAX peers to try in this order, or why there is none. now: monotonic seconds.

    hint: gossip.claims.Claims.hint.
    """
    serving = [(offer, model) for offer in offers if (model := _served(need, offer, now)) is not None]
    sure: list[Candidate] = []
    doubt: list[Candidate] = []
    too_short, full, broken, waits_s = 0, 0, 0, []
    networks = {_network(offer, observations) for offer, _ in serving if offer.peer in need.exclude}
    for offer, model in _drawn(serving, need, observations, rng):
        if need.tokens > model.context_tokens:
            too_short += 1
            continue
        seen = observations.observed(offer.peer, now)
        load = observations.load(offer.peer, _claimed_load(offer), offer.received_s)
        if offer.peer in need.exclude or (seen.state in (State.OPEN, State.PROBING) and need.only is None):
            broken += 1
        elif _is_full(offer, seen, load):
            full += 1
        else:
            candidate = _candidate(need, offer, model, seen, load, hint(offer.peer, seen, now))
            is_new = seen.proven or _is_of_a_new_network(offer, observations, networks, now)
            (sure if is_new and not candidate.in_doubt else doubt).append(candidate)
            if len(sure) > CANDIDATES_MAX:
                break
            continue
        if offer.peer not in need.exclude:
            waits_s.append(observations.retry_in_s(offer.peer, now))
    if sure or doubt:
        return _ordered(sure, doubt, need.sticky, rng)
    return WhyNot(
        why=_why(len(serving), too_short, full),
        serving=len(serving),
        too_short=too_short,
        full=full,
        broken=broken,
        context_tokens_max=max((model.context_tokens for _, model in serving), default=0),
        retry_after_s=max(1.0, min(waits_s)) if waits_s else None,
    )


def _is_of_a_new_network(offer: Offer, observations: Observations, networks: set[str | None], now: float) -> bool:
    """Whether no peer of its network stands in `networks` or failed us lately; it does from now on."""
    network = _network(offer, observations)
    if network is None:
        return True
    if network in networks or observations.is_dubious(network, now):
        return False
    networks.add(network)
    return True


def _network(offer: Offer, observations: Observations) -> str | None:
    """The public network of a peer: where it was seen, else the one that it claims; None for a private one."""
    return observations.network(offer.peer) or network_of(next(iter(offer.advert.addresses), None))


def _drawn(
    serving: Sequence[tuple[Offer, ModelOffer]], need: Need, observations: Observations, rng: random.Random
) -> Iterator[tuple[Offer, ModelOffer]]:
    """All of them, drawn one by one without replacement in proportion to their slots; the sticky peer first of all."""
    heap = [
        (
            -1.0
            if offer.peer == need.sticky
            # an exponential draw over the weight: the smallest belongs to each with the chance of its weight
            else rng.expovariate(_weight(offer, observations.is_proven(offer.peer))),
            number,
        )
        for number, (offer, _) in enumerate(serving)
    ]
    heapq.heapify(heap)
    while heap:
        yield serving[heapq.heappop(heap)[1]]


def _why(serving: int, too_short: int, full: int) -> Why:
    if not serving:
        return Why.NONE_SERVES
    if too_short == serving:
        return Why.TOO_LONG
    return Why.ALL_FULL if full else Why.ALL_BROKEN


def _served(need: Need, offer: Offer, now: float) -> ModelOffer | None:
    """The model of this offer that meets the need: one made for it, then the longest context."""
    if offer.expires_s <= now or need.only not in (None, offer.peer):
        return None
    best: ModelOffer | None = None
    for model in offer.capacity.models:  # plainly, for this runs over the whole directory
        if need.model not in (None, model.name) or need.revision not in (None, model.revision):
            continue
        if model.can(need.kind) and (best is None or _fitness(model, need) > _fitness(best, need)):
            best = model
    return best


def _fitness(model: ModelOffer, need: Need) -> tuple[bool, int]:
    return model.kind == need.kind, model.context_tokens


def _claimed_load(offer: Offer) -> int:
    capacity = offer.capacity
    return capacity.slots_total - capacity.slots_free + capacity.queue_length


def _weight(offer: Offer, is_proven: bool) -> int:
    """Its slots, as far as they are believed."""
    slots = offer.capacity.slots_total
    return max(1, slots if is_proven else min(slots, CLAIMED_SLOTS_MAX))


def _is_full(offer: Offer, seen: Observed, load: int) -> bool:
    room = offer.capacity.slots_total * (1 + QUEUE_PER_SLOT)
    return not offer.capacity.accepting or seen.refusing or load >= room


def _candidate(need: Need, offer: Offer, model: ModelOffer, seen: Observed, load: int, hint: float) -> Candidate:
    """Judge one peer: the seconds of network, waiting, first token, typical answer, and likely failure."""
    capacity, slots = offer.capacity, _weight(offer, seen.proven)
    if seen.tok_s is not None:
        tok_s = seen.tok_s
    else:
        tok_s = min(max(capacity.decode_tok_s, CLAIMED_TOK_S[0]), CLAIMED_TOK_S[1])
    answer_s = 0.0 if need.kind == ModelKind.ENCODER else ANSWER_TOKENS / max(tok_s, 0.1)
    first_s = seen.first_token_s if seen.first_token_s is not None else FIRST_TOKEN_S_DEFAULT
    work_s = first_s + answer_s * (1.0 + min(load, slots) / slots)  # a full batch halves each one's share
    waiting = max(0, load + 1 - slots)
    if model.kind == ModelKind.CAUSAL and need.tokens > capacity.kv_tokens_free:
        waiting = max(waiting, 1)  # somebody must finish first
    cost_s = (
        (seen.rtt_s if seen.rtt_s is not None else RTT_S_DEFAULT)
        + (DIAL_S if seen.connected is False else 0.0)
        + work_s
        + work_s * waiting / slots
        + FAILURE_S * (1.0 - seen.success)
        + (0.0 if seen.proven else UNPROVEN_S + load / slots)
    )
    return Candidate(
        offer=offer,
        model=model,
        cost_s=cost_s,
        in_doubt=not seen.proven and (seen.in_flight > 0 or seen.distrusted),
        hint=hint,
    )


def _ordered(
    sure: Sequence[Candidate], doubt: Sequence[Candidate], sticky: PeerId | None, rng: random.Random
) -> tuple[Candidate, ...]:
    """Two choices, then two choices among the rest, and so on; peers in doubt behind the others."""
    held = next((candidate for candidate in (*sure, *doubt) if candidate.peer == sticky), None)
    others = [candidate for candidate in sure if candidate is not held]
    order = _two_choices(others, rng) + _two_choices([c for c in doubt if c is not held], rng)
    if held is not None:
        keeps = not order or held.cost_s <= STICKY_FACTOR * order[0].cost_s
        order.insert(0 if keeps else len(order), held)
    return tuple(order[:CANDIDATES_MAX])


def _two_choices(drawn: Sequence[Candidate], rng: random.Random) -> list[Candidate]:
    """Of the first two drawn the cheaper goes first; the other one is then compared with the next drawn."""
    order, left = list[Candidate](), list(drawn)
    while len(left) > 1:
        swap = _is_better(left[1], left[0]) and rng.random() >= EXPLORE_SHARE
        order.append(left.pop(1 if swap else 0))
    return order + left


def _is_better(one: Candidate, other: Candidate) -> bool:
    """By own observation; where that cannot tell two apart, by what both claim and it bears out."""
    are_alike = abs(one.cost_s - other.cost_s) <= ALIKE_SHARE * min(one.cost_s, other.cost_s)
    if are_alike and one.hint and other.hint and one.hint != other.hint:
        return one.hint > other.hint
    return one.cost_s < other.cost_s
