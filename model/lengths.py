"""Which numbers of tokens go through a model in one pass, where the device compiles code for each number.

Rules: core. On a CPU, oneDNN compiles bf16 and fp16 products anew for each number of rows and weight, and lets little
of that memory go: half a MB for each, gigabytes for who asks with texts of every length. So there the numbers come from
LENGTHS, two in each octave. fp32 goes through MKL, which compiles nothing.
Source: measured (docs/SECURITY.md); oneDNN developer guide, "Primitive Cache".
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import Final

LENGTHS: Final = (1, *sorted(head << shift for head in (2, 3) for shift in range(20)))


def compiles(device: str, dtype: str) -> bool:
    """Whether a device type compiles for each number of tokens of this number type."""
    return device == "cpu" and dtype != "float32"


def at_most(tokens: int) -> int:
    """The largest length that is no more than `tokens`, at least 1."""
    return LENGTHS[bisect_right(LENGTHS, tokens) - 1]


def share(texts: int) -> int:
    """How many of so many texts to take at once: a power of two, so that texts times tokens is a length again."""
    return 1 << (texts.bit_length() - 1)


def at_least(tokens: int) -> int:
    """The smallest length that holds `tokens`, at most 1.5 million."""
    return LENGTHS[bisect_left(LENGTHS, tokens)]
