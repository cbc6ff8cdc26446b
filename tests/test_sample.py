"""Choosing tokens: pure, the right distribution, the right candidates."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import ComputeFailed
from model.requests import SamplingParameters
from model.sample import TEMPERATURE_MIN, TOP_P_PREFIX, choose, gumbel, keep, penalize

NONE: Counter[int] = Counter()


def logits(size: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def test_the_noise_is_the_same_on_every_machine() -> None:
    """These numbers may never change: peers of different versions go on with each other's answers."""
    got = gumbel(7, 3, np.array([0, 1, 4095, 150_000]))
    assert got.tolist() == pytest.approx(NOISE, abs=1e-9)


NOISE = [1.6329574207903614, 1.2280662599423589, -0.45093208472419244, 1.89678138185568]


@given(
    seed=st.integers(0, (1 << 63) - 1), position=st.integers(0, 1 << 40), size=st.integers(1, 400),
    temperature=st.floats(0.0, 3.0), top_k=st.integers(0, 500), top_p=st.floats(0.01, 1.0), min_p=st.floats(0.0, 1.0),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
@pytest.mark.slow
def test_a_token_is_a_pure_function(
    seed: int, position: int, size: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    row = logits(size, seed % 1000)
    params = SamplingParameters(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    torch.manual_seed(1)
    first = choose(row, params, position, NONE)
    torch.manual_seed(2)
    np.random.seed(2)
    assert choose(row.clone(), params, position, NONE) == first
    assert torch.equal(row, logits(size, seed % 1000)), "the logits are left as they are"
    assert 0 <= first < size
    if temperature < TEMPERATURE_MIN or top_k == 1:
        assert first == int(row.argmax())


def test_a_token_does_not_depend_on_candidates_that_lost() -> None:
    """The noise belongs to a token, not to its place among the kept ones."""
    row = logits(300)
    for position in range(200):
        params = SamplingParameters(temperature=0.8, seed=1)
        free = choose(row, params, position, NONE)
        kept, _ = keep(row / 0.8, SamplingParameters(top_p=0.9))
        if free in kept:
            assert choose(row, SamplingParameters(temperature=0.8, seed=1, top_p=0.9), position, NONE) == free


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_distribution_is_softmax(temperature: float) -> None:
    row = logits(12, 5, 1.5)
    draws = 8_000
    params = SamplingParameters(temperature=temperature, seed=11)
    counts = np.bincount([choose(row, params, position, NONE) for position in range(draws)], minlength=12)
    expected = torch.softmax(row.double() / temperature, 0).numpy() * draws
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 31.3, "the 0.999 quantile for 11 degrees of freedom"


def test_neighbouring_seeds_and_positions_are_unrelated() -> None:
    row = torch.zeros(1000)
    by_position = [choose(row, SamplingParameters(seed=1), position, NONE) for position in range(300)]
    by_seed = [choose(row, SamplingParameters(seed=seed), 1, NONE) for seed in range(300)]
    assert len(set(by_position)) > 230
    assert len(set(by_seed)) > 230


@pytest.mark.parametrize("size", [50, 3 * TOP_P_PREFIX])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 0.9, 0.0), (7, 1.0, 0.0), (20, 0.5, 0.0), (0, 1.0, 0.1), (40, 0.99, 0.02), (0, 0.9999, 0.0)],
)
def test_candidates_are_those_of_transformers(size: int, top_k: int, top_p: float, min_p: float) -> None:
    for seed in range(5):
        row = logits(size, seed, 1.0 + seed)
        scores = row[None]
        if top_k:
            scores = transformers.TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1.0:
            scores = transformers.TopPLogitsWarper(top_p)(None, scores)
        if min_p:
            scores = transformers.MinPLogitsWarper(min_p)(None, scores)
        expected = set(torch.nonzero(scores[0] > -math.inf).flatten().tolist())
        ids, kept = keep(row, SamplingParameters(top_k=top_k, top_p=top_p, min_p=min_p))
        assert set(ids.tolist()) == expected
        assert torch.equal(kept, row[torch.from_numpy(ids)])


def test_penalties() -> None:
    row = torch.tensor([2.0, -2.0, 1.0, 0.5])
    generated = Counter({0: 3, 1: 1})
    assert penalize(row, SamplingParameters(), generated, {2}) is row
    got = penalize(row, SamplingParameters(frequency_penalty=0.5, presence_penalty=0.25), generated, {2})
    assert got.tolist() == [2.0 - 1.75, -2.0 - 0.75, 1.0, 0.5]
    got = penalize(row, SamplingParameters(repetition_penalty=2.0), generated, {2})
    expected = transformers.RepetitionPenaltyLogitsProcessor(2.0)(torch.tensor([[0, 0, 0, 1, 2]]), row[None].clone())
    assert got.tolist() == expected[0].tolist()
    assert row.tolist() == [2.0, -2.0, 1.0, 0.5]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_numbers_that_are_not_finite_are_an_error(temperature: float, top_p: float) -> None:
    row = torch.full((10,), float("nan"))
    with pytest.raises(ComputeFailed, match="not finite"):
        choose(row, SamplingParameters(temperature=temperature, top_p=top_p), 0, NONE)


def test_tokens_that_are_ruled_out_are_never_chosen() -> None:
    row = torch.full((10,), -math.inf)
    row[4] = 0.0
    for position in range(20):
        assert choose(row, SamplingParameters(temperature=2.0, min_p=0.0), position, NONE) == 4
