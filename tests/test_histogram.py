"""Histograms: what is counted where, and what their percentiles say."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.histogram import FIRST_TOKEN_S, REQUEST_S, STEP_TOKENS, TOKEN_S, Histogram, merged

VALUES = st.lists(st.tuples(st.floats(0.0, 10_000.0), st.integers(1, 50)), max_size=50)


def filled(values: list[tuple[float, int]]) -> Histogram:
    histogram = Histogram(TOKEN_S)
    for value, times in values:
        histogram.observe(value, times)
    return histogram


def test_a_value_counts_where_it_is_at_most_the_bound() -> None:
    histogram = Histogram((1.0, 2.0, 5.0))
    for value in (0.0, 1.0, 1.5, 2.0, 5.0, 5.1):
        histogram.observe(value)
    told = histogram.read()
    assert told.counts == (2, 2, 1, 1)
    assert told.cumulative() == (2, 4, 5, 6)
    assert told.sum == pytest.approx(14.6)


def test_bounds_must_ascend() -> None:
    with pytest.raises(AssertionError, match="ascend"):
        Histogram((1.0, 1.0))


@pytest.mark.parametrize("bounds", [FIRST_TOKEN_S, TOKEN_S, REQUEST_S, STEP_TOKENS])
def test_the_ranges_in_use_ascend(bounds: tuple[float, ...]) -> None:
    assert Histogram(bounds).read().count == 0


@given(VALUES, st.floats(0.0, 1.0))
def test_a_quantile_lies_in_the_range_of_the_value_that_it_stands_for(
    values: list[tuple[float, int]], share: float
) -> None:
    told = filled(values).read().quantile(share)
    each = sorted(value for value, times in values for _ in range(times))
    if not each:
        assert told is None
        return
    assert told is not None
    true = each[max(0, math.ceil(share * len(each) - 1e-9) - 1)]
    above = next((bound for bound in TOKEN_S if true <= bound), math.inf)
    below = max((bound for bound in TOKEN_S if bound < true), default=0.0)
    assert below - 1e-9 <= told <= above + 1e-9


@given(VALUES, VALUES)
def test_what_is_merged_is_what_one_would_have_counted(
    ones: list[tuple[float, int]], others: list[tuple[float, int]]
) -> None:
    both = merged((filled(ones).read(), filled(others).read()), TOKEN_S)
    assert both.counts == filled(ones + others).read().counts
    assert both.sum == pytest.approx(filled(ones + others).read().sum)


def test_weight_is_as_many_observations() -> None:
    assert filled([(0.02, 7)]).read().counts == filled([(0.02, 1)] * 7).read().counts
