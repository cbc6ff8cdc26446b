"""What a delta is, whatever codec brought it: the change of one round, read slice by slice.

Rules: core. A delta is start - end of a peer's local training (TRAINING.md 1), as fp32 on the CPU. Every value that a
decoder lets through is finite and at most MAGNITUDE_MAX. A slice starts at a multiple of CHUNK, so that whoever merges
R deltas holds R x slice elements and never R x N. A sparse delta sends only what is not zero: what was sent and what
is not zero are the same coordinates.
Legend: N elements of the run's flat vector, S elements of a slice.

Source: TRAINING.md 1 and 2; SparseLoCo (arXiv 2508.15706).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

import torch

CHUNK: Final = 4096  # elements; top-k is taken of each chunk (SparseLoCo), and an index in one fits 12 bits
MAGNITUDE_MAX: Final = 2.0**64  # no honest change; weighted sums of thousands stay finite in fp32 (below 2**128)


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
