"""model/padding.py: every text once, within the bound, and at the least cost of all ways to cut."""

from __future__ import annotations

from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st

from model.padding import PASS_TOKENS, batches

LENGTHS = st.lists(st.integers(1, 300), max_size=40)


def cost(lengths: list[int], cut: list[list[int]]) -> int:
    return sum(PASS_TOKENS + len(batch) * max(lengths[at] for at in batch) for batch in cut)


@given(LENGTHS, st.integers(1, 600))
def test_every_text_is_in_one_batch_within_the_bound(lengths: list[int], tokens_max: int) -> None:
    cut = batches(lengths, tokens_max)
    assert sorted(at for batch in cut for at in batch) == list(range(len(lengths)))
    for batch in cut:
        assert len(batch) == 1 or len(batch) * max(lengths[at] for at in batch) <= tokens_max
    in_order = [lengths[at] for batch in cut for at in batch]
    assert in_order == sorted(in_order)


@settings(deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=12), st.integers(1, 600))
def test_no_other_cut_is_cheaper(lengths: list[int], tokens_max: int) -> None:
    ordered = sorted(lengths)

    @cache
    def best(begin: int) -> int:
        if begin == len(ordered):
            return 0
        ends = range(begin + 1, len(ordered) + 1)
        fits = [end for end in ends if end == begin + 1 or (end - begin) * ordered[end - 1] <= tokens_max]
        return min(PASS_TOKENS + (end - begin) * ordered[end - 1] + best(end) for end in fits)

    assert cost(lengths, batches(lengths, tokens_max)) == best(0)


def test_one_long_text_among_short_ones_has_a_pass_of_its_own() -> None:
    assert batches([5, 200, 5, 6, 5], 2_048) == [[0, 2, 4, 3], [1]]
    assert batches([5, 6], 2_048) == [[0, 1]]
    assert batches([], 2_048) == []
