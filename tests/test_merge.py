"""Deltas -> one update: every rule against plain numpy, short ways against long ones, refusals, the outer step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.codecs import CODECS, decode, encode
from model.delta import CHUNK, Delta
from model.errors import BadModel, CannotMerge
from model.gate import ONE, WEIGHT_CAP
from model.merge import (
    SLICE,
    SLICE_STEP,
    SLICE_SUM,
    Contribution,
    OuterStep,
    Vector,
    merge,
    merge_and_step,
    merge_named,
    network,
)
from model.rules import BY_DISTANCE, BY_ORDER, Rule
from tests.made_deltas import Plain, TopK, honest, top_k

N = SLICE + CHUNK + 77
ON_SPARSE = [rule for rule in Rule if rule not in BY_ORDER]


def dense(values: np.ndarray) -> Vector:
    return Vector(torch.from_numpy(values.astype(np.float32)))


def listed(deltas: Sequence[Delta], *, weights: Sequence[int] = (), clips: Sequence[int] = ()) -> list[Contribution]:
    count = len(deltas)
    return [
        Contribution(delta=delta, weight_parts=weight, clip_parts=clip)
        for delta, weight, clip in zip(deltas, weights or (ONE,) * count, clips or (ONE,) * count, strict=True)
    ]


def crowd(count: int = 7, n: int = N) -> list[np.ndarray]:
    return [each.astype(np.float32) for each in honest(count, n, seed=3)[1]]


def update_of(deltas: Sequence[Delta], rule: Rule, **options: int) -> np.ndarray:
    made: np.ndarray = merge(listed(deltas), rule, **options).update.numpy()  # type: ignore[arg-type]  # bad_max
    return made


def near(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=1e-6 * np.abs(wanted).max())


WEIGHTS = (ONE, 2 * ONE, ONE // 2, 0, 1, ONE, ONE, ONE)
CLIPS = (ONE, ONE // 2, ONE, 0, ONE, ONE // 7, ONE, ONE)


def test_mean_and_weighted_are_those_of_the_clipped_values_with_a_weight() -> None:
    vectors = crowd(8)
    contributions = listed([dense(each) for each in vectors], weights=WEIGHTS, clips=CLIPS)
    clipped = np.array([each.astype(np.float64) * clip / ONE for each, clip in zip(vectors, CLIPS, strict=True)])
    near(merge(contributions, Rule.MEAN).update.numpy(), clipped[[0, 1, 2, 4, 5, 6, 7]].mean(0))
    near(merge(contributions, Rule.WEIGHTED).update.numpy(), np.array(WEIGHTS) @ clipped / sum(WEIGHTS))
    trimmed = np.sort(clipped[[0, 1, 2, 4, 5, 6, 7]], 0)
    near(merge(contributions, Rule.TRIMMED_MEAN).update.numpy(), trimmed[2:-2].mean(0))
    near(merge(contributions, Rule.MEDIAN).update.numpy(), trimmed[3])


@pytest.mark.parametrize("count", [3, 4, 5, 8, 16, 33])
def test_median_and_trimmed_mean_are_those_of_numpy(count: int) -> None:
    vectors = crowd(count, CHUNK + 3)
    deltas = [dense(each) for each in vectors]
    near(update_of(deltas, Rule.MEDIAN), np.median(np.array(vectors, np.float64), 0))
    near(update_of(deltas, Rule.TRIMMED_MEAN, bad_max=1), np.sort(vectors, 0).astype(np.float64)[1:-1].mean(0))


@pytest.mark.slow
@settings(deadline=None)
@given(st.integers(1, 24), st.data())
def test_the_network_brings_the_wanted_places_right(count: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, count - 1))
    last = data.draw(st.integers(first + 1, count))
    values = data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    wanted = sorted(values)[first:last]
    for low, high in network(count, first, last):
        assert low < high
        values[low], values[high] = sorted((values[low], values[high]))
    assert values[first:last] == wanted


def test_the_mean_of_senders_is_over_them_and_at_least_a_quarter_of_all() -> None:
    places = [[0, 5, 9], [5, 9], [9], [9], [9, 12], [9], [9], [9]]
    deltas = [TopK(20, torch.tensor(at), torch.full((len(at),), 6.0)) for at in places]
    wanted = np.zeros(20)
    wanted[[0, 12]] = 6 / 2  # a lone sender of 8
    wanted[[5, 9]] = 6.0
    assert update_of(deltas, Rule.MEAN_NONZERO).tolist() == wanted.tolist()
    assert update_of(deltas, Rule.MEAN)[[0, 5, 9, 12]].tolist() == [6 / 8, 12 / 8, 6.0, 6 / 8]


@pytest.mark.parametrize("rule", ON_SPARSE)
def test_the_short_way_over_what_was_sent_gives_the_bits_of_the_long_one(rule: Rule) -> None:
    short = [top_k(each) for each in crowd()]
    assert bits(short, rule) == bits([Plain(delta) for delta in short], rule)
    if rule not in (Rule.MEAN_NONZERO, Rule.MULTI_KRUM, Rule.ADAPTIVE):  # these count senders
        assert bits(short, rule) == bits([Vector(delta.dense(0, N)) for delta in short], rule)


def bits(deltas: Sequence[Delta], rule: Rule) -> bytes:
    clips = [ONE - 1_000 * at for at in range(len(deltas))]
    return merge(listed(deltas, clips=clips), rule).update.numpy().tobytes()


def test_the_mean_of_senders_is_by_its_definition_to_the_bit() -> None:
    deltas = [top_k(each) for each in crowd()]
    total, senders = torch.zeros(N), torch.zeros(N)
    for delta in deltas:
        total = total + delta.dense(0, N) * torch.tensor((ONE - 5) / ONE)
        senders = senders + delta.sent(0, N)
    wanted = total / senders.clamp(min=2.0)
    found = merge(listed(deltas, clips=[ONE - 5] * 7), Rule.MEAN_NONZERO).update
    assert found.numpy().tobytes() == wanted.numpy().tobytes()


def test_on_dense_payloads_the_mean_of_senders_is_the_mean_to_the_bit() -> None:
    deltas = [dense(each) for each in crowd()]
    assert bits(deltas, Rule.MEAN_NONZERO) == bits(deltas, Rule.MEAN)


@pytest.mark.parametrize("name", list(CODECS))
def test_what_codecs_bring_is_merged(name: str) -> None:
    codec = CODECS[name]
    deltas = [decode(encode(torch.from_numpy(each), codec), codec, N) for each in crowd()]
    for rule in ON_SPARSE if deltas[0].sparse else Rule:
        update = merge(listed(deltas), rule).update
        assert float(update @ torch.from_numpy(sum(crowd()))) > 0


def test_more_than_one_slice_of_sums_is_one_update() -> None:
    n = SLICE_SUM + CHUNK + 3
    ends = torch.tensor([0, SLICE_SUM - 1, SLICE_SUM, n - 1])
    sparse = [TopK(n, ends, torch.tensor([1.0, 2.0, 3.0, 4.0]) * times) for times in (1.0, 3.0)]
    for deltas in (sparse, [Vector(delta.dense(0, n)) for delta in sparse]):
        update = merge(listed(deltas), Rule.MEAN_NONZERO).update
        assert update[ends].tolist() == [2.0, 4.0, 6.0, 8.0]
        assert int(torch.count_nonzero(update)) == 4


class Watched(Vector):
    """Notes the largest slice that was asked for."""

    largest: list[int] = []  # noqa: RUF012  # one list for all, cleared by the test

    def dense(self, start: int, stop: int) -> torch.Tensor:
        assert start % CHUNK == 0
        self.largest.append(stop - start)
        return super().dense(start, stop)


@pytest.mark.parametrize("rule", list(Rule))
def test_nobody_asks_for_more_than_a_slice(rule: Rule) -> None:
    Watched.largest.clear()
    rows = [Watched(torch.arange(SLICE_SUM + 5, dtype=torch.float32) + at) for at in range(5)]
    merge(listed(rows), rule)
    assert max(Watched.largest) <= (SLICE if rule in BY_ORDER else SLICE_SUM)


def test_the_update_goes_where_the_caller_says_over_what_was_there() -> None:
    for deltas in ([dense(each) for each in crowd()], [top_k(each) for each in crowd()]):
        out = torch.full((N,), math.nan)
        merged = merge(listed(deltas), Rule.MEAN_NONZERO, out_N=out)
        assert merged.update is out
        assert out.numpy().tobytes() == update_of(deltas, Rule.MEAN_NONZERO).tobytes()


@pytest.mark.parametrize("rule", list(Rule))
def test_deltas_are_left_as_they_are(rule: Rule) -> None:
    vectors = crowd(5)
    deltas = [dense(each) for each in vectors]
    merge(listed(deltas, clips=[ONE // 2] * 5), rule)
    assert all((delta.values.numpy() == each).all() for delta, each in zip(deltas, vectors, strict=True))


@pytest.mark.parametrize("rule", list(Rule))
def test_the_plan_says_by_which_rule_and_why(rule: Rule) -> None:
    plan = merge(listed([dense(each) for each in crowd()]), rule).plan
    assert plan.rule is (Rule.WEIGHTED if rule is Rule.ADAPTIVE else rule)
    assert plan.why.startswith(plan.rule)


@pytest.mark.parametrize("rule", list(Rule))
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_never_returned(rule: Rule, bad: float) -> None:
    vectors = crowd(5)
    for vector in vectors[:4]:
        vector[-1] = bad
    with pytest.raises(CannotMerge, match=r"not finite.*the gate"):
        merge(listed([dense(each) for each in vectors]), rule)


def test_a_sum_that_overflows_is_never_returned() -> None:
    with pytest.raises(CannotMerge, match="not finite"):
        merge(listed([dense(np.full(9, 3e38))] * 2), Rule.MEAN)


@pytest.mark.parametrize("rule", sorted(BY_DISTANCE))
@pytest.mark.parametrize("at", range(5))
def test_a_number_that_has_no_distance_is_never_left_to_chance(rule: Rule, at: int) -> None:
    vectors = [np.ones(9, np.float32) for _ in range(5)]
    vectors[at][0] = math.nan
    with pytest.raises(CannotMerge, match="a contribution is not finite"):
        merge(listed([dense(each) for each in vectors]), rule)


def test_sparse_what_is_not_finite_is_never_returned() -> None:
    deltas = [TopK(9, torch.tensor([1]), torch.tensor([value])) for value in (1.0, math.nan, 1.0, 1.0, 1.0)]
    for rule in ON_SPARSE:
        with pytest.raises(CannotMerge, match=r"not finite.*the gate"):
            merge(listed(deltas), rule)


def test_contributions_that_do_not_go_together_are_refused() -> None:
    one, other = dense(np.ones(9)), dense(np.ones(8))
    sparse = TopK(9, torch.tensor([1]), torch.tensor([1.0]))
    with pytest.raises(CannotMerge, match=r"deltas of \[8, 9\] elements came, wanted one length"):
        merge(listed([one, other]), Rule.MEAN)
    pairs: list[list[Delta]] = [[one, sparse], [sparse, one]]
    for pair in pairs:
        with pytest.raises(CannotMerge, match="sparse and dense deltas came together"):
            merge(listed(pair), Rule.MEAN)
    with pytest.raises(CannotMerge, match="no contribution with a weight came"):
        merge([], Rule.MEAN)
    with pytest.raises(CannotMerge, match="no contribution with a weight came"):
        merge(listed([one], weights=[0]), Rule.MEAN)
    with pytest.raises(CannotMerge, match="median means nothing on top-k payloads"):
        merge(listed([sparse] * 3), Rule.MEDIAN)
    with pytest.raises(CannotMerge, match="2 contributions came, median that stands 1"):
        merge(listed([one, one, one], weights=[ONE, 0, ONE]), Rule.MEDIAN)


@pytest.mark.parametrize("weight", [-1, WEIGHT_CAP * ONE + 1])
def test_a_weight_that_no_gate_gives_is_refused(weight: int) -> None:
    with pytest.raises(CannotMerge, match=f"a weight of {weight} parts came"):
        merge(listed([dense(np.ones(9))], weights=[weight]), Rule.MEAN)


@pytest.mark.parametrize("clip", [-1, 0, ONE + 1])
def test_a_clip_factor_that_no_gate_gives_is_refused(clip: int) -> None:
    with pytest.raises(CannotMerge, match=f"a clip factor of {clip} parts came"):
        merge(listed([dense(np.ones(9))], clips=[clip]), Rule.MEAN)


def test_named_arrays_are_merged_by_name() -> None:
    rounds = [{"b": torch.full((2, 3), float(at)), "a": torch.full((5,), -float(at))} for at in (1, 2, 6)]
    merged = merge_named(rounds, Rule.MEDIAN)
    assert merged["b"].tolist() == [[2.0] * 3] * 2
    assert merged["a"].tolist() == [-2.0] * 5
    with pytest.raises(CannotMerge, match="no contribution came"):
        merge_named([], Rule.MEAN)
    with pytest.raises(BadModel, match=r"the run trains b of shape \[2, 3\]"):
        merge_named([rounds[0], {"b": torch.zeros(3), "a": torch.zeros(5)}], Rule.MEAN)


def test_the_outer_step_subtracts_the_update_times_the_rate() -> None:
    theta, update = torch.arange(6.0), torch.ones(6)
    OuterStep(0.5).step_(theta, update)
    assert theta.tolist() == [-0.5, 0.5, 1.5, 2.5, 3.5, 4.5]


def test_nesterov_is_that_of_the_textbook_and_goes_on_after_a_restart() -> None:
    n = SLICE_SUM + 7
    theta, outer = torch.zeros(n), OuterStep(0.7, 0.9)
    wanted, velocity = np.zeros(n), np.zeros(n)
    for at in range(4):
        update = torch.linspace(-1.0 - at, 2.0, n)
        if at == 2:
            assert outer.velocity is not None
            outer = OuterStep(0.7, 0.9, outer.velocity.clone())
        outer.step_(theta, update)
        velocity = 0.9 * velocity + update.numpy()
        wanted -= 0.7 * (update.numpy() + 0.9 * velocity)
    np.testing.assert_allclose(theta.numpy(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("rule", Rule)
@pytest.mark.parametrize("is_sparse", [False, True])
def test_merge_and_step_in_one_pass_gives_the_bits_of_both(is_sparse: bool, rule: Rule, momentum: float) -> None:
    if is_sparse and rule not in ON_SPARSE:
        return
    n = SLICE_STEP + CHUNK + 77
    theta_N = torch.from_numpy(honest(1, n, seed=5)[0].astype(np.float32))
    twice, once = OuterStep(0.7, momentum), OuterStep(0.7, momentum)
    stepped_N, before_N = theta_N.clone(), theta_N
    for turn in range(3):
        vectors = [each.astype(np.float32) for each in honest(7, n, seed=turn)[1]]
        contributions = listed([top_k(each) if is_sparse else dense(each) for each in vectors])
        merged = merge(contributions, rule)
        twice.step_(stepped_N, merged.update)
        kept_N = before_N.clone()
        made = merge_and_step(contributions, rule, once, before_N)
        assert torch.equal(made.theta, stepped_N)
        assert torch.equal(before_N, kept_N), "the weights of before are changed"
        assert made.plan == merged.plan
        assert made.moved == pytest.approx(float((made.theta - before_N).double().norm()), rel=1e-3)
        before_N = made.theta
    if momentum:
        assert torch.equal(once.velocity, twice.velocity)


def test_an_update_that_is_not_finite_leaves_weights_and_momentum_alone() -> None:
    n = SLICE_STEP + 5
    outer, theta_N = OuterStep(1.0, 0.5), torch.zeros(n)
    theta_N = merge_and_step(listed([Vector(torch.ones(n))]), Rule.MEAN, outer, theta_N).theta
    assert outer.velocity is not None
    before_N, velocity_N = theta_N.clone(), outer.velocity.clone()
    bad_N = torch.ones(n)
    bad_N[-1] = math.inf  # in the last slice: those before it were stepped already
    with pytest.raises(CannotMerge, match="not finite"):
        merge_and_step(listed([Vector(bad_N)]), Rule.MEAN, outer, theta_N)
    assert torch.equal(theta_N, before_N)
    assert torch.equal(outer.velocity, velocity_N)


@pytest.mark.parametrize(("rate", "momentum"), [(0.0, 0.0), (math.nan, 0.0), (math.inf, 0.0), (1.0, 1.0), (1.0, -0.1)])
def test_an_outer_step_that_is_none_is_a_bug(rate: float, momentum: float) -> None:
    with pytest.raises(AssertionError):
        OuterStep(rate, momentum)
