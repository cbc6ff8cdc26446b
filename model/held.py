"""A sparse delta's entries, unpacked once and kept while a round lasts.

Rules: core. A payload is read four times in a round (checked, measured, compared, merged), and unpacking is most of
what each costs. Kept are 8 bytes an entry, six times the payload; a delta of more than ENTRIES_MAX is left packed.
Legend: N elements, M entries of the delta, K of a slice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from model.delta import Floats

ENTRIES_MAX: Final = 1 << 21  # 16 MiB a delta and 1 GiB a round of 64: 134M elements at 64 of each 4,096


@dataclass(frozen=True, slots=True)
class Held:
    """places: uint32_M, increasing; values: fp32_M, none of them 0."""

    n: int
    places: npt.NDArray[np.uint32]
    values: Floats
    sparse = True

    def entries(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(places_K counted from start, values_K) of [start, stop), new each time."""
        ends = np.array((start, stop), np.uint32)  # of any other type, all places would be copied
        first, last = np.searchsorted(self.places, ends)
        places_K = self.places[first:last].astype(np.int64)
        places_K -= start
        return torch.from_numpy(places_K), torch.from_numpy(self.values[first:last].copy())

    def dense(self, start: int, stop: int) -> torch.Tensor:
        """The values of [start, stop), zero where nothing was sent."""
        places_K, values_K = self.entries(start, stop)
        dense_S = torch.zeros(stop - start)
        dense_S[places_K] = values_K
        return dense_S

    def sent(self, start: int, stop: int) -> torch.Tensor:
        """Which of [start, stop) were sent."""
        return self.dense(start, stop) != 0


def hold(n: int, parts: Iterable[tuple[int, npt.NDArray[np.int64], Floats]]) -> Held:
    """From slices in order: where each starts, its places counted from there, and its values."""
    rows = [((at_K + start).astype(np.uint32), value_K) for start, at_K, value_K in parts]
    return Held(n, np.concatenate([places for places, _ in rows]), np.concatenate([values for _, values in rows]))
