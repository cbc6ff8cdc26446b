"""Figures over time as a line of text: eight heights of a block, one column a snapshot or more.

Rules: pure. A column is the mean of what it stands for; nothing measured is a blank, and not zero. Where the terminal
has no such signs, digits 0 to 7 stand in.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

BLOCKS = "▁▂▃▄▅▆▇█"
DIGITS = "01234567"
COLUMNS_MAX = 80


def plot(values: Sequence[float | None], *, columns: int = COLUMNS_MAX, signs: str = BLOCKS) -> str:
    """One sign a column, the least at the bottom, the most on top; all alike: the middle."""
    means = [_mean(each) for each in columns_of(values, columns)]
    known = [each for each in means if each is not None]
    if not known:
        return ""
    least, most = min(known), max(known)

    def sign(value: float) -> str:
        if most <= least:
            return signs[len(signs) // 2]
        return signs[min(len(signs) - 1, int((value - least) / (most - least) * len(signs)))]

    return "".join(" " if each is None else sign(each) for each in means)


def columns_of(values: Sequence[float | None], columns: int) -> list[Sequence[float | None]]:
    """As many parts as there are values, or `columns` of about one size."""
    count = min(len(values), columns)
    ends = [round(n * len(values) / count) for n in range(count + 1)] if count else []
    return [values[begin:end] for begin, end in pairwise(ends)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [each for each in values if each is not None]
    return fmean(known) if known else None
