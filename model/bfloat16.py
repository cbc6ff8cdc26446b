"""bf16 numbers as 16-bit patterns: the upper half of an fp32, so that reading one is a shift and needs no arithmetic.

Rules: core. Of positive patterns the larger is the larger number. Subnormal numbers are never written: whether they
count as zero may differ with a machine's settings.
Legend: any shape; both ways keep it.

Source: IEEE 754 binary32; "bfloat16", Intel white paper 338302-001US (2018): round to nearest, ties to even.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

Patterns = npt.NDArray[np.uint16]
Floats = npt.NDArray[np.float32]

WIRE: Final = np.dtype("<u2")  # how a pattern stands in a payload
NORMAL_MIN: Final = 2.0**-126  # the least number of fp32 and bf16 that is not subnormal


def patterns_of(numbers: Floats) -> Patterns:
    """The nearest bf16 of each finite fp32, ties to even."""
    bits = numbers.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def numbers_of(patterns: Patterns) -> Floats:
    """The fp32 that each pattern stands for, exactly."""
    return (patterns.astype(np.uint32) << np.uint32(16)).view(np.float32)


def pattern_below(number: float) -> int:
    """The pattern of the greatest bf16 that is not over a positive number."""
    return int(np.asarray(number, np.float32).view(np.uint32)) >> 16
