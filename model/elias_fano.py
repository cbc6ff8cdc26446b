"""Elias-Fano: which coordinates of each chunk are sent, in 64 bytes for 64 of 4096, one encoding for each set.

Rules: core. A chunk has k slots; its coordinates fill slots 0, 1, 2, ... in increasing order. The low bits of all
slots stand first, then a bitmap of 2k bits with a one at (high bits + slot) for each slot that is filled. Every chunk
takes the same bytes; bits are numbered from the least significant. A slot that is not filled has low bits of zero.
Legend: C chunks, M coordinates of all of them, k slots of a chunk.

Source: Elias 1974, Efficient storage and retrieval by content and address of static files; Fano 1971, On the number of
bits required to implement an associative memory. TRAINING.md 2 has the sizes: 12 bits each would need 96 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from model.delta import CHUNK
from model.errors import BadUpdate

Bytes = npt.NDArray[np.uint8]
_WORD: Final = np.dtype("<u8")  # holds eight numbers of at most eight bits
Index = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The coordinates of C chunks. at: at_M, from the start of the first chunk, increasing. counts: of each chunk."""

    at: Index
    counts: Index

    def chunks(self) -> Index:
        """chunk_M: the chunk of each coordinate."""
        return self.at // CHUNK

    def slots(self, k: int) -> Index:
        """slot_M: the slot of each coordinate, counted from the first chunk's slot 0."""
        unused_C = np.arange(len(self.counts)) * k - (np.cumsum(self.counts) - self.counts)
        slot_M: Index = np.arange(len(self.at)) + np.repeat(unused_C, self.counts)
        return slot_M


def low_bits(k: int) -> int:
    """Bits of a coordinate that are stored as they are: log2 of a chunk's elements a slot."""
    return (CHUNK // k).bit_length() - 1


def chunk_bytes(k: int) -> int:
    """Bytes of one chunk's coordinates."""
    return k * (low_bits(k) + 2) // 8


def pack(chosen: Chosen, k: int) -> Bytes:
    """The coordinates of C chunks as bytes (C, chunk_bytes). At most k a chunk."""
    chunks, width = len(chosen.counts), low_bits(k)
    slot_M, within_M = chosen.slots(k), chosen.at % CHUNK
    low = np.zeros(chunks * k, np.uint8)
    low[slot_M] = within_M & ((1 << width) - 1)
    unary = np.zeros(chunks * 2 * k, np.uint8)
    unary[chosen.chunks() * k + slot_M + (within_M >> width)] = 1
    high = np.packbits(unary.reshape(chunks, 2 * k), axis=1, bitorder="little")
    return np.concatenate([_joined(low, width).reshape(chunks, -1), high], axis=1)


def unpack(packed: Bytes, k: int, size: int) -> Chosen:
    """The coordinates of C chunks that hold `size` elements together. Raises BadUpdate unless `pack` writes these
    very bytes for them."""
    chunks, width = len(packed), low_bits(k)
    low = _parted(packed[:, : k * width // 8], width)
    one_M = np.flatnonzero(np.unpackbits(packed[:, k * width // 8 :], bitorder="little"))
    chunk_M = one_M // (2 * k)
    counts_C = np.bincount(chunk_M, minlength=chunks)
    if counts_C.max(initial=0) > k:
        raise BadUpdate(f"{counts_C.max()} coordinates came in one chunk of {CHUNK}, wanted at most {k}")
    slot_M = Chosen(one_M, counts_C).slots(k)
    high_M = one_M - chunk_M * k - slot_M
    low_M = low[slot_M]
    at_M: Index = chunk_M * CHUNK + (high_M << width) + low_M.astype(np.int64)
    if high_M.max(initial=0) >= k:
        raise BadUpdate(f"a coordinate lies outside its chunk of {CHUNK}")
    if (at_M[1:] <= at_M[:-1]).any():
        raise BadUpdate("the coordinates of a chunk do not increase")
    if len(at_M) and at_M[-1] >= size:
        raise BadUpdate(f"the coordinate {at_M[-1] - size} elements after the end of the vector came")
    if np.count_nonzero(low) != np.count_nonzero(low_M):
        raise BadUpdate("a slot without a coordinate is not zero")
    return Chosen(at_M, counts_C)


def _joined(low: Bytes, width: int) -> Bytes:
    """Numbers of `width` bits, eight after eight, as the `width` bytes that hold eight of them, low bits first."""
    eight = low.reshape(-1, 8).astype(np.uint64) << _shifts(width)
    words: Bytes = np.bitwise_or.reduce(eight, axis=1).astype(_WORD).view(np.uint8)
    return words.reshape(-1, 8)[:, :width]


def _parted(packed: Bytes, width: int) -> Bytes:
    """What `_joined` made of them."""
    words = np.zeros((packed.size // width, 8), np.uint8)
    words[:, :width] = packed.reshape(-1, width)
    eight = words.view(_WORD).astype(np.uint64) >> _shifts(width)
    return (eight & np.uint64((1 << width) - 1)).astype(np.uint8).reshape(-1)


def _shifts(width: int) -> npt.NDArray[np.uint64]:
    return np.arange(8, dtype=np.uint64) * np.uint64(width)
