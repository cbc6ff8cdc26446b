"""gossip/routing.py: identities are cheap and networks less so; many peers of one network are no more than one."""

from __future__ import annotations

import random

from msgspec.structs import replace

from crypto.identity import PeerId
from gossip.messages import Advert, Capacity, ModelKind, ModelOffer
from gossip.observations import NETWORKS_MAX, SUCCESS_HALF_LIFE_S, Observations
from gossip.offer import Offer
from gossip.routing import CANDIDATES_MAX, Need, WhyNot, rank

TALE = ModelOffer(name="tale", revision="r1", kind=ModelKind.CAUSAL, context_tokens=512, dtype="bf16")
SAID = Advert(instance="ab" * 8, started_ms=0, agent="test")
ROOM = Capacity(models=(TALE,), slots_total=8, slots_free=8, kv_tokens_free=4096, accepting=True)
CROWD = "45.0.0."


def offer(name: str, ip: str) -> Offer:
    said = replace(SAID, addresses=(f"/ip4/{ip}/tcp/4001",), capacity=ROOM)
    return Offer(peer=PeerId(name), sequence=1, advert=said, received_s=0.0, expires_s=1e9)


def crowd(count: int = 100) -> list[Offer]:
    return [offer(f"sybil{n}", f"{CROWD}{n}") for n in range(count)]


def alone(count: int = 4) -> list[Offer]:
    return [offer(f"honest{n}", f"{20 + n}.0.0.1") for n in range(count)]


def ranked(offers: list[Offer], seen: Observations, *, need: Need | None = None, seed: int = 1) -> list[str]:
    ranking = rank(need or Need(model="tale"), offers, seen, 0.0, random.Random(seed))
    assert not isinstance(ranking, WhyNot)
    return [candidate.peer for candidate in ranking]


def failed(seen: Observations, name: str, now: float = 0.0) -> None:
    seen.started(PeerId(name), now)
    seen.failed(PeerId(name), "stalled", now)
    seen.ended(PeerId(name), now)


def worked(seen: Observations, name: str, now: float = 0.0) -> None:
    seen.started(PeerId(name), now)
    seen.finished(PeerId(name), 10, 1.0, now)
    seen.ended(PeerId(name), now)


def test_of_a_network_of_strangers_one_is_tried_before_all_others() -> None:
    for seed in range(20):
        order = ranked(crowd() + alone(), Observations(), seed=seed)
        assert len(order) == CANDIDATES_MAX
        assert sum(name.startswith("sybil") for name in order[:5]) == 1


def test_after_it_failed_this_request_no_other_of_its_network_comes_first() -> None:
    need = Need(model="tale", exclude=frozenset({PeerId("sybil3")}))
    for seed in range(20):
        assert all(
            name.startswith("honest") for name in ranked(crowd() + alone(), Observations(), need=need, seed=seed)[:4]
        )


def test_when_there_is_nobody_else_they_are_tried() -> None:
    assert len(ranked(crowd(), Observations())) == CANDIDATES_MAX


def test_where_a_peer_was_seen_counts_and_not_what_it_claims() -> None:
    seen = Observations()
    liars = [offer(f"sybil{n}", f"{60 + n}.0.0.1") for n in range(20)]
    for liar in liars:
        seen.located(liar.peer, f"{CROWD}0/24")
    assert sum(name.startswith("sybil") for name in ranked(liars + alone(), seen)[:5]) == 1


def test_a_network_that_failed_comes_last_for_the_next_request_too() -> None:
    seen = Observations()
    seen.located(PeerId("sybil3"), f"{CROWD}0/24")
    failed(seen, "sybil3")
    assert all(name.startswith("honest") for name in ranked(crowd() + alone(), seen)[:4])
    assert seen.is_dubious(f"{CROWD}0/24", 0.0)
    assert not seen.is_dubious(f"{CROWD}0/24", 2 * SUCCESS_HALF_LIFE_S)


def test_proven_peers_of_one_network_are_all_welcome() -> None:
    seen, offers = Observations(), crowd(6)
    for each in offers:
        seen.located(each.peer, f"{CROWD}0/24")
        worked(seen, each.peer)
    failed(seen, "sybil0")
    firsts = [name for seed in range(20) for name in ranked(offers + alone(6), seen, seed=seed)[:6]]
    assert sum(name.startswith("sybil") for name in firsts) > 40  # of 120; of strangers it would be 20 at most


def test_what_a_proven_peer_does_says_nothing_of_its_neighbours() -> None:
    seen = Observations()
    for name in ("p0", "p1"):
        seen.located(PeerId(name), "net")
    worked(seen, "p0")
    for _ in range(9):
        failed(seen, "p0")
    assert not seen.is_dubious("net", 0.0)


def test_a_network_is_not_dubious_for_one_failure_among_successes() -> None:
    seen = Observations()
    for n in range(3):
        seen.located(PeerId(f"p{n}"), "net")
    worked(seen, "p0")
    failed(seen, "p1")
    assert not seen.is_dubious("net", 0.0)
    failed(seen, "p2")
    failed(seen, "p2")
    assert seen.is_dubious("net", 0.0)


def test_neighbours_on_a_private_network_are_not_one() -> None:
    lan = [offer(f"lan{n}", f"192.168.1.{n}") for n in range(12)]
    assert len(ranked(lan, Observations())) == CANDIDATES_MAX
    seen = Observations()
    failed(seen, "lan3")
    assert sum(name == "lan3" for name in ranked(lan, seen)[:7]) == 0


def test_networks_are_bounded() -> None:
    seen = Observations()
    for n in range(NETWORKS_MAX + 9):
        seen.located(PeerId(f"p{n}"), f"net{n}")
        failed(seen, f"p{n}")
    assert len(seen._networks) == NETWORKS_MAX
    assert seen.is_dubious(f"net{NETWORKS_MAX + 8}", 0.0)
