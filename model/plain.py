"""The dense codecs `fp32` and `bf16`: every element as it is, or as its nearest bf16.

Rules: core. An element is zero or a normal number of at most MAGNITUDE_MAX. Zero is written without a sign, so that
there is one encoding for one value; what is subnormal is written as zero.
Legend: N elements, S of a slice.

Sections: idx and scale empty; val little-endian.
Source: IEEE 754 binary32; bfloat16.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from model import bfloat16
from model.delta import CHUNK, MAGNITUDE_MAX, Floats, Sections, slices
from model.errors import BadUpdate

_FP32: Final = np.dtype("<f4")
_BITS_MIN: Final = int(np.float32(bfloat16.NORMAL_MIN).view(np.int32))
_BITS_MAX: Final = int(np.float32(MAGNITUDE_MAX).view(np.int32))


@dataclass(frozen=True, slots=True)
class PlainCodec:
    """wire: how an element stands in val, fp32 or the pattern of a bf16."""

    name: str
    wire: np.dtype[np.float32] | np.dtype[np.uint16]
    k = CHUNK

    def sizes(self, n: int) -> tuple[int, int, int]:
        """Bytes of idx, val and scale."""
        return 0, n * self.wire.itemsize, 0

    def encode(self, vector_N: Floats) -> Sections:
        """Round, a slice at a time."""
        wire_N = np.empty(len(vector_N), self.wire)
        for start, stop in slices(len(vector_N)):
            wire_N[start:stop] = self._rounded(vector_N[start:stop])
        return Sections(b"", wire_N.tobytes(), b"")

    def _rounded(self, vector_S: Floats) -> Floats | bfloat16.Patterns:
        x_S = np.where(np.abs(vector_S) < bfloat16.NORMAL_MIN, np.float32(0.0), vector_S)
        return x_S if self.wire.kind == "f" else bfloat16.patterns_of(x_S)

    def decode(self, sections: Sections, n: int) -> PlainDelta:
        """Check every element. Raises BadUpdate."""
        delta = PlainDelta(n, self.wire, sections)
        for start, stop in slices(n):
            bits_S = delta.patterns(start, stop)
            magnitude_S = bits_S & 0x7FFF_FFFF  # positive floats stand in the order of their bits; NaN is the largest
            if magnitude_S.max() > _BITS_MAX:
                raise BadUpdate(f"an element is not a number of at most {MAGNITUDE_MAX:g}")
            if bits_S[magnitude_S < _BITS_MIN].any():  # what is neither 0 nor normal
                raise BadUpdate("an element is a negative zero or a subnormal number, wanted zero")
        return delta


@dataclass(frozen=True, slots=True)
class PlainDelta:
    """The elements of a plain delta, read a slice at a time."""

    n: int
    wire: np.dtype[np.float32] | np.dtype[np.uint16]
    sections: Sections
    sparse = False

    def dense(self, start: int, stop: int) -> torch.Tensor:
        """The values of [start, stop)."""
        return torch.from_numpy(self.floats(start, stop))

    def sent(self, start: int, stop: int) -> torch.Tensor:
        """All of them."""
        return torch.ones(stop - start, dtype=torch.bool)

    def patterns(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """The bits of the values of [start, stop), as fp32."""
        if self.wire.kind == "f":
            return np.frombuffer(self.sections.val, "<i4")[start:stop]
        return self.floats(start, stop).view(np.int32)

    def floats(self, start: int, stop: int) -> Floats:
        """The values of [start, stop), copied out of the section."""
        part: npt.NDArray[np.generic] = np.frombuffer(self.sections.val, self.wire)[start:stop]
        if self.wire.kind == "f":
            return part.astype(np.float32)
        return bfloat16.numbers_of(part.astype(np.uint16))


FP32: Final = PlainCodec("fp32", _FP32)
BF16: Final = PlainCodec("bf16", bfloat16.WIRE)
