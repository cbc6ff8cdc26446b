"""The dense codecs `int8` and `int4`: every element as a small integer times its block's scale.

Rules: core. A block's scale is bf16, its largest magnitude over the largest integer, which that element therefore
takes. One encoding for one value: a block of zeros has a scale of zero; in any other some integer is the largest one,
plus or minus, and the one below it (-128, -8) does not exist. int4: the even element stands in a byte's lower half; the
upper half left over of an odd vector is zero.
Legend: N elements, S of a slice, B blocks, b elements of a block.

Sections: idx empty; val the integers; scale one bf16 a block.
Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861): absmax a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from model import bfloat16
from model.delta import CHUNK, MAGNITUDE_MAX, Floats, Sections, slices
from model.errors import BadUpdate

Integers = npt.NDArray[np.int8]
Number = TypeVar("Number", np.float32, np.int8)
_SCALE_MIN: Final = bfloat16.pattern_below(bfloat16.NORMAL_MIN)


@dataclass(frozen=True, slots=True)
class BlockCodec:
    """bits: 8 or 4. block: elements that share a scale; it divides CHUNK."""

    name: str
    bits: int
    block: int
    k = CHUNK

    @property
    def largest(self) -> int:
        """The largest integer."""
        return (1 << (self.bits - 1)) - 1

    @property
    def scale_max(self) -> int:
        """The pattern of the largest scale: its product with the largest integer is no more than MAGNITUDE_MAX.

        That of a block whose magnitudes are no more: for 127 and for 7 the nearest bf16 is the one below.
        """
        return bfloat16.pattern_below(MAGNITUDE_MAX / self.largest)

    def sizes(self, n: int) -> tuple[int, int, int]:
        """Bytes of idx, val and scale."""
        return 0, -(-n * self.bits // 8), -(-n // self.block) * bfloat16.WIRE.itemsize

    def encode(self, vector_N: Floats) -> Sections:
        """Quantise a slice at a time; the nearest integer, ties to even."""
        rows = [self._encode(vector_N[start:stop]) for start, stop in slices(len(vector_N))]
        val, scale = (b"".join(parts) for parts in zip(*rows, strict=True))
        return Sections(b"", val, scale)

    def _encode(self, vector_S: Floats) -> tuple[bytes, bytes]:
        x_Bb = _blocks(vector_S, self.block)
        scale_B = np.abs(x_Bb).max(axis=1) / np.float32(self.largest)
        scale_B[scale_B < bfloat16.NORMAL_MIN] = 0.0
        pattern_B = bfloat16.patterns_of(scale_B)
        divisor_B1 = np.where(pattern_B == 0, np.float32(np.inf), bfloat16.numbers_of(pattern_B))[:, None]
        # bf16 is off by at most 1/256 of the scale, less than half a step of 127: the largest magnitude of a block
        # rounds to `largest`, never beside it
        q_Bb = np.rint(x_Bb / divisor_B1)
        q_S = q_Bb.astype(np.int8).reshape(-1)[: len(vector_S)]
        return (q_S if self.bits == 8 else _halves(q_S)).tobytes(), pattern_B.astype(bfloat16.WIRE).tobytes()

    def decode(self, sections: Sections, n: int) -> BlockDelta:
        """Check every block. Raises BadUpdate."""
        delta = BlockDelta(n, self, sections)
        for start, stop in slices(n):
            self._check(*delta.integers(start, stop))
        if self.bits == 4 and n % 2 and sections.val[-1] >> 4:
            raise BadUpdate("the half byte after the last element is not zero")
        return delta

    def _check(self, q_S: Integers, pattern_B: bfloat16.Patterns) -> None:
        if pattern_B.max() > self.scale_max or ((pattern_B > 0) & (pattern_B < _SCALE_MIN)).any():
            raise BadUpdate(f"a scale is neither zero nor a number from {bfloat16.NORMAL_MIN:g} to its largest")
        q_Bb = _blocks(q_S, self.block)
        peak_B = np.maximum(q_Bb.max(axis=1), -q_Bb.min(axis=1).astype(np.int16))
        if (peak_B != np.where(pattern_B == 0, 0, self.largest)).any():
            raise BadUpdate(f"a block's largest integer is not {self.largest}, or not 0 under a scale of zero")


@dataclass(frozen=True, slots=True)
class BlockDelta:
    """The sections of a blockwise delta, read a slice at a time."""

    n: int
    codec: BlockCodec
    sections: Sections
    sparse = False

    def dense(self, start: int, stop: int) -> torch.Tensor:
        """The values of [start, stop)."""
        q_S, pattern_B = self.integers(start, stop)
        x_Bb = _blocks(q_S, self.codec.block).astype(np.float32)
        x_Bb *= bfloat16.numbers_of(pattern_B)[:, None]
        return torch.from_numpy(x_Bb.reshape(-1)[: stop - start])

    def sent(self, start: int, stop: int) -> torch.Tensor:
        """All of them."""
        return torch.ones(stop - start, dtype=torch.bool)

    def integers(self, start: int, stop: int) -> tuple[Integers, bfloat16.Patterns]:
        """(q_S, pattern_B): the integers of [start, stop) and the scales of their blocks."""
        per_byte = 8 // self.codec.bits
        val = np.frombuffer(self.sections.val, np.uint8)[start // per_byte : -(-stop // per_byte)]
        q_S = val.view(np.int8) if self.codec.bits == 8 else _wholes(val)[: stop - start]
        scale = np.frombuffer(self.sections.scale, bfloat16.WIRE)
        return q_S, scale[start // self.codec.block : -(-stop // self.codec.block)].astype(np.uint16)


INT8: Final = BlockCodec(name="int8", bits=8, block=256)
INT4: Final = BlockCodec(name="int4", bits=4, block=64)


def _blocks(x_S: npt.NDArray[Number], block: int) -> npt.NDArray[Number]:
    """x_Bb: by blocks, the last one filled up with zeros."""
    missing = -len(x_S) % block
    return (np.concatenate([x_S, np.zeros(missing, x_S.dtype)]) if missing else x_S).reshape(-1, block)


def _halves(q_S: Integers) -> npt.NDArray[np.uint8]:
    """Two integers a byte."""
    q = _blocks(q_S, 2).view(np.uint8)
    val: npt.NDArray[np.uint8] = (q[:, 0] & np.uint8(0x0F)) | (q[:, 1] << np.uint8(4))
    return val


def _wholes(val: npt.NDArray[np.uint8]) -> Integers:
    """The two integers of each byte, sign extended."""
    q = np.empty((len(val), 2), np.int8)
    np.right_shift((val << 4).view(np.int8), 4, out=q[:, 0])
    np.right_shift(val.view(np.int8), 4, out=q[:, 1])
    return q.reshape(-1)
