"""What a delta is, whatever codec brought it: the change of one round, read slice by slice.

Rules: core. A delta is start - end of a peer's local training (TRAINING.md 1), as fp32 on the CPU. Every value that a
decoder lets through is zero or a normal number of at most MAGNITUDE_MAX. A slice starts at a multiple of CHUNK, so that
whoever merges R deltas holds R x slice elements and never R x N. A sparse delta sends only what is not zero: what was
sent and what is not zero are the same coordinates, and a peer cannot send zeros to thin out what the others sent.
Legend: N elements of the run's flat vector, S elements of a slice.

Source: TRAINING.md 1 and 2; SparseLoCo (arXiv 2508.15706).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float32]

CHUNK: Final = 4096  # elements; top-k is taken of each chunk (SparseLoCo), and an index in one fits 12 bits
MAGNITUDE_MAX: Final = 2.0**64  # no honest change; weighted sums of thousands stay finite in fp32 (below 2**128)
SLICE: Final = 64 * CHUNK  # elements that a codec works on at a time: 1 MiB as fp32 stays in a core's cache


class Delta(Protocol):
    """One peer's change of the flat vector, held as it came and decoded on demand."""

    @property
    def n(self) -> int:
        """Elements of the whole vector."""

    @property
    def sparse(self) -> bool:
        """Whether absent coordinates mean "not sent"; False: every coordinate was sent."""

    def dense(self, start: int, stop: int) -> torch.Tensor:
        """The values of [start, stop) as a new fp32 CPU tensor_S, zero where nothing was sent.

        start is a multiple of CHUNK; 0 <= start <= stop <= n.
        """

    def sent(self, start: int, stop: int) -> torch.Tensor:
        """Which of [start, stop) were sent, bool_S: for a sparse delta `dense(start, stop) != 0`, else all True."""


@runtime_checkable
class SparseDelta(Delta, Protocol):
    """A sparse delta that gives what was sent without the zeros between: what makes merging cost by what was sent."""

    def entries(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where in [start, stop) something was sent, int64_K counted from start, ascending, each once; and the values
        there, fp32_K on the CPU: what `dense` holds at those places."""


@dataclass(frozen=True, slots=True)
class Sections:
    """The three byte strings that a codec writes; which are empty is the codec's matter.

    idx: which coordinates. val: their quantised values. scale: what the quantised values are multiplied by.
    """

    idx: bytes
    val: bytes
    scale: bytes

    @property
    def size_bytes(self) -> int:
        """Of all three together."""
        return len(self.idx) + len(self.val) + len(self.scale)


class Codec(Protocol):
    """A way to write a vector down. Equal values give equal bytes, on any machine, and there are no other bytes."""

    @property
    def name(self) -> str:
        """Its name on the wire."""

    @property
    def k(self) -> int:
        """How many coordinates of each CHUNK are sent, at most; CHUNK when all are."""

    def sizes(self, n: int) -> tuple[int, int, int]:
        """Bytes of idx, val and scale for a vector of n elements, exactly."""

    def encode(self, vector_N: Floats) -> Sections:
        """Write a vector whose values are at most MAGNITUDE_MAX."""

    def decode(self, sections: Sections, n: int) -> Delta:
        """Check sections of the right sizes to the last bit; they are kept, not copied. Raises BadUpdate."""


def slices(n: int, step: int = SLICE) -> Iterator[tuple[int, int]]:
    """(start, stop) of the slices of n elements, in order."""
    return ((start, min(n, start + step)) for start in range(0, n, step))
