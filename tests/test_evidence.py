"""What a delta is measured by, against numpy in fp64 and against itself in another order."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.codecs import CODECS, decode, encode
from model.delta import CHUNK, Delta, HasEntries, Sections
from model.evidence import SLICE, SLICE_SPARSE, entries, gram, norm, overlaps, overlaps_with, slices
from model.held import ENTRIES_MAX, Held
from model.merge import Vector
from model.sparse import SparseDelta
from tests.made_deltas import Plain, TopK, top_k
from tests.vectors import KINDS, SIZES, vector

N = SLICE + 2 * CHUNK + 77


def made(seed: int, n: int = N) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(n) * 10.0 ** rng.uniform(-6, 0, n)


def dense(values: np.ndarray) -> Vector:
    return Vector(torch.from_numpy(values.astype(np.float32)))


def filled(delta: TopK) -> Vector:
    """The same values as a dense delta."""
    return Vector(delta.dense(0, delta.n))


@pytest.mark.parametrize("scale", [1e-35, 1e-10, 1.0, 1e30])
def test_the_norm_is_the_norm(scale: float) -> None:
    values = (made(1) * scale).astype(np.float32)
    assert norm(dense(values)) == pytest.approx(np.linalg.norm(values.astype(np.float64)), rel=1e-5)


def test_the_norm_of_nothing_is_nothing() -> None:
    assert norm(dense(np.zeros(N))) == 0.0
    assert norm(TopK(N, torch.empty(0, dtype=torch.int64), torch.empty(0))) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, N - 1])
def test_one_number_that_is_not_finite_makes_the_norm_nan(bad: float, at: int) -> None:
    values = made(1)
    values[at] = bad
    assert math.isnan(norm(dense(values)))
    assert math.isnan(norm(TopK(N + 1, torch.tensor([at, at + 1]), torch.tensor([bad, 1.0]))))


@pytest.mark.slow
@settings(deadline=None)
@given(seed=st.integers(0, 1000))
def test_no_order_of_addition_changes_a_bit(seed: int) -> None:
    """A sum that is rounded on its way does not pass: see test_the_order_matters_to_a_plain_sum."""
    rng = np.random.default_rng(seed)
    # the first chunks are as full as can be: every square counts up to the last bit, and there are CHUNK of them
    rows = [np.concatenate([rng.uniform(0.9, 1, CHUNK), made(seed + at, 6 * CHUNK)]) for at in range(2)]
    one, other = (row.astype(np.float32).reshape(7, CHUNK) * rng.uniform(0.1, 90, (7, 1)) for row in rows)
    order, chunks = rng.permutation(CHUNK), rng.permutation(7)
    before, after = (
        [dense(each.ravel()) for each in pair] for pair in ((one, other), (one[:, order], other[:, order]))
    )
    assert norm(before[0]) == norm(after[0])
    assert gram(before) == gram(after)
    assert norm(before[0]) == norm(dense(one[chunks].ravel()))


def test_the_order_matters_to_a_plain_sum() -> None:
    squares = made(1, CHUNK).astype(np.float32).astype(np.float64) ** 2
    orders = [np.random.default_rng(seed).permutation(CHUNK) for seed in range(20)]
    assert len({float(np.cumsum(squares[order])[-1]) for order in orders}) > 1


def test_inner_products_are_those_of_the_vectors() -> None:
    vectors = [made(seed).astype(np.float32) for seed in range(4)]
    wanted = np.array([[one.astype(np.float64) @ other.astype(np.float64) for other in vectors] for one in vectors])
    scale = np.sqrt(np.outer(wanted.diagonal(), wanted.diagonal()))
    found = np.array(gram([dense(each) for each in vectors]))
    assert np.abs(found - wanted).max() < 1e-5 * scale.max()
    assert (found == found.T).all()


def test_sparse_deltas_give_the_bits_of_the_same_values_filled_with_zeros() -> None:
    short = [top_k(made(seed)) for seed in range(3)]
    long: list[Delta] = [Plain(delta) for delta in short]
    whole = [filled(delta) for delta in short]
    assert [norm(delta) for delta in short] == [norm(delta) for delta in long] == [norm(delta) for delta in whole]
    assert gram(short) == gram(long) == gram(whole)
    assert overlaps(short) == overlaps(long)


def test_more_than_one_sparse_slice_is_one_delta() -> None:
    n = SLICE_SPARSE + CHUNK + 5
    places = [torch.tensor([3, CHUNK, SLICE_SPARSE - 1, SLICE_SPARSE, n - 1]), torch.tensor([3, CHUNK, n - 1])]
    one, other = (TopK(n, at, torch.arange(1, 1 + len(at)).float()) for at in places)
    assert norm(one) == pytest.approx(math.sqrt(55))
    assert gram([one, other])[0][1] == pytest.approx(1 + 4 + 15)
    assert gram([one, other]) == gram([filled(one), filled(other)])
    assert overlaps([one, other]) == {(0, 1): 1.0}


@pytest.mark.slow
@settings(deadline=None)
@given(st.lists(st.sets(st.integers(0, 3 * CHUNK - 1), max_size=40), min_size=2, max_size=4))
def test_overlap_is_the_share_of_the_lesser_ones_indices(sets: list[set[int]]) -> None:
    deltas = [
        TopK(3 * CHUNK, torch.tensor(sorted(places), dtype=torch.int64), torch.ones(len(places))) for places in sets
    ]
    found = overlaps(deltas)
    for (one, other), share in found.items():
        assert one < other
        assert share == len(sets[one] & sets[other]) / max(1, min(len(sets[one]), len(sets[other])))
    assert len(found) == len(sets) * (len(sets) - 1) // 2
    for at, delta in enumerate(deltas):
        pairs = [found.get((min(at, other), max(at, other)), 1.0 if sets[at] else 0.0) for other in range(len(sets))]
        assert overlaps_with(delta, deltas) == pairs


@pytest.mark.parametrize("name", ["ef64.2b", "ef256.2b"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_codecs_short_way_is_what_the_protocol_says(name: str, kind: str) -> None:
    for n in (*SIZES, N):
        sections = encode(vector(kind, n), CODECS[name])
        packed = SparseDelta(n, CODECS[name].k, sections)
        held = decode(sections, CODECS[name], n)
        assert isinstance(held, Held)
        for start, stop in ((0, n), *slices(n, CHUNK), (n // CHUNK * CHUNK, n), (0, n // 2)):
            for delta in (packed, held):
                assert isinstance(delta, HasEntries)
                places, values = delta.entries(start, stop)
                assert (places.dtype, values.dtype) == (torch.int64, torch.float32)
                assert torch.equal(places, packed.sent(start, stop).nonzero().squeeze(1))
                assert torch.equal(values, packed.dense(start, stop)[places])
                assert torch.equal(delta.dense(start, stop), packed.dense(start, stop))
                assert torch.equal(delta.sent(start, stop), packed.sent(start, stop))
                assert torch.equal(torch.stack(entries(delta, start, stop)), torch.stack((places, values)))
                values.mul_(-1)  # the caller's to change
                assert torch.equal(delta.dense(start, stop), packed.dense(start, stop))


def test_what_is_too_large_to_hold_stays_packed() -> None:
    codec = CODECS["ef256.2b"]
    n = ENTRIES_MAX // codec.k * CHUNK
    for size, kind in ((n, Held), (n + 1, SparseDelta)):
        chunks = -(-size // CHUNK)
        idx, val, scale = codec.sizes(size)
        delta = decode(Sections(bytes(idx), bytes(val), bytes(scale)), codec, size)  # nothing is sent
        assert isinstance(delta, kind)
        assert chunks * codec.k == ENTRIES_MAX + (codec.k if kind is SparseDelta else 0)
        assert norm(delta) == 0.0


def test_slices_are_whole_chunks() -> None:
    assert list(slices(2 * CHUNK + 1, CHUNK)) == [(0, CHUNK), (CHUNK, 2 * CHUNK), (2 * CHUNK, 2 * CHUNK + 1)]
    for size in (0, CHUNK - 1, CHUNK + 1):
        with pytest.raises(AssertionError):
            slices(10, size)
