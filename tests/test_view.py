"""gossip/view.py: the rare is remembered, nobody foresees what is kept, and a liar takes half of the room at most."""

from __future__ import annotations

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from crypto.identity import PeerId
from gossip.messages import Advert, Capacity, ModelKind, ModelOffer
from gossip.offer import Offer
from gossip.view import OFFERS_MAX, RARE_PEERS_MAX, Preference, sample, served_models, surplus

ROOM = 40


def offer(number: int, *names: str) -> Offer:
    models = tuple(
        ModelOffer(name=name, revision="r1", kind=ModelKind.CAUSAL, context_tokens=100, dtype="bf16") for name in names
    )
    capacity = Capacity(models=models, slots_total=1, slots_free=1, accepting=True)
    said = Advert(instance="0" * 16, started_ms=0, agent="t", capacity=capacity)
    return Offer(peer=PeerId(f"p{number}"), sequence=1, advert=said, received_s=0.0, expires_s=30.0)


def kept(offers: list[Offer], secret: bytes = b"s", protected: frozenset[str] = frozenset()) -> set[str]:
    gone = surplus(offers, ROOM, Preference(secret), lambda peer: peer in protected)
    assert len(gone) == len(set(gone))
    return {each.peer for each in offers} - set(gone)


def test_nothing_goes_while_there_is_room() -> None:
    assert len(kept([offer(n, "tale") for n in range(ROOM)])) == ROOM


def test_what_few_serve_stays_before_what_many_serve() -> None:
    many = [offer(n, "tale") for n in range(200)]
    few = [offer(1000 + n, f"rare{n % 5}") for n in range(10)]
    stayed = kept(many + few)
    assert len(stayed) == ROOM
    assert {each.peer for each in few} <= stayed


def test_a_peer_with_a_common_and_a_rare_model_is_rare() -> None:
    assert "p999" in kept([*(offer(n, "tale") for n in range(200)), offer(999, "tale", "rare")])


def test_who_names_many_models_takes_half_of_the_room() -> None:
    honest = [offer(n, "tale") for n in range(100)]
    liars = [offer(1000 + n, f"lie{n}") for n in range(1000)]
    stayed = kept(honest + liars)
    chance = len(honest) / (len(honest) + len(liars))  # of what is not reserved for the rare
    assert sum(peer in {each.peer for each in honest} for peer in stayed) >= ROOM // 2 * chance / 2
    rare = [peer for peer in stayed if peer in {each.peer for each in liars}]
    assert len(stayed) == ROOM
    assert len(rare) < ROOM


def test_the_protected_stay_even_when_there_is_no_room() -> None:
    offers = [offer(n, "tale") for n in range(100)]
    protected = frozenset(f"p{n}" for n in range(60))
    assert kept(offers, protected=protected) == protected


def test_what_is_kept_is_always_the_same_here_and_other_elsewhere() -> None:
    offers = [offer(n, "tale") for n in range(400)]
    shuffled = random.Random(1).sample(offers, len(offers))
    assert kept(offers, b"one") == kept(shuffled, b"one")
    assert len(kept(offers, b"one") & kept(offers, b"two")) < ROOM / 2


def test_a_preference_is_even_fixed_and_bounded() -> None:
    preference = Preference(b"s")
    places = sorted(preference(PeerId(f"p{n}")) for n in range(8 * OFFERS_MAX + 10))
    assert places[0] >= 0.0
    assert places[-1] < 1.0
    assert max(later - earlier for earlier, later in pairwise(places)) < 0.01
    assert preference(PeerId("p1")) == Preference(b"s")(PeerId("p1"))
    assert len(preference._of) <= 8 * OFFERS_MAX


@given(st.integers(RARE_PEERS_MAX + 1, 60), st.integers(0, 60), st.integers(1, 32), st.integers(0, 9))
def test_a_sample_has_each_once_and_the_rare_up_to_half(common: int, rare: int, limit: int, seed: int) -> None:
    many = [offer(n, "tale") for n in range(common)]
    few = [offer(1000 + n, f"rare{n // RARE_PEERS_MAX}") for n in range(rare)]
    chosen = sample(many + few, limit, random.Random(seed))
    assert len(chosen) == len(set(chosen)) == min(limit, common + rare)
    assert len(set(chosen) & {each.peer for each in few}) >= min(limit // 2, rare)


def test_a_sample_is_another_each_time() -> None:
    offers, rng = [offer(n, "tale") for n in range(300)], random.Random(3)
    seen = {peer for _ in range(40) for peer in sample(offers, 32, rng)}
    assert len(seen) > 250


def test_models_are_told_once_each() -> None:
    rows = served_models([offer(1, "a", "b"), offer(2, "b"), offer(3, "b", "b")])
    assert [(row.name, row.peers) for row in rows] == [("a", 1), ("b", 3)]


def test_a_sample_leaves_room_for_the_common() -> None:
    offers = [offer(n, "tale") for n in range(90)] + [offer(1000 + n, f"rare{n}") for n in range(10)]
    common = {f"p{n}" for n in range(90)}
    assert all(len(common & set(sample(offers, 10, random.Random(seed)))) >= 3 for seed in range(20))
