"""Who counts in a round: the same at every member, whatever came first there."""

from __future__ import annotations

import itertools
import random

import pytest

from crypto.digest import Digest, digest
from crypto.identity import PeerId
from gossip.gathering import Candidate
from model.gate import ONE, Reason, Run
from node.training_choice import Choice

RUN = Run(elements=100, sparse=True)


def blob(peer: str) -> Digest:
    return digest(peer.encode())


def candidate(peer: str, **changes: object) -> Candidate:
    fields: dict[str, object] = {
        "peer": PeerId(peer),
        "header": digest(b"header of " + peer.encode()),
        "blob": blob(peer),
        "steps": 2,
        "tokens": 100,
        "scores": (),
        "place": 0,
        "is_proven": True,
    }
    return Candidate(**{**fields, **changes})  # type: ignore[arg-type]  # a test's own fields


def choice(norms: dict[str, float], overlaps: dict[tuple[str, str], float] | None = None) -> Choice:
    """What one member found: payloads in this order, each compared with those before it."""
    made, seen = Choice(RUN), list[str]()
    pairs = {frozenset(pair): share for pair, share in (overlaps or {}).items()}
    for peer, norm in norms.items():
        shares = {blob(other): pairs.get(frozenset((peer, other)), 0.0) for other in seen}
        made.note(blob(peer), norm, shares)
        seen.append(peer)
    return made


def reasons(made: Choice) -> dict[str, Reason]:
    return {verdict.peer: verdict.reason for verdict in made.verdicts}


def test_all_members_choose_alike_whatever_came_first() -> None:
    norms = {"a": 1.0, "b": 2.0, "c": 4.0, "d": 3.0, "e": float("nan"), "f": 5e9}
    candidates = tuple(
        candidate(peer, place=place, tokens=100 * (place + 1), scores=(5, 5, -1 if peer != "d" else -9) * 1)
        for place, peer in enumerate(norms)
    )
    overlaps = {("a", "c"): 0.9, ("b", "c"): 0.1}
    found = set()
    for seed in range(20):
        order = list(norms)
        random.Random(seed).shuffle(order)
        made = choice({peer: norms[peer] for peer in order}, overlaps)
        found.add((made.choose(candidates), made.verdicts))
    assert len(found) == 1
    [(parts, verdicts)] = found
    assert [verdict.peer for verdict in verdicts] == sorted(norms)
    assert [weight > 0 for weight, _ in parts] == [True, True, False, True, False, False]


def test_the_answer_is_in_the_order_of_the_question() -> None:
    norms = {"a": 1.0, "b": 2.0, "c": 3.0}
    made = choice(norms)
    parts = {peer: made.choose((candidate(peer),))[0] for peer in norms}
    assert set(parts.values()) == {(ONE, ONE)}
    whole = dict(zip("abc", made.choose(tuple(map(candidate, "abc"))), strict=True))
    for order in itertools.permutations("abc"):
        assert made.choose(tuple(map(candidate, order))) == tuple(whole[peer] for peer in order)
    assert whole["c"] == (ONE, int(2 / 3 * ONE))  # clipped to the median
    assert whole["a"] == (ONE, ONE)


def test_of_two_alike_the_later_one_is_the_copy() -> None:
    made = choice({"a": 1.0, "b": 1.0}, {("a", "b"): 1.0})
    assert made.choose((candidate("a", place=3), candidate("b", place=1))) == ((0, ONE), (ONE, ONE))
    assert reasons(made) == {"a": Reason.COPY, "b": Reason.ACCEPTED}
    assert "those of b" in made.verdicts[0].sentence
    assert made.choose((candidate("a", place=1), candidate("b", place=3))) == ((ONE, ONE), (0, ONE))


def test_overlaps_with_who_is_no_candidate_count_nothing() -> None:
    made = choice({"a": 1.0, "b": 1.0}, {("a", "b"): 0.5})
    assert made.choose((candidate("b"),)) == ((ONE, ONE),)


def test_on_probation_a_member_is_heard_with_weight_0_and_moves_no_median() -> None:
    made = choice({"a": 1.0, "b": 1.0, "n": 1e6})
    parts = made.choose((candidate("a"), candidate("b"), candidate("n", is_proven=False, tokens=1 << 30)))
    assert parts == ((ONE, ONE), (ONE, ONE), (0, ONE))
    assert reasons(made)["n"] is Reason.PROBATION


def test_who_harms_by_the_word_of_three_is_out_and_by_the_word_of_two_is_not() -> None:
    made = choice({"a": 1.0, "b": 1.0})
    assert made.choose((candidate("a", scores=(-5, -1, 9)), candidate("b", scores=(-5, -1)))) == ((0, ONE), (ONE, ONE))
    assert reasons(made) == {"a": Reason.SCORE, "b": Reason.ACCEPTED}


def test_a_claim_counts_for_no_more_than_twice_the_median() -> None:
    made = choice({"a": 1.0, "b": 1.0, "c": 1.0})
    parts = made.choose((candidate("a"), candidate("b"), candidate("c", tokens=1_000_000_000)))
    assert [weight for weight, _ in parts] == [ONE, ONE, 2 * ONE]


def test_a_candidate_that_came_twice_leaves_all_out() -> None:
    made = choice({"a": 1.0, "b": 1.0})
    made.choose((candidate("a"), candidate("b")))
    assert made.choose((candidate("a"), candidate("b"), candidate("a"))) == ((0, ONE),) * 3
    assert made.verdicts == ()


def test_nobody_is_no_error() -> None:
    assert Choice(RUN).choose(()) == ()


def test_a_new_round_knows_nothing_of_the_one_before() -> None:
    made = choice({"a": 1.0, "b": 1.0}, {("a", "b"): 0.9})
    made.forget()
    with pytest.raises(KeyError):  # a bug of ours: all payloads of candidates were looked at in this round
        made.choose((candidate("a"),))
    made.note(blob("a"), 1.0, {})
    made.note(blob("b"), 1.0, {blob("a"): 0.0})
    assert made.choose((candidate("a"), candidate("b"))) == ((ONE, ONE), (ONE, ONE))
