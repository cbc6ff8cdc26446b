"""Deltas made for tests: sparse ones with and without the short way, and a round of peers some of whom are bad.

Rules: everything from numpy's generator and a seed; numpy's stream of a seed is fixed, torch's differs between SIMD
paths.
Legend: N elements, R peers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from model.delta import CHUNK
from model.evidence import norm, overlaps
from model.gate import Entrant, Run, Verdict, judge
from model.merge import Contribution, Vector

TOP = 64  # of each chunk
SIGMA = 1.026  # noise over signal, so that the mean of 15 honest peers is off by .265, as in TRAINING.md 4


class TopK:
    """A sparse delta by its places and values, with the short way."""

    sparse = True

    def __init__(self, n: int, places: torch.Tensor, values: torch.Tensor) -> None:
        self.n = n
        self.places = places
        self.values = values

    def entries(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = torch.searchsorted(self.places, torch.tensor([start, stop])).tolist()
        return self.places[low:high] - start, self.values[low:high].clone()

    def dense(self, start: int, stop: int) -> torch.Tensor:
        places, values = self.entries(start, stop)
        return torch.zeros(stop - start).index_copy_(0, places, values)

    def sent(self, start: int, stop: int) -> torch.Tensor:
        return self.dense(start, stop) != 0


class Plain:
    """Another delta without its short way: what the Delta protocol asks for, and no more."""

    def __init__(self, delta: TopK) -> None:
        self._delta = delta
        self.n = delta.n
        self.sparse = delta.sparse

    def dense(self, start: int, stop: int) -> torch.Tensor:
        return self._delta.dense(start, stop)

    def sent(self, start: int, stop: int) -> torch.Tensor:
        return self._delta.sent(start, stop)


def top_k(vector: np.ndarray, top: int = TOP) -> TopK:
    """The `top` largest of each chunk, their values kept."""
    places = [
        start + np.sort(np.argsort(-np.abs(vector[start : start + CHUNK]), kind="stable")[:top])
        for start in range(0, vector.size, CHUNK)
    ]
    at = np.concatenate(places)
    at = at[vector[at] != 0]
    return TopK(vector.size, torch.from_numpy(at), torch.from_numpy(vector[at].astype(np.float32)))


def honest(peers: int, n: int, seed: int, sigma: float = SIGMA) -> tuple[np.ndarray, list[np.ndarray]]:
    """The signal_N, of norm 1, and each peer's delta_N: signal plus its own noise of norm about sigma."""
    rng = np.random.default_rng(seed)
    signal = rng.standard_normal(n)
    signal /= np.linalg.norm(signal)
    noise = [rng.standard_normal(n) * (sigma / np.sqrt(n)) for _ in range(peers)]
    return signal, [signal + each for each in noise]


Attack = Callable[[Sequence[np.ndarray], int, np.random.Generator], list[np.ndarray]]


def flipped(times: float) -> Attack:
    """Sign flip: what each would honestly have sent, times -`times`."""
    return lambda would, bad, rng: [-times * each for each in would[:bad]]


def scaled(times: float) -> Attack:
    """An honest direction, `times` too long."""
    return lambda would, bad, rng: [times * each for each in would[:bad]]


def little(z: float = 1.0) -> Attack:
    """ALIE (Baruch et al., arXiv 1902.06156): all bad ones send the mean less z standard deviations."""
    return lambda would, bad, rng: [np.mean(would, 0) - z * np.std(would, 0)] * bad


def inner_product(times: float = 1.0) -> Attack:
    """Xie et al. (arXiv 1903.03936): all bad ones send the mean, turned round."""
    return lambda would, bad, rng: [-times * np.mean(would, 0)] * bad


def noise(times: float = 1.0) -> Attack:
    """Noise of the honest norm, times `times`."""

    def attack(would: Sequence[np.ndarray], bad: int, rng: np.random.Generator) -> list[np.ndarray]:
        made = [rng.standard_normal(would[0].size) for _ in range(bad)]
        return [times * each * np.linalg.norm(would[0]) / np.linalg.norm(each) for each in made]

    return attack


def filled(value: float) -> Attack:
    """One value everywhere: nan, inf, 1e30, 0."""
    return lambda would, bad, rng: [np.full(would[0].size, value)] * bad


def through_gate(
    vectors: Sequence[np.ndarray],
    *,
    sparse: bool = False,
    tokens: Sequence[int] | None = None,
    scores: Sequence[tuple[int, ...]] | None = None,
) -> tuple[list[Contribution], tuple[Verdict, ...]]:
    """Measure, judge, and give what the manifest would list, in the order of peers p00, p01, ..."""
    with np.errstate(over="ignore"):
        deltas = [top_k(each) if sparse else Vector(torch.from_numpy(each.astype(np.float32))) for each in vectors]
    peers = [f"p{at:02}" for at in range(len(deltas))]
    entrants = [
        Entrant(
            peer=peer,
            elements=delta.n,
            sparse=sparse,
            norm=norm(delta),
            tokens=tokens[at] if tokens else 1_000,
            arrived=at,
            scores_parts=scores[at] if scores else (),
        )
        for at, (peer, delta) in enumerate(zip(peers, deltas, strict=True))
    ]
    finite = [at for at, entrant in enumerate(entrants) if np.isfinite(entrant.norm)] if sparse else []
    shares = overlaps([deltas[at] for at in finite]) if finite else {}
    pairs = {(peers[finite[one]], peers[finite[other]]): share for (one, other), share in shares.items()}
    verdicts = judge(entrants, Run(elements=deltas[0].n, sparse=sparse), pairs)
    listed = [
        Contribution(delta=delta, weight_parts=verdict.weight_parts, clip_parts=verdict.clip_parts)
        for delta, verdict in zip(deltas, verdicts, strict=True)
        if verdict.accepted
    ]
    return listed, verdicts
