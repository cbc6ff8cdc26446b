"""Vectors for tests of codecs: made from a seed by integer arithmetic alone, so that every machine makes the same."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

from model.delta import CHUNK

KINDS: Final = ("heavy", "ties", "rare", "zero", "wide", "equal")
# around each border: of a chunk, of its k, of a block, of a byte
SIZES: Final = (1, 2, 3, 15, 63, 64, 65, 257, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 65, 3 * CHUNK + 7)


def vector(kind: str, n: int, seed: int = 0) -> torch.Tensor:
    """heavy: most are small. ties: a few magnitudes, many times. rare: most are zero. wide: exponents of all sizes."""
    raw = np.random.PCG64(seed).random_raw(n)
    whole = (raw >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - np.float32(1.0)  # [-1, 1), exact
    match kind:
        case "heavy":
            made = whole * whole * whole * np.float32(1e-3)
        case "ties":
            made = np.rint(whole * np.float32(3.0)) * np.float32(0.25)
        case "rare":
            made = np.where(raw % np.uint64(1000) == 0, whole, np.float32(0.0))
        case "wide":
            made = np.ldexp(whole, (raw % np.uint64(200)).astype(np.int32) - 140)
        case "equal":
            made = np.where(whole < 0, np.float32(-0.7), np.float32(0.7))
        case _:
            made = np.zeros(n, np.float32)
    return torch.from_numpy(made.astype(np.float32))
