"""gossip/routing.py and gossip/observations.py: who is asked, who never is, and that crowds spread out."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crypto.identity import PeerId
from gossip.breaker import OPEN_S_MIN, State
from gossip.messages import GOODBYE, Advert, Capacity, ModelKind, ModelOffer
from gossip.observations import (
    FIRST_TOKEN_LATE_S_DEFAULT,
    FIRST_TOKEN_LATE_S_MAX,
    FULL_S_MAX,
    FULL_S_MIN,
    SUCCESS_HALF_LIFE_S,
    Observations,
)
from gossip.offer import Offer
from gossip.routing import CANDIDATES_MAX, Candidate, Need, Why, WhyNot, rank

TALE = ModelOffer(name="tale", revision="r1", kind=ModelKind.CAUSAL, context_tokens=512, dtype="bf16")
PROBE = ModelOffer(name="probe", revision="e1", kind=ModelKind.ENCODER, context_tokens=128, dtype="fp32")
NEED = Need(model="tale")
LIFE_S = 30.0


def peer(number: int) -> PeerId:
    return PeerId(f"peer-{number:03}")


def offer(number: int, *, models: tuple[ModelOffer, ...] = (TALE,), received_s: float = 0.0, **capacity: Any) -> Offer:
    fields = {"slots_total": 4, "kv_tokens_free": 4096, "decode_tok_s": 50.0, "accepting": True, **capacity}
    fields.setdefault("slots_free", fields["slots_total"])
    return Offer(
        peer=peer(number),
        sequence=1,
        advert=Advert(instance="ab" * 8, started_ms=0, agent="test", capacity=Capacity(models=models, **fields)),
        received_s=received_s,
        expires_s=received_s + LIFE_S,
    )


def ranked(need: Need, offers: list[Offer], seen: Observations, now: float = 0.0, seed: int = 1) -> list[PeerId]:
    ranking = rank(need, offers, seen, now, random.Random(seed))
    assert not isinstance(ranking, WhyNot), str(ranking)
    return [candidate.peer for candidate in ranking]


def why(need: Need, offers: list[Offer], seen: Observations | None = None, now: float = 0.0) -> WhyNot:
    ranking = rank(need, offers, seen or Observations(), now, random.Random(1))
    assert isinstance(ranking, WhyNot)
    return ranking


def firsts(need: Need, offers: list[Offer], seen: Observations, draws: int = 300) -> Counter[PeerId]:
    return Counter(ranked(need, offers, seen, seed=seed)[0] for seed in range(draws))


def prove(seen: Observations, number: int, *, first_s: float = 0.5, tok_s: float = 50.0, now: float = 0.0) -> None:
    seen.started(peer(number), now)
    seen.first_token(peer(number), first_s)
    seen.finished(peer(number), 100, 100 / tok_s, now)
    seen.ended(peer(number), now)


# --- who is never chosen ---


def test_only_who_serves_the_model_is_asked() -> None:
    offers = [offer(1), offer(2, models=(PROBE,)), offer(3, models=(PROBE, TALE))]
    assert set(ranked(NEED, offers, Observations())) == {peer(1), peer(3)}
    assert set(ranked(Need(kind="encoder"), offers, Observations())) == {peer(2), peer(3)}
    assert set(ranked(Need(), offers, Observations())) == {peer(1), peer(3)}
    candidates = rank(Need(kind="encoder"), offers, Observations(), 0.0, random.Random(1))
    assert isinstance(candidates, tuple)
    assert {candidate.model for candidate in candidates} == {PROBE}


def test_a_revision_is_kept_to() -> None:
    assert why(Need(model="tale", revision="r2"), [offer(1)]).why is Why.NONE_SERVES
    assert ranked(Need(model="tale", revision="r1"), [offer(1)], Observations()) == [peer(1)]


def test_expired_and_withdrawn_peers_are_never_asked() -> None:
    gone = offer(2)
    gone = Offer(
        peer=gone.peer,
        sequence=2,
        advert=Advert(instance="ab" * 8, started_ms=0, agent="test", capacity=GOODBYE),
        received_s=0.0,
        expires_s=LIFE_S,
    )
    assert why(NEED, [offer(1), gone], now=LIFE_S) == WhyNot.none_serves()
    assert ranked(NEED, [offer(1), gone], Observations()) == [peer(1)]


def test_who_failed_this_request_is_not_asked_again() -> None:
    need = Need(model="tale", exclude=frozenset({peer(1)}))
    assert ranked(need, [offer(1), offer(2)], Observations()) == [peer(2)]
    assert why(need, [offer(1)]).why is Why.ALL_BROKEN


def test_full_peers_are_not_asked_and_the_answer_says_so() -> None:
    full = [offer(1, slots_free=0, queue_length=8), offer(2, accepting=False), offer(3, slots_total=0)]
    answer = why(NEED, full)
    assert (answer.why, answer.serving, answer.full) == (Why.ALL_FULL, 3, 3)
    assert "3 are full" in str(answer)
    assert ranked(NEED, [offer(1, slots_free=0, queue_length=7)], Observations()) == [peer(1)]  # it may queue


def test_too_long_a_request_says_how_long_it_may_be() -> None:
    answer = why(Need(model="tale", tokens=600), [offer(1)])
    assert answer.why is Why.TOO_LONG
    assert "512" in str(answer)


def test_nobody_serves_it() -> None:
    assert str(why(NEED, [])) == "no live peer serves it"


def test_a_cut_off_peer_is_asked_again_later_once() -> None:
    seen = Observations()
    seen.started(peer(1), 0.0)
    seen.failed(peer(1), "stalled", 0.0)
    seen.ended(peer(1), 0.0)
    answer = why(NEED, [offer(1)], seen)
    assert (answer.why, answer.broken, answer.retry_after_s) == (Why.ALL_BROKEN, 1, OPEN_S_MIN)
    offers = [offer(1, received_s=OPEN_S_MIN)]
    assert ranked(NEED, offers, seen, OPEN_S_MIN) == [peer(1)]
    seen.started(peer(1), OPEN_S_MIN)
    assert why(NEED, offers, seen, OPEN_S_MIN).why is Why.ALL_BROKEN
    seen.finished(peer(1), 10, 1.0, OPEN_S_MIN)
    seen.ended(peer(1), OPEN_S_MIN)
    assert ranked(NEED, offers, seen, OPEN_S_MIN) == [peer(1)]


def test_a_pinned_peer_is_asked_though_it_is_cut_off() -> None:
    seen = Observations()
    seen.failed(peer(1), "stalled", 0.0)
    need = Need(model="tale", only=peer(1))
    assert ranked(need, [offer(1), offer(2)], seen) == [peer(1)]
    assert why(need, [offer(2)]).why is Why.NONE_SERVES


# --- who is preferred ---


def test_what_was_measured_counts_more_than_what_is_claimed() -> None:
    seen = Observations()
    prove(seen, 1, first_s=0.1, tok_s=100.0)
    prove(seen, 2, first_s=3.0, tok_s=5.0)
    offers = [offer(1, decode_tok_s=1.0), offer(2, decode_tok_s=1e9)]
    assert firsts(NEED, offers, seen)[peer(1)] > 250


@pytest.mark.parametrize("lie", [{"slots_total": 65_536}, {"decode_tok_s": 1e9}])
def test_a_stranger_gains_little_by_boasting(lie: dict[str, Any]) -> None:
    others = [offer(number, slots_total=8) for number in range(4)]
    counts = firsts(NEED, [*others, offer(4, **{"slots_total": 8, **lie})], Observations())
    assert counts[peer(4)] <= 90  # an honest fifth is 60; believed it would get 120 or all


def test_a_failing_peer_comes_after_a_sound_one_and_is_forgiven_in_time() -> None:
    seen = Observations()
    for number in (1, 2):
        prove(seen, number)
    seen.failed(peer(2), "stalled", 0.0)
    assert firsts(NEED, [offer(1), offer(2)], seen)[peer(1)] > 250
    long = 20 * SUCCESS_HALF_LIFE_S
    assert seen.observed(peer(2), long).success == pytest.approx(1.0, abs=1e-4)


def test_newcomers_are_judged_as_newcomers_fared() -> None:
    """After two of three strangers failed us, one that is proven goes first though it is busier."""
    seen = Observations()
    prove(seen, 0)
    offers = [offer(0, slots_total=4, slots_free=1), offer(1, slots_total=4, slots_free=4)]
    assert firsts(NEED, offers, seen)[peer(1)] > 200
    for number in (7, 8):
        seen.started(peer(number), 0.0)
        seen.failed(peer(number), "stalled", 0.0)
        seen.ended(peer(number), 0.0)
    assert firsts(NEED, offers, seen)[peer(0)] > 200
    assert seen.observed(peer(0), 0.0).success > 0.99, "nothing is held against those who are proven"
    assert seen.observed(peer(1), 3600.0).success > 0.9, "and it is forgotten in time"


def test_near_peers_come_first() -> None:
    seen = Observations()
    for number in (1, 2):
        prove(seen, number)
        seen.rtt(peer(number), 0.001 if number == 1 else 0.4)
    assert firsts(NEED, [offer(1), offer(2)], seen)[peer(1)] > 250


def test_a_bad_first_sample_is_not_for_ever() -> None:
    seen = Observations()
    for number in (1, 2, 3):
        prove(seen, number, first_s=10.0 if number == 3 else 0.1)
    assert firsts(NEED, [offer(1), offer(2), offer(3)], seen, draws=1000)[peer(3)] >= 5


def test_room_for_the_tokens_counts() -> None:
    need = Need(model="tale", tokens=400)
    offers = [offer(1, kv_tokens_free=4096), offer(2, kv_tokens_free=10)]
    assert firsts(need, offers, Observations())[peer(1)] > 250


def test_a_conversation_stays_where_its_prefix_is_unless_that_is_slow() -> None:
    seen = Observations()
    for number in (1, 2, 3):
        prove(seen, number, first_s=0.3 if number < 3 else 30.0)
    offers = [offer(1), offer(2), offer(3)]
    assert firsts(Need(model="tale", sticky=peer(2)), offers, seen) == {peer(2): 300}
    assert firsts(Need(model="tale", sticky=peer(3)), offers, seen)[peer(3)] < 30
    assert sorted(ranked(Need(model="tale", sticky=peer(2)), offers, seen)) == [peer(1), peer(2), peer(3)]


def test_a_stranger_gets_one_request_at_a_time_while_a_proven_peer_has_room() -> None:
    seen = Observations()
    prove(seen, 1)
    seen.started(peer(2), 0.0)
    assert firsts(NEED, [offer(1), offer(2, slots_total=64)], seen) == {peer(1): 300}


def test_the_order_holds_each_peer_once_and_is_bounded() -> None:
    order = ranked(NEED, [offer(number) for number in range(40)], Observations())
    assert len(order) == len(set(order)) == CANDIDATES_MAX


# --- crowds ---


def serve_a_burst(offers: list[Offer], requests: int, *, shared: bool) -> Counter[PeerId]:
    """Who gets `requests` sent within one advert interval: by one node, or each by a node of its own."""
    seen, counts, rng = Observations(), Counter[PeerId](), random.Random(7)
    for number in range(requests):
        if not shared:
            seen = Observations()
        ranking = rank(NEED, offers, seen, 0.01 * number, rng)
        assert isinstance(ranking, tuple)
        counts[ranking[0].peer] += 1
        seen.started(ranking[0].peer, 0.01 * number)
    return counts


def test_fifty_requests_in_one_advert_interval_spread_over_five_equal_peers() -> None:
    counts = serve_a_burst([offer(number) for number in range(5)], 50, shared=True)
    assert len(counts) == 5
    assert max(counts.values()) - min(counts.values()) <= 4


def test_fifty_clients_that_see_the_same_do_not_herd() -> None:
    counts = serve_a_burst([offer(number) for number in range(5)], 50, shared=False)
    assert len(counts) == 5
    assert max(counts.values()) <= 20  # the mean is 10; "the best" would get all 50


def test_fifty_clients_do_not_herd_on_the_emptiest_peer() -> None:
    offers = [offer(number, slots_free=number and 1) for number in range(4)] + [offer(4, slots_free=4)]
    counts = serve_a_burst(offers, 50, shared=False)
    assert counts[peer(4)] == max(counts.values())
    assert counts[peer(4)] <= 40


@pytest.mark.parametrize("shared", [True, False])
def test_unequal_peers_get_their_share(shared: bool) -> None:
    slots = (1, 2, 4, 8)
    offers = [offer(number, slots_total=slots[number]) for number in range(4)]
    counts = serve_a_burst(offers, 30, shared=shared)
    assert [counts[peer(number)] for number in range(4)] == sorted(counts.values())
    assert counts[peer(3)] >= 2 * max(1, counts[peer(1)])
    assert counts[peer(3)] <= 24


def test_a_crowd_overflows_into_queues_and_is_then_told() -> None:
    offers = [offer(1), offer(2)]
    counts = serve_a_burst(offers, 24, shared=True)  # two of four slots with two queued for each
    assert counts == {peer(1): 12, peer(2): 12}
    with pytest.raises(AssertionError):
        serve_a_burst(offers, 25, shared=True)


def test_black_holes_get_few_requests() -> None:
    """Three of ten peers take a request and never answer; 300 requests, five a second, a stall noticed after 5 s."""
    rng = random.Random(3)
    holes = {peer(0), peer(1), peer(2)}
    seen, asked, waits = Observations(), Counter[PeerId](), []
    for number in range(300):
        now, failed = number * 0.2, set[PeerId]()
        offers = [offer(n, received_s=now, slots_total=64 if n < 3 else 4, decode_tok_s=1e9) for n in range(10)]
        settle(seen, holes, now)
        ranking = rank(Need(model="tale", exclude=frozenset(failed)), offers, seen, now, rng)
        assert isinstance(ranking, tuple)
        asked[ranking[0].peer] += 1
        seen.started(ranking[0].peer, now)
        waits.append(ranking[0].peer in holes)
    assert max(asked[hole] for hole in holes) <= 5
    assert sum(waits) <= 0.05 * len(waits)


def settle(seen: Observations, holes: set[PeerId], now: float) -> None:
    """End what was under way long enough: a second at a sound peer, a stall at a black hole."""
    for number in range(10):
        who, record = peer(number), seen._records.get(peer(number))
        while record is not None and record.starts and record.starts[0] <= now - (5.0 if who in holes else 1.0):
            if who in holes:
                seen.failed(who, "stalled", now)
            else:
                seen.first_token(who, 0.2)
                seen.finished(who, 20, 0.8, now)
            seen.ended(who, now)


# --- observations ---


def test_our_own_requests_correct_a_peers_claim() -> None:
    seen, who = Observations(), peer(1)
    assert seen.load(who, 3, 0.0) == 3
    for _ in range(4):
        seen.started(who, 1.0)
    assert seen.load(who, 0, 0.0) == 4  # the advert is older than our requests
    assert seen.load(who, 4, 2.0) == 4  # the advert counts them
    assert seen.load(who, 1, 2.0) == 4  # no claim makes ours disappear
    seen.ended(who, 3.0)
    seen.ended(who, 3.0)
    assert seen.load(who, 4, 2.0) == 2  # two of the claimed ones have ended since
    assert seen.load(who, 2, 4.0) == 2


def test_a_refusal_is_no_failure_and_passes() -> None:
    seen, who = Observations(), peer(1)
    for _ in range(10):
        seen.started(who, 0.0)
        seen.failed(who, "no_room", 0.0)
        seen.ended(who, 0.0)
    observed = seen.observed(who, 0.0)
    assert (observed.state, observed.success, observed.refusing) == (State.CLOSED, 1.0, True)
    assert FULL_S_MIN < seen.retry_in_s(who, 0.0) <= FULL_S_MAX
    assert not seen.observed(who, FULL_S_MAX).refusing


@pytest.mark.parametrize("reason", ["deadline", "bad_request", "too_large"])
def test_the_requests_own_fault_is_not_the_peers(reason: str) -> None:
    seen = Observations()
    seen.started(peer(1), 0.0)
    seen.failed(peer(1), reason, 0.0)
    seen.ended(peer(1), 0.0)
    assert seen.observed(peer(1), 0.0).state is State.CLOSED


def test_lateness_follows_what_is_usual_there() -> None:
    seen = Observations()
    assert seen.first_token_late_s(peer(1)) == FIRST_TOKEN_LATE_S_DEFAULT
    for _ in range(50):
        seen.first_token(peer(1), 0.2)
    assert 0.2 < seen.first_token_late_s(peer(1)) < 0.3
    for _ in range(50):
        seen.first_token(peer(1), 1e9)
    assert seen.first_token_late_s(peer(1)) == FIRST_TOKEN_LATE_S_MAX


def test_a_lost_connection_that_is_back_is_tried_at_once() -> None:
    seen = Observations()
    seen.failed(peer(1), "unreachable", 0.0)
    assert why(NEED, [offer(1)], seen).why is Why.ALL_BROKEN
    seen.connected(peer(1), True, 1.0)
    assert ranked(NEED, [offer(1)], seen, 1.0) == [peer(1)]


def test_a_probe_that_the_client_gave_up_may_be_repeated() -> None:
    seen = Observations()
    seen.failed(peer(1), "stalled", 0.0)
    offers = [offer(1, received_s=OPEN_S_MIN)]
    for _ in range(3):
        assert ranked(NEED, offers, seen, OPEN_S_MIN) == [peer(1)]
        seen.started(peer(1), OPEN_S_MIN)
        assert why(NEED, offers, seen, OPEN_S_MIN).why is Why.ALL_BROKEN
        seen.ended(peer(1), OPEN_S_MIN)


def test_a_killed_peer_costs_one_request_and_a_broken_stream_none() -> None:
    seen = Observations()
    for number in (1, 2):
        prove(seen, number)
        seen.connected(peer(number), number == 2, 0.0)
        seen.failed(peer(number), "unreachable", 0.0)
    assert ranked(NEED, [offer(1), offer(2)], seen) == [peer(2)]


def test_observations_are_bounded_and_keep_what_is_under_way() -> None:
    seen = Observations(peers_max=10)
    seen.started(peer(0), 0.0)
    for number in range(1, 500):
        seen.rtt(peer(number), 0.1)
    assert len(seen.peers()) == 10
    assert seen.observed(peer(0), 0.0).in_flight == 1


CLAIMS = st.fixed_dictionaries(
    {
        "slots_total": st.sampled_from((0, 1, 4, 65_536)),
        "queue_length": st.sampled_from((0, 1, 1 << 20)),
        "kv_tokens_free": st.sampled_from((0, 1 << 40)),
        "decode_tok_s": st.sampled_from((0.0, 5e-324, 1e9)),
        "accepting": st.booleans(),
    }
)
HAPPENINGS = st.lists(
    st.tuples(
        st.sampled_from(("start", "token", "finish", "no_room", "stalled", "unreachable", "end", "up", "wait")),
        st.integers(0, 3),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=50)
@given(st.lists(CLAIMS, max_size=4), HAPPENINGS, st.integers(0, 9))
def test_histories(claims: list[dict[str, Any]], history: list[tuple[str, int]], seed: int) -> None:
    seen, now, rng = Observations(), 0.0, random.Random(seed)
    offers = [offer(number, **claim) for number, claim in enumerate(claims)]
    under_way = Counter[int]()
    for what, number in history:
        match what:
            case "start":
                seen.started(peer(number), now)
                under_way[number] += 1
            case "token":
                seen.first_token(peer(number), 0.1 * number)
            case "finish":
                seen.finished(peer(number), number, 0.0, now)
            case "end" if under_way[number]:
                seen.ended(peer(number), now)
                under_way[number] -= 1
            case "up":
                seen.connected(peer(number), number > 1, now)
            case "wait":
                now += 3.0 * number
            case "no_room" | "stalled" | "unreachable":
                seen.failed(peer(number), what, now)
        ranking = rank(NEED, offers, seen, now, rng)
        if isinstance(ranking, WhyNot):
            assert str(ranking)
            assert ranking.retry_after_s is None or ranking.retry_after_s >= 1.0
            continue
        assert ranking
        for candidate in ranking:
            check_candidate(candidate, seen, now)
        assert all(seen.observed(peer(n), now).in_flight == under_way[n] for n in range(4))


def check_candidate(candidate: Candidate, seen: Observations, now: float) -> None:
    capacity, observed = candidate.offer.capacity, seen.observed(candidate.peer, now)
    assert capacity.accepting
    assert candidate.offer.expires_s > now
    assert observed.state in (State.CLOSED, State.HALF_OPEN)
    assert not observed.refusing
    assert 0.0 < candidate.cost_s < 1e9
    load = seen.load(candidate.peer, capacity.queue_length, candidate.offer.received_s)
    assert load < 3 * capacity.slots_total
