"""The arithmetic of the node's self-state: running means, calibration error, agreement. Plain functions.

Rules: core, pure. Every result lies between the values that it is made of, whatever the rounding, so that bounds hold
for as long as the node runs.
Source: Welford, "Note on a method for calculating corrected sums of squares and products" (1962); Finch, "Incremental
calculation of weighted mean and variance" (2009), section 9; Guo and others, "On Calibration of Modern Neural Networks"
(2017), section 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from node.errors import BadFigure

BIN_TOKENS_MAX: Final = 1 << 40  # sums of all bins stay exact
BINS: Final = 10  # of confidence; Guo and others take 15, of which few are filled by the tokens of one look


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """Tokens whose confidence lies in one stretch: how many, the sum of their confidences, how many were right."""

    tokens: int = 0
    confidence_sum: float = 0.0
    correct: int = 0

    def __post_init__(self) -> None:
        """Checked when made. Raises BadFigure: a bug of whoever counted."""
        sound = 0 <= self.correct <= self.tokens and 0.0 <= self.confidence_sum <= self.tokens
        if not sound or self.tokens > BIN_TOKENS_MAX:
            raise BadFigure(
                f"a bin of {self.tokens} tokens with confidences of {self.confidence_sum} in all and {self.correct} "
                f"right came; both must lie between 0 and its tokens, of which there may be {BIN_TOKENS_MAX}"
            )


def weight_of(new: int, before: int, window: int) -> float:
    """The weight of `new` samples in a running mean that has seen `before`: a plain mean until about `window` samples,
    from then on an exponential one: max(new / (before + new), 1 - (1 - 1/window)^new). window: 2 or more."""
    faded = -math.expm1(new * math.log1p(-1.0 / window))
    return max(new / (before + new), faded)


def mixed(mean: float, value: float, weight: float) -> float:
    """The running mean with `value` taken in: mean + weight * (value - mean)."""
    new = mean + weight * (value - mean)
    return min(max(new, min(mean, value)), max(mean, value))  # rounding may step over an end


def spread(mean: float, variance: float, value: float, weight: float) -> float:
    """The running variance with `value` taken in; mean: before it. (1 - w) * (variance + w * (value - mean)^2), which
    with w = 1/n is Welford's population variance, exactly (Finch, equations 140 to 143)."""
    off = value - mean
    return (1.0 - weight) * (variance + weight * off * off)


def binned(judged: Iterable[tuple[float, bool]]) -> tuple[Bin, ...]:
    """BINS bins of (confidence 0..1, was right); bin m, from 1, has ((m - 1)/BINS, m/BINS], 0 is in the first.

    Raises BadFigure for a confidence that is none."""
    tokens, sums, correct = [0] * BINS, [0.0] * BINS, [0] * BINS
    for confidence, is_right in judged:
        if not 0.0 <= confidence <= 1.0:
            raise BadFigure(f"a confidence of {confidence} came, a probability of 0 to 1 was wanted")
        place = max(0, math.ceil(confidence * BINS) - 1)
        tokens[place] += 1
        sums[place] += confidence
        correct[place] += is_right
    return tuple(Bin(tokens=n, confidence_sum=s, correct=c) for n, s, c in zip(tokens, sums, correct, strict=True))


def gaps_of(bins: Sequence[Bin]) -> tuple[float, ...]:
    """Of each bin: the sum of its confidences less how many were right; over 0: too sure."""
    return tuple(each.confidence_sum - each.correct for each in bins)


def calibration_error(gaps: Sequence[float], tokens: float) -> float | None:
    """Expected calibration error, 0..1: sum over bins of (n_bin / n) * |accuracy - mean confidence|, which is the
    sum of |gap| over n. None of no tokens."""
    return min(1.0, math.fsum(abs(gap) for gap in gaps) / tokens) if tokens > 0 else None


def cosine(one: Sequence[float], other: Sequence[float]) -> float | None:
    """sum(a*b) / (|a| * |b|), -1..1; None where a vector is all zero. Raises BadFigure for lengths that differ, or a
    number that is not finite."""
    if len(one) != len(other):
        raise BadFigure(f"vectors of {len(one)} and {len(other)} numbers came, equal lengths were wanted")
    if not all(map(math.isfinite, (*one, *other))):
        raise BadFigure("a vector with a number that is not finite came")
    most_one, most_other = max(map(abs, one), default=0.0), max(map(abs, other), default=0.0)
    if most_one == 0.0 or most_other == 0.0:
        return None
    a, b = [x / most_one for x in one], [x / most_other for x in other]  # squares of what is left do not overflow
    found = math.fsum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
    return min(1.0, max(-1.0, found))


def equal_share(one: Sequence[int], other: Sequence[int]) -> float | None:
    """The share of places with the same token, 0..1, of the longer's places; None of two empty answers."""
    places = max(len(one), len(other))
    return sum(a == b for a, b in zip(one, other, strict=False)) / places if places else None
