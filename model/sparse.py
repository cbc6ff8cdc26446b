"""The sparse codec `ef{k}.2b`: the k largest of every 4096-chunk, each as its sign and one of two magnitudes.

Rules: core. Of equal magnitudes the lowest index wins. What is zero is never sent, so a chunk may send fewer than k.
A chunk has two levels, low <= high, bf16, and each sent value is + or - one of them. One encoding for one value: both
levels are used, or they are equal and every level bit is zero; a chunk that sends nothing has levels of zero; slots
that are not filled are zero. Every chunk takes the same bytes, the last, shorter one too.
Legend: N elements, C chunks, k slots of a chunk, M values sent of C chunks.

Sections a chunk: idx as elias_fano.py says; val k sign bits, then k level bits; scale low, then high.
Source: SparseLoCo (arXiv 2508.15706) sends 2-bit values of the top k of each chunk; the two levels that lose least are
the means of a cut of the sorted magnitudes (Lloyd 1982, Least squares quantization in PCM; Fisher 1958: in one
dimension the best groups are intervals, so that trying each cut finds the best).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from model import bfloat16, elias_fano
from model.delta import CHUNK, MAGNITUDE_MAX, Floats, Sections, slices
from model.elias_fano import Bytes, Chosen
from model.errors import BadUpdate
from model.held import ENTRIES_MAX, Held, hold

Mask = npt.NDArray[np.bool_]
_NORMAL_MIN_BITS: Final = int(np.float32(bfloat16.NORMAL_MIN).view(np.int32))
_LEVEL_MIN: Final = bfloat16.pattern_below(bfloat16.NORMAL_MIN)
_LEVEL_MAX: Final = bfloat16.pattern_below(MAGNITUDE_MAX)


@dataclass(frozen=True, slots=True)
class SparseCodec:
    """Top k of each chunk. k: a power of two, at least 16, so that a byte holds a coordinate's low bits."""

    k: int

    def __post_init__(self) -> None:
        assert 16 <= self.k < CHUNK
        assert self.k & (self.k - 1) == 0

    @property
    def name(self) -> str:
        """Its name on the wire."""
        return f"ef{self.k}.2b"

    def sizes(self, n: int) -> tuple[int, int, int]:
        """Bytes of idx, val and scale."""
        chunks = -(-n // CHUNK)
        return chunks * elias_fano.chunk_bytes(self.k), chunks * self.k // 4, chunks * 2 * bfloat16.WIRE.itemsize

    def encode(self, vector_N: Floats) -> Sections:
        """Choose, quantise and pack, a slice at a time."""
        rows = [self._encode(vector_N[start:stop]) for start, stop in slices(len(vector_N))]
        idx, val, scale = (b"".join(parts) for parts in zip(*rows, strict=True))
        return Sections(idx, val, scale)

    def _encode(self, vector_S: Floats) -> tuple[bytes, bytes, bytes]:
        missing = -len(vector_S) % CHUNK
        if missing:
            vector_S = np.concatenate([vector_S, np.zeros(missing, np.float32)])
        chosen = largest(vector_S.view(np.int32).reshape(-1, CHUNK), self.k)
        chunks, slot_M = len(chosen.counts), chosen.slots(self.k)
        sent_M = vector_S[chosen.at]
        magnitude_Ck = np.zeros((chunks, self.k))
        magnitude_Ck.reshape(-1)[slot_M] = np.abs(sent_M)
        high_Ck, level_C2 = two_levels(magnitude_Ck, chosen.counts)
        negative_Ck = np.zeros((chunks, self.k), np.bool_)
        negative_Ck.reshape(-1)[slot_M] = sent_M < 0
        val = [np.packbits(bit_Ck, axis=1, bitorder="little") for bit_Ck in (negative_Ck, high_Ck)]
        return (
            elias_fano.pack(chosen, self.k).tobytes(),
            np.concatenate(val, axis=1).tobytes(),
            level_C2.astype(bfloat16.WIRE).tobytes(),
        )

    def decode(self, sections: Sections, n: int) -> SparseDelta | Held:
        """Check every chunk, and keep what was unpacked for it unless that is too much. Raises BadUpdate."""
        delta = SparseDelta(n, self.k, sections)
        if -(-n // CHUNK) * self.k <= ENTRIES_MAX:
            return hold(n, ((start, *delta.values(start, stop)) for start, stop in slices(n)))
        for start, stop in slices(n):
            delta.values(start, stop)
        return delta


@dataclass(frozen=True, slots=True)
class SparseDelta:
    """The sections of a sparse delta, read a slice at a time."""

    n: int
    k: int
    sections: Sections
    sparse = True

    def dense(self, start: int, stop: int) -> torch.Tensor:
        """The values of [start, stop), zero where nothing was sent."""
        at_M, value_M = self.entries(start, stop)
        dense_S = torch.zeros(stop - start, dtype=torch.float32)
        dense_S[at_M] = value_M
        return dense_S

    def sent(self, start: int, stop: int) -> torch.Tensor:
        """Which of [start, stop) were sent."""
        return self.dense(start, stop) != 0

    def entries(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(at_M, value_M): what was sent of [start, stop), increasing, counted from start."""
        end = min(self.n, -(-stop // CHUNK) * CHUNK)
        at_M, value_M = self.values(start, end)
        inside = int(np.searchsorted(at_M, stop - start))
        return torch.from_numpy(at_M[:inside]), torch.from_numpy(value_M[:inside])

    def values(self, start: int, stop: int) -> tuple[npt.NDArray[np.int64], Floats]:
        """(at_M, value_M): what was sent of the whole chunks [start, stop), increasing, counted from start.

        Raises BadUpdate on bytes that `SparseCodec.encode` never writes.
        """
        idx, val, level_C2 = self._chunks(start, stop)
        chosen = elias_fano.unpack(idx, self.k, stop - start)
        bit_2Ck = np.unpackbits(val, axis=1, bitorder="little").reshape(-1, 2, self.k).transpose(1, 0, 2)
        negative_Ck, high_Ck = bit_2Ck
        check_levels(level_C2, high_Ck.sum(1, dtype=np.int64), chosen.counts)
        slot_M = chosen.slots(self.k)
        negative_M, high_M = negative_Ck.reshape(-1)[slot_M], high_Ck.reshape(-1)[slot_M]
        if np.count_nonzero(bit_2Ck) != np.count_nonzero(negative_M) + np.count_nonzero(high_M):
            raise BadUpdate("a value bit stands in a slot without a coordinate")
        pattern_M = level_C2.reshape(-1)[2 * chosen.chunks() + high_M] | (negative_M.astype(np.uint16) << np.uint16(15))
        return chosen.at, bfloat16.numbers_of(pattern_M)

    def _chunks(self, start: int, stop: int) -> tuple[Bytes, Bytes, bfloat16.Patterns]:
        """The bytes (C, ...) of idx and val and the patterns_C2 of scale, for the chunks of [start, stop)."""
        first, last = start // CHUNK, -(-stop // CHUNK)
        idx = np.frombuffer(self.sections.idx, np.uint8).reshape(-1, elias_fano.chunk_bytes(self.k))
        val = np.frombuffer(self.sections.val, np.uint8).reshape(-1, self.k // 4)
        scale = np.frombuffer(self.sections.scale, bfloat16.WIRE).reshape(-1, 2)
        return idx[first:last], val[first:last], scale[first:last].astype(np.uint16)


def largest(bits_CK: npt.NDArray[np.int32], k: int) -> Chosen:
    """The k largest magnitudes of each chunk, given as fp32 bit patterns (K = CHUNK); of equals, the lowest indices.

    As integers, the bits of positive floats stand in the order of the floats. Zeros and subnormals are never chosen.
    """
    magnitude_CK = bits_CK & 0x7FFF_FFFF
    at_M = np.flatnonzero(magnitude_CK >= np.maximum(_bound(magnitude_CK, k), _NORMAL_MIN_BITS))
    chunk_M = at_M // CHUNK
    counts_C = np.bincount(chunk_M, minlength=len(bits_CK))
    if (width := int(counts_C.max(initial=0))) <= k:
        return Chosen(at_M, counts_C)
    candidates = Chosen(at_M, counts_C)
    slot_M = candidates.slots(width)
    magnitude_CW = np.zeros((len(bits_CK), width), np.int32)  # of the candidates of each chunk, in order
    magnitude_CW.reshape(-1)[slot_M] = magnitude_CK.reshape(-1)[at_M]
    kth_C1 = np.partition(magnitude_CW, width - k, axis=1)[:, width - k, None]
    over_CW = magnitude_CW > kth_C1
    equal_CW = (magnitude_CW == kth_C1) & (magnitude_CW > 0)
    room_C1 = k - np.count_nonzero(over_CW, axis=1)[:, None]
    chosen_CW: Mask = over_CW | (equal_CW & (np.cumsum(equal_CW, axis=1) <= room_C1))
    return Chosen(at_M[chosen_CW.reshape(-1)[slot_M]], np.count_nonzero(chosen_CW, axis=1))


def _bound(magnitude_CK: npt.NDArray[np.int32], k: int) -> npt.NDArray[np.int32]:
    """bound_C1: at least k of a chunk's magnitudes are no less, and of most chunks few more than k are.

    It is the k-th largest of the maxima of 4 k groups of the chunk, each of which has one such magnitude.
    """
    groups = min(CHUNK, 4 * k)
    maximum_CG = magnitude_CK.reshape(-1, CHUNK // groups, groups).max(axis=1)
    bound_C1: npt.NDArray[np.int32] = np.partition(maximum_CG, groups - k, axis=1)[:, groups - k, None]
    return bound_C1


def two_levels(
    magnitude_Ck: npt.NDArray[np.float64], counts_C: npt.NDArray[np.int64]
) -> tuple[Mask, bfloat16.Patterns]:
    """(high_Ck, level_C2): which magnitudes take the upper level, and both levels as bf16 patterns.

    The first counts_C slots of a chunk are filled, the others zero. The cut of the sorted magnitudes is the one with
    the least squared error: the greatest sum of n * mean**2 over both groups.
    """
    k = magnitude_Ck.shape[1]
    filled_Ck = np.arange(k) < counts_C[:, None]
    sorted_Ck = np.sort(magnitude_Ck, axis=1)  # what is not filled comes first
    below_Ck = np.cumsum(sorted_Ck, axis=1)
    n_low_Ck = np.arange(k)[None, :] - (k - counts_C)[:, None]  # of a cut before this place
    sum_low_Ck = below_Ck - sorted_Ck
    sum_high_Ck = below_Ck[:, -1:] - sum_low_Ck
    gain_Ck = sum_low_Ck**2 / np.maximum(n_low_Ck, 1) + sum_high_Ck**2 / np.arange(k, 0, -1)
    cut_C1 = np.where(n_low_Ck >= 1, gain_Ck, -1.0).argmax(axis=1)[:, None]
    high_Ck = filled_Ck & (magnitude_Ck >= np.take_along_axis(sorted_Ck, cut_C1, axis=1))
    one_C1 = high_Ck.sum(axis=1, keepdims=True) == counts_C[:, None]  # all equal, or alone: one level
    high_Ck &= ~one_C1
    level_C2 = np.stack([_mean(magnitude_Ck, filled_Ck & ~high_Ck), _mean(magnitude_Ck, high_Ck)], axis=1)
    pattern_C2 = bfloat16.patterns_of(level_C2.astype(np.float32))
    pattern_C2[:, 1] = np.where(high_Ck.any(axis=1), pattern_C2[:, 1], pattern_C2[:, 0])
    high_Ck &= pattern_C2[:, :1] < pattern_C2[:, 1:]  # levels that bf16 makes equal are one
    return high_Ck, pattern_C2


def check_levels(level_C2: bfloat16.Patterns, n_high_C: npt.NDArray[np.int64], counts_C: npt.NDArray[np.int64]) -> None:
    """Whether `two_levels` could have written these levels. Raises BadUpdate."""
    low_C, high_C = level_C2.T
    sends_C = counts_C > 0
    if (level_C2[~sends_C] != 0).any():
        raise BadUpdate("a chunk that sends nothing has a level that is not zero")
    if ((low_C < _LEVEL_MIN) & sends_C).any() or (high_C > _LEVEL_MAX).any():
        raise BadUpdate(f"a level is not a number from {bfloat16.NORMAL_MIN:g} to {MAGNITUDE_MAX:g}")
    one_C = low_C == high_C
    used_C = np.where(one_C, n_high_C == 0, (low_C < high_C) & (n_high_C > 0) & (n_high_C < counts_C))
    if not used_C.all():
        raise BadUpdate("of a chunk's two levels one is not used, or the first is the larger")


def _mean(magnitude_Ck: npt.NDArray[np.float64], which_Ck: Mask) -> npt.NDArray[np.float64]:
    """Of each chunk; 0 for none."""
    total_C = np.where(which_Ck, magnitude_Ck, 0.0).sum(axis=1)
    mean_C: npt.NDArray[np.float64] = total_C / np.maximum(np.count_nonzero(which_Ck, axis=1), 1)
    return mean_C
