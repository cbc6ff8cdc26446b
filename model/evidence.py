"""What a delta is measured by: its norm, its inner products with others, the indices it shares. Exact to the bit.

Rules: a sum of floats depends on the order of addition, hence on threads, SIMD width and BLAS, and these numbers steer
branches. So each chunk is first rounded to integers of at most 2^20 (in units of 2^-20 of a power of two over its
largest value): their products, and the sums of a chunk's products, stay under 2^53, where fp64 holds every integer, so
no order and no fused multiply can change them. What chunks give is added in one order. A relative error of about 2^-20
is the price; no element that is added to the model is rounded by this. A sparse delta takes the short way over what it
sent, and gives the same bits.
Legend: R deltas; C chunks of a slice, each of CHUNK elements; K entries of a slice.
Source: exact accumulation as in reproducible BLAS (Demmel and Nguyen, ARITH 2013); copies as in Gauntlet (templar).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

import torch

from model.delta import CHUNK, Delta, SparseDelta

SLICE: Final = 16 * CHUNK  # 64 dense deltas take 32 MiB as fp64
SLICE_SPARSE: Final = 256 * CHUNK  # one scratch of 8 MiB, and few enough slices that calls cost nothing
_BITS: Final = 20  # 2 * 20 bits of a product and 12 of CHUNK are 52, fp64 holds 53
_BIAS: Final = 1023  # of fp64's exponent


def norm(delta: Delta) -> float:
    """The Euclidean norm; nan when any element is not finite."""
    squares: list[float] = []
    for start, stop in slices(delta.n, SLICE_SPARSE if delta.sparse else SLICE):
        squares_C = _squares(delta, start, stop)
        if not bool(torch.isfinite(squares_C).all()):
            return math.nan
        squares += squares_C.tolist()
    return math.sqrt(math.fsum(squares))


def gram(deltas: Sequence[Delta]) -> list[list[float]]:
    """The inner product of each with each, symmetric. All finite, of one length, all sparse or all dense."""
    sparse = deltas[0].sparse
    total_RR = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    for start, stop in slices(deltas[0].n, SLICE_SPARSE if sparse else SLICE):
        products_CRR = (_products_sparse if sparse else _products_dense)(deltas, start, stop)
        for products_RR in products_CRR:  # in the order of chunks, whatever the slice
            total_RR.add_(products_RR)
    return [[float(product) for product in row] for row in total_RR.tolist()]


def overlaps(deltas: Sequence[Delta]) -> dict[tuple[int, int], float]:
    """For each pair (earlier, later place) of sparse deltas: the indices in common, over what the lesser one sent."""
    counts = [0] * len(deltas)
    shared = dict.fromkeys(combinations(range(len(deltas)), 2), 0)
    for start, stop in slices(deltas[0].n, SLICE_SPARSE):
        places = [entries(delta, start, stop)[0] for delta in deltas]
        sent_S = torch.zeros(stop - start, dtype=torch.bool)
        for later, places_K in enumerate(places):
            counts[later] += places_K.numel()
            sent_S[places_K] = True
            for earlier in range(later):
                shared[earlier, later] += int(torch.count_nonzero(sent_S[places[earlier]]))
            sent_S[places_K] = False
    return {pair: count / max(1, min(counts[pair[0]], counts[pair[1]])) for pair, count in shared.items()}


def entries(delta: Delta, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Places (int64_K, from start) and values (fp32_K) of what a sparse delta sent; the long way if it has no short."""
    if isinstance(delta, SparseDelta):
        return delta.entries(start, stop)
    places_K = delta.sent(start, stop).nonzero().squeeze(1)
    return places_K, delta.dense(start, stop)[places_K]


def slices(n: int, size: int) -> Iterator[tuple[int, int]]:
    """[0, n) cut at multiples of `size`, itself a multiple of CHUNK."""
    assert size >= CHUNK, f"a slice of {size} elements, wanted at least {CHUNK}"
    assert size % CHUNK == 0, f"a slice of {size} elements, wanted a multiple of {CHUNK}"
    return ((start, min(start + size, n)) for start in range(0, n, size))


