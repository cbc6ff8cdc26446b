"""What one contributor, or all that a rule stands, can do to the aggregate: a bound for each rule, and a search for
what breaks it. Also what must not change anything: the order, the unit of the weights, equal contributions.

Legend: R contributions, X elements, H the largest honest norm, D the largest distance between honest ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.gate import ONE
from model.merge import Contribution, Vector, merge
from model.rules import BY_ORDER, Rule, bad_count
from tests.made_deltas import TopK, through_gate

R = 8
X = 24
ROUND = 1 + 1e-5  # fp32 and the measure's 2^-20
pytestmark = pytest.mark.slow

seeds = st.integers(0, 10_000)
# a bad contribution: honest ones' combination, times a factor, plus noise; or anything at all
factors = st.one_of(st.floats(-1e12, 1e12), st.floats(-3, 3))
wild = st.lists(factors, min_size=X, max_size=X).map(np.array)


def crowd(seed: int, count: int = R) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(X)
    return [common + rng.uniform(0, 3) * rng.standard_normal(X) for _ in range(count)]


def ungated(vectors: Sequence[np.ndarray], weights: Sequence[int] = ()) -> list[Contribution]:
    deltas = [Vector(torch.from_numpy(each.astype(np.float32))) for each in vectors]
    return [
        Contribution(delta=delta, weight_parts=weight)
        for delta, weight in zip(deltas, weights or (ONE,) * len(deltas), strict=True)
    ]


def aggregate(contributions: Sequence[Contribution], rule: Rule) -> np.ndarray:
    made: np.ndarray = merge(contributions, rule).update.double().numpy()
    return made


def diameter(vectors: Sequence[np.ndarray]) -> float:
    return max(float(np.linalg.norm(one - other)) for one in vectors for other in vectors)


def largest(vectors: Sequence[np.ndarray]) -> float:
    return max(float(np.linalg.norm(each)) for each in vectors)


@settings(deadline=None)
@given(seeds, wild, wild)
def test_mean_behind_the_gate_moves_by_at_most_two_rth_of_the_honest_norm(
    seed: int, one: np.ndarray, other: np.ndarray
) -> None:
    """The clip is to the lower median, which R - 1 honest ones bound by H: |change| <= 2 H / R for what one peer sends,
    and as much again for how it moves the median, hence everybody's clip: by at most the span of the honest norms."""
    vectors = crowd(seed, R - 1)
    norms = sorted(float(np.linalg.norm(each)) for each in vectors)
    updates = [aggregate(through_gate([*vectors, bad])[0], Rule.MEAN) for bad in (one, other) if sends(bad, norms)]
    if len(updates) == 2:
        span = norms[(R - 1) // 2] - norms[(R - 1) // 2 - 1]
        assert np.linalg.norm(updates[0] - updates[1]) <= (2 * norms[-1] / R + span) * ROUND


def sends(bad: np.ndarray, norms: Sequence[float]) -> bool:
    """Whether the gate lets it in: neither zero in fp32 nor farther than any clip reaches."""
    return 1e-30 < float(np.linalg.norm(bad)) < norms[(R - 1) // 2 - 1] * ONE / 2


@settings(deadline=None)
@given(seeds, st.lists(st.integers(1, 10**12), min_size=R, max_size=R))
def test_no_claim_weighs_more_than_two_parts_in_two_and_half_of_all(seed: int, tokens: list[int]) -> None:
    """At least R//2 others claim the median or more: a share is at most 2 / (2 + R//2), 1/3 of eight."""
    contributions, verdicts = through_gate(crowd(seed), tokens=tokens)
    assert len(contributions) == R
    plan = merge(contributions, Rule.WEIGHTED).plan
    clips = [verdict.clip_parts / ONE for verdict in verdicts]
    shares = [factor / clip / plan.divisor for factor, clip in zip(plan.factors, clips, strict=True)]
    assert max(shares) <= 2 / (2 + R // 2) * ROUND
    assert sum(shares) == pytest.approx(1.0)


@settings(deadline=None)
@given(seeds, st.lists(wild, min_size=2, max_size=2), st.sampled_from(sorted(BY_ORDER)))
def test_sorted_values_stay_within_the_honest_ones_whatever_the_bad_send(
    seed: int, bad: list[np.ndarray], rule: Rule
) -> None:
    assert bad_count(R, None) == 2
    vectors = crowd(seed, R - 2)
    update = aggregate(ungated([*bad, *vectors]), rule)
    values = np.array(vectors)
    slack = np.abs(values).max(0) * 1e-6
    assert (update >= values.min(0) - slack).all()
    assert (update <= values.max(0) + slack).all()


@settings(deadline=None)
@given(seeds, st.lists(wild, min_size=2, max_size=2))
def test_multi_krum_stays_within_reach_of_every_honest_one(seed: int, bad: list[np.ndarray]) -> None:
    """A bad one that is chosen has a sum of R-b-2 squared distances no larger than an honest one that is not, at most
    (R-b-2) D^2, and R-2b-1 honest ones among those: |change| <= D (1 + sqrt((R-b-2) / (R-2b-1)))."""
    vectors = crowd(seed, R - 2)
    update = aggregate(ungated([*bad, *vectors]), Rule.MULTI_KRUM)
    reach = diameter(vectors) * (1 + math.sqrt((R - 2 - 2) / (R - 4 - 1)))
    assert all(np.linalg.norm(update - each) <= reach * 1.01 for each in vectors)


@settings(deadline=None)
@given(seeds, st.lists(wild, min_size=2, max_size=2))
def test_the_geometric_median_is_bounded_by_the_honest_spread(seed: int, bad: list[np.ndarray]) -> None:
    """Of a share a < 1/2 bad: |g - z| <= 2 (1-a)/(1-2a) max |x - z| for any z (Minsker, arXiv 1308.1334, lemma 2.1)."""
    vectors = crowd(seed, R - 2)
    update = aggregate(ungated([*bad, *vectors]), Rule.GEOMETRIC_MEDIAN)
    centre = np.mean(vectors, 0)
    spread = max(float(np.linalg.norm(each - centre)) for each in vectors)
    assert np.linalg.norm(update - centre) <= 2 * (1 - 2 / R) / (1 - 4 / R) * spread * 1.01


@settings(deadline=None)
@given(seeds, wild)
def test_the_clipped_centre_is_at_most_twice_the_honest_norm(seed: int, bad: np.ndarray) -> None:
    """A step's pull P of the honest, at least (R//2 - 1)/R, contracts towards 0 + H; one bad one adds at most 1/R of a
    radius that the honest bound: |v| <= H (P + 1/R) / (P - 1/R), 2 H of eight."""
    vectors = crowd(seed, R - 1)
    update = aggregate(ungated([bad, *vectors]), Rule.CENTERED_CLIP)
    assert np.linalg.norm(update) <= 2 * largest(vectors) * ROUND


@settings(deadline=None)
@given(seeds, st.sets(st.integers(0, X - 1), min_size=1, max_size=6), st.floats(-1e6, 1e6))
def test_a_lone_sender_moves_a_coordinate_by_at_most_its_value_over_a_quarter_of_all(
    seed: int, captured: set[int], value: float
) -> None:
    rng = np.random.default_rng(seed)
    others = [sorted(rng.choice(X, 6, replace=False).tolist()) for _ in range(R - 1)]
    honest = [TopK(X, torch.tensor(at), torch.from_numpy(rng.standard_normal(6).astype(np.float32))) for at in others]
    places = torch.tensor(sorted(captured))
    both = [
        aggregate(
            [Contribution(delta=d) for d in [*honest, TopK(X, places, torch.full((len(captured),), sign * value))]],
            Rule.MEAN_NONZERO,
        )
        for sign in (1.0, -1.0)
    ]
    rounded = 4 * 2.0**-24 * np.abs(both[0]).max()  # what fp32 leaves of a small value beside the others
    assert (np.abs(both[0] - both[1]) <= 2 * abs(value) / math.ceil(R / 4) * ROUND + rounded).all()


@settings(max_examples=25, deadline=None)
@given(seeds, st.randoms(use_true_random=False))
def test_the_order_of_arrival_changes_nothing(seed: int, rng) -> None:  # type: ignore[no-untyped-def]  # random.Random
    vectors = crowd(seed)
    named = {f"p{at}": each for at, each in enumerate(vectors)}
    shuffled = dict(rng.sample(sorted(named.items()), R))
    for rule in Rule:
        one, other = (merge(ungated([those[peer] for peer in sorted(those)]), rule) for those in (named, shuffled))
        assert one.update.numpy().tobytes() == other.update.numpy().tobytes()
        # another order given is another rounding, and no more than that
        turned = aggregate(ungated(vectors[::-1]), rule)
        assert np.linalg.norm(turned - one.update.numpy()) <= 2e-3 * largest(vectors)


@settings(max_examples=50, deadline=None)
@given(seeds)
def test_equal_contributions_give_themselves(seed: int) -> None:
    vector = crowd(seed, 1)[0]
    for rule in Rule:
        update = aggregate(ungated([vector] * R), rule)
        np.testing.assert_allclose(update, vector.astype(np.float32), rtol=1e-6)


@settings(deadline=None)
@given(seeds, st.lists(st.integers(1, ONE // 64), min_size=R, max_size=R), st.sampled_from([2, 3, 64]))
def test_weights_have_no_unit(seed: int, weights: list[int], times: int) -> None:
    vectors = crowd(seed)
    one, other = (
        aggregate(ungated(vectors, each), Rule.WEIGHTED) for each in (weights, [weight * times for weight in weights])
    )
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(1e-6, 1e6))
def test_rules_do_not_know_the_unit_of_a_delta(seed: int, times: float) -> None:
    vectors = crowd(seed)
    for rule in Rule:
        one = aggregate(ungated(vectors), rule)
        other = aggregate(ungated([each * times for each in vectors]), rule) / times
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=1e-4 * largest(vectors))
