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
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from model.delta import CHUNK, Delta, HasEntries

Places = npt.NDArray[np.int64]

SLICE: Final = 16 * CHUNK  # 64 dense deltas take 32 MiB as fp64
SLICE_SPARSE: Final = 256 * CHUNK  # one scratch of 8 MiB, and few enough slices that calls cost nothing
_BITS: Final = 20  # 2 * 20 bits of a product and 12 of CHUNK are 52, fp64 holds 53
_BIAS: Final = 1023  # of fp64's exponent


def norm(delta: Delta) -> float:
    """The Euclidean norm; nan when any element is not finite."""
    squares: list[float] = []
    for start, stop in slices(delta.n, SLICE_SPARSE if delta.sparse else SLICE):
        squares += _squares(delta, start, stop).tolist()
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
    return {
        (earlier, later): share
        for later, delta in enumerate(deltas)
        for earlier, share in enumerate(overlaps_with(delta, deltas[:later]))
    }


def overlaps_with(delta: Delta, others: Sequence[Delta]) -> list[float]:
    """The same of one delta with each of some others."""
    counts, shared, own = [0] * len(others), [0] * len(others), 0
    for start, stop in slices(delta.n, SLICE_SPARSE):
        sent_S = np.zeros(stop - start, np.bool_)
        places_K = entries(delta, start, stop)[0].numpy()
        sent_S[places_K] = True
        own += len(places_K)
        for at, other in enumerate(others):
            theirs_K = entries(other, start, stop)[0].numpy()
            counts[at] += len(theirs_K)
            shared[at] += int(np.count_nonzero(sent_S.take(theirs_K)))
    return [count / max(1, min(own, their)) for count, their in zip(shared, counts, strict=True)]


def entries(delta: Delta, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Places (int64_K, from start) and values (fp32_K) of what a sparse delta sent; the long way if it has no short."""
    if isinstance(delta, HasEntries):
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
    """A slice of a sparse delta in integers. places: int64_K, ascending; integers: fp64_K; starts: the first entry of
    each chunk, int64_C; unit: what the integer one means in each chunk, fp64_C."""

    places: torch.Tensor
    integers: torch.Tensor
    starts: Places
    unit: torch.Tensor

    def sums(self, values_K: torch.Tensor) -> torch.Tensor:
        """The sum over each chunk, fp64_C, of a value for each entry."""
        return torch.from_numpy(_by_chunk(np.add, values_K.numpy(), self.starts))


def _squares(delta: Delta, start: int, stop: int) -> torch.Tensor:
    """The sum of squares of each chunk, fp64_C; nan where an element is not finite."""
    if delta.sparse:
        sent = _sent(delta, start, stop)
        return sent.sums(sent.integers * sent.integers) * sent.unit * sent.unit
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
    scratch_S = np.zeros(stop - start)
    for later, part in enumerate(parts):
        places_K, integers_K = part.places.numpy(), part.integers.numpy()
        sums_CRR[:, later, later] = part.sums(part.integers * part.integers)
        scratch_S[places_K] = integers_K
        for earlier, other in enumerate(parts[:later]):
            theirs_K = torch.from_numpy(scratch_S.take(other.places.numpy()))
            sums_C = other.sums(theirs_K.mul_(other.integers))
            sums_CRR[:, later, earlier] = sums_C
            sums_CRR[:, earlier, later] = sums_C
        scratch_S[places_K] = 0.0
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
    starts_C = np.searchsorted(places_K.numpy(), np.arange(0, stop - start, CHUNK, dtype=np.int64))
    largest_C = torch.from_numpy(_by_chunk(np.maximum, values_K.abs().numpy(), starts_C))
    scale_C, unit_C = _scales(largest_C)
    counts_C = np.diff(starts_C, append=places_K.numel())
    scale_K = torch.from_numpy(np.repeat(scale_C.numpy(), counts_C))
    return _Sent(places_K, values_K.double().mul_(scale_K).round_(), starts_C, unit_C)


def _by_chunk(reduce: np.ufunc, values_K: npt.NDArray[Any], starts_C: Places) -> npt.NDArray[Any]:
    """What `reduce` makes of each chunk's entries; 0 for a chunk without any. Exact, so that the order is free."""
    made_C = np.zeros(len(starts_C), values_K.dtype)
    filled_C = np.diff(starts_C, append=len(values_K)) > 0
    if len(values_K):
        made_C[filled_C] = reduce.reduceat(values_K, starts_C[filled_C])
    return made_C


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