@dataclass(frozen=True, slots=True)
class _Sent:
    """A slice of a sparse delta in integers. places: int64_K; integers: fp64_K; chunks: each entry's chunk, int64_K;
    unit: what the integer one means in each chunk, fp64_C."""

    places: torch.Tensor
    integers: torch.Tensor
    chunks: torch.Tensor
    unit: torch.Tensor


def _squares(delta: Delta, start: int, stop: int) -> torch.Tensor:
    """The sum of squares of each chunk, fp64_C; not finite where an element is not."""
    if delta.sparse:
        sent = _sent(delta, start, stop)
        sums_C = torch.zeros_like(sent.unit).index_add_(0, sent.chunks, sent.integers * sent.integers)
        return sums_C * sent.unit * sent.unit
    integers_CX, unit_C = _dense(delta, start, stop)
    return (integers_CX * integers_CX).sum(1) * unit_C * unit_C


def _products_dense(deltas: Sequence[Delta], start: int, stop: int) -> torch.Tensor:
    """The inner products in each chunk, fp64_CRR."""
    parts = [_dense(delta, start, stop) for delta in deltas]
    integers_CRX = torch.stack([integers_CX for integers_CX, _ in parts], 1)
    unit_CR = torch.stack([unit_C for _, unit_C in parts], 1)
    return torch.bmm(integers_CRX, integers_CRX.mT) * unit_CR[:, :, None] * unit_CR[:, None, :]


def _products_sparse(deltas: Sequence[Delta], start: int, stop: int) -> torch.Tensor:
    """The inner products in each chunk, fp64_CRR: each pair by gathering one where the other sent."""
    parts = [_sent(delta, start, stop) for delta in deltas]
    unit_CR = torch.stack([part.unit for part in parts], 1)
    sums_CRR = torch.zeros(unit_CR.shape[0], len(parts), len(parts), dtype=torch.float64)
    scratch_S = torch.zeros(stop - start, dtype=torch.float64)
    sums_C = torch.empty(unit_CR.shape[0], dtype=torch.float64)
    for later, part in enumerate(parts):
        scratch_S[part.places] = part.integers
        for earlier, other in enumerate(parts[: later + 1]):
            products_K = scratch_S[other.places] * other.integers
            sums_C.zero_().index_add_(0, other.chunks, products_K)
            sums_CRR[:, later, earlier] = sums_C
            sums_CRR[:, earlier, later] = sums_C
        scratch_S[part.places] = 0.0
    return sums_CRR * unit_CR[:, :, None] * unit_CR[:, None, :]


def _dense(delta: Delta, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A slice as integers_CX (fp64; X = CHUNK, the last chunk filled with zeros) and what one means, unit_C."""
    values_S = delta.dense(start, stop)
    if missing := -values_S.numel() % CHUNK:
        values_S = torch.nn.functional.pad(values_S, (0, missing))
    values_CX = values_S.view(-1, CHUNK)
    scale_C, unit_C = _scales(values_CX.abs().amax(1))
    return values_CX.double().mul_(scale_C[:, None]).round_(), unit_C


def _sent(delta: Delta, start: int, stop: int) -> _Sent:
    places_K, values_K = entries(delta, start, stop)
    chunks_K = places_K // CHUNK
    largest_C = torch.zeros(-(-(stop - start) // CHUNK), dtype=torch.float32)
    largest_C.scatter_reduce_(0, chunks_K, values_K.abs(), "amax")
    scale_C, unit_C = _scales(largest_C)
    return _Sent(places_K, values_K.double().mul_(scale_C[chunks_K]).round_(), chunks_K, unit_C)


def _scales(largest_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The powers of two that bring values up to `largest` to integers up to 2^_BITS, and back; nan where it is not
    finite."""
    finite_C = torch.isfinite(largest_C)
    exponent_C = torch.frexp(torch.where(finite_C, largest_C, 0.0).double()).exponent.long()
    unit_C = torch.where(finite_C, _power_of_two(exponent_C - _BITS), math.nan)
    return _power_of_two(_BITS - exponent_C), unit_C


def _power_of_two(exponent_C: torch.Tensor) -> torch.Tensor:
    """2^exponent as fp64, exact: torch.ldexp takes a power, which need not be."""
    return ((exponent_C + _BIAS) << 52).view(torch.float64)
