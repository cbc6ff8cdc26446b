"""How a round's contributions become one update: by which rule, and with what factor for each.

Rules: core, no torch. A rule is settled in a Plan of exact numbers before any element is touched: what each
contribution is multiplied by, what the sum is divided by, or which of the sorted values count. Rules that need
distances take them from one Gram matrix (model/evidence.py), exact to the bit, and every iterate is a combination of
the contributions, so that iterations never touch the elements. Floats are added by math.fsum only: it rounds once,
while sum() compensates from Python 3.12 on and does not before. What means nothing is refused in a sentence.
`mean` takes the whole sum over R, an absent coordinate being 0 (the SparseLoCo paper's rule on sparse payloads).
`mean_nonzero` takes it over the peers that sent the coordinate, at least ceil(R/4), so that a lone sender is not heard
at full strength ("coordinate capture"); on dense payloads everybody sends everything and it is `mean`, to the bit.
`multi_krum` chooses, then averages whom it chose: dense by `mean`, sparse by `mean_nonzero`.
Weights count in `weighted` alone: no robust rule may be steered by a claim.
Source: TRAINING.md 1 and 4; multi-Krum: Blanchard et al. (arXiv 1703.02757); trimmed mean and median: Yin et al.
(arXiv 1803.01498); geometric median: RFA, Pillutla et al. (arXiv 1912.13445); centred clipping: Karimireddy et al.
(arXiv 2012.10333).
Legend: R contributions, in the order of the manifest; G_RR their inner products, after the clip.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from model.errors import CannotMerge
from model.gate import CONTRIBUTORS_MAX, ONE, lower_median

WEISZFELD_STEPS: Final = 16  # the error of a step shrinks by the share of far points: 16 leave under 1e-4 of a norm
CLIPPING_STEPS: Final = 8  # Karimireddy et al. see no gain after 3 from a good start; ours starts from 0
LOUD: Final = 2  # times the median norm; honest peers of one run lie closer
CAPTURE_SHARE: Final = 4  # mean_nonzero divides by at least ceil(R / CAPTURE_SHARE): TRAINING.md 4

Gram = Sequence[Sequence[float]]


class Rule(StrEnum):
    """The rules on offer, by the names of the run's parameters."""

    MEAN = "mean"
    WEIGHTED = "weighted"
    TRIMMED_MEAN = "trimmed_mean"
    MEDIAN = "median"
    MULTI_KRUM = "multi_krum"
    GEOMETRIC_MEDIAN = "geometric_median"
    CENTERED_CLIP = "centered_clip"
    MEAN_NONZERO = "mean_nonzero"
    ADAPTIVE = "adaptive"


BY_ORDER: Final = frozenset({Rule.TRIMMED_MEAN, Rule.MEDIAN})
BY_DISTANCE: Final = frozenset({Rule.MULTI_KRUM, Rule.GEOMETRIC_MEDIAN, Rule.CENTERED_CLIP, Rule.ADAPTIVE})
BELIEVING: Final = frozenset({Rule.MEAN, Rule.WEIGHTED, Rule.MEAN_NONZERO})  # tolerate nobody bad by themselves


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What a rule decides from.

    gram: G_RR of the deltas before the clip, if the rule is one of BY_DISTANCE. weights_parts, clips_parts: of each
    contribution, parts of ONE, over 0. bad_max: how many bad ones to stand; None: fewer than a third, at least one.
    """

    sparse: bool
    weights_parts: tuple[int, ...]
    clips_parts: tuple[int, ...]
    gram: Gram | None = None
    bad_max: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One round's arithmetic. rule: the one that was chosen. why: a sentence.

    factors: what each contribution is multiplied by, an fp32 number; 0 leaves it out. kept: which of the R sorted
    values of a coordinate are summed, from and up to; None: all. divisor: of the sum; with senders_min over 0 it is
    instead the number of contributions that sent the coordinate, and at least senders_min.
    """

    rule: Rule
    why: str
    factors: tuple[float, ...]
    divisor: float = 1.0
    kept: tuple[int, int] | None = None
    senders_min: int = 0


def make_plan(rule: Rule, given: Round) -> Plan:
    """The arithmetic of one round by `rule`. Raises CannotMerge: too few or too many contributions for it, or a rule
    that means nothing on these payloads."""
    check(rule, len(given.weights_parts), given.sparse, given.bad_max)
    clips = [clip / ONE for clip in given.clips_parts]
    if rule is Rule.ADAPTIVE:
        chosen, why = adapt(given)
        return replace(make_plan(chosen, given), why=why)
    count = len(clips)
    bad = bad_count(count, given.bad_max)
    why = f"{rule} of {count}, as the run has it"
    match rule:
        case Rule.MEAN:
            return Plan(rule=rule, why=why, factors=_fp32(clips), divisor=float(count))
        case Rule.MEAN_NONZERO:
            return _mean_of_senders(rule, why, clips, given.sparse)
        case Rule.WEIGHTED:
            weights = [weight / ONE for weight in given.weights_parts]
            factors = _fp32([weight * clip for weight, clip in zip(weights, clips, strict=True)])
            return Plan(rule=rule, why=why, factors=factors, divisor=sum(given.weights_parts) / ONE)
        case Rule.TRIMMED_MEAN | Rule.MEDIAN:
            trimmed = bad if rule is Rule.TRIMMED_MEAN else (count - 1) // 2
            kept = (trimmed, count - trimmed)
            return Plan(rule=rule, why=why, factors=_fp32(clips), divisor=float(kept[1] - kept[0]), kept=kept)
    gram_RR = clipped(given)
    match rule:
        case Rule.MULTI_KRUM:
            picked = multi_krum(gram_RR, bad)
            factors_left = [clip if at in picked else 0.0 for at, clip in enumerate(clips)]
            return _mean_of_senders(rule, f"{why}: {len(picked)} are nearest to each other", factors_left, given.sparse)
        case Rule.GEOMETRIC_MEDIAN:
            shares = geometric_median(gram_RR)
        case Rule.CENTERED_CLIP:
            shares = centered_clip(gram_RR)
        case _:
            raise AssertionError(f"{rule} has no plan")
    return Plan(rule=rule, why=why, factors=_fp32([share * clip for share, clip in zip(shares, clips, strict=True)]))


def check(rule: Rule, count: int, sparse: bool, bad_max: int | None = None) -> None:
    """Whether `count` contributions of this kind can be merged by `rule` at all. Raises CannotMerge."""
    if count == 0:
        raise CannotMerge("no contribution with a weight came, wanted at least 1: keep the parameters as they are")
    if count > CONTRIBUTORS_MAX:
        raise CannotMerge(f"{count} contributions came, wanted at most {CONTRIBUTORS_MAX}: draw the round's by lot")
    if sparse and rule in BY_ORDER:
        raise CannotMerge(
            f"{rule} means nothing on top-k payloads: most peers send nothing for most coordinates, so the middle "
            "value is 0 and nothing is learned; use mean_nonzero or multi_krum, or a dense codec"
        )
    if rule in BELIEVING or rule is Rule.ADAPTIVE:
        return
    if bad_max is not None and bad_max < 1:
        raise CannotMerge(f"{rule} that stands {bad_max} bad contributions stands none: use mean or weighted")
    if count < (wanted := contributors_min(rule, count, bad_max)):
        raise CannotMerge(
            f"{count} contributions came, {rule} that stands {bad_count(count, bad_max)} bad ones wants at least "
            f"{wanted}: wait for more peers, or use mean or weighted"
        )


def contributors_min(rule: Rule, count: int, bad_max: int | None) -> int:
    """How many a robust rule wants when `count` came: more good than bad, for multi-Krum 3 more (Blanchard et al.,
    proposition 4.2)."""
    return 2 * bad_count(count, bad_max) + (3 if rule is Rule.MULTI_KRUM else 1)


def bad_count(count: int, bad_max: int | None) -> int:
    """How many of `count` contributions a robust rule stands: fewer than a third, as the agreement does, at least 1."""
    return max(1, (count - 1) // 3) if bad_max is None else bad_max


def needs_gram(rule: Rule, count: int, sparse: bool, bad_max: int | None) -> bool:
    """Whether the plan depends on the inner products of the contributions."""
    if rule is not Rule.ADAPTIVE:
        return rule in BY_DISTANCE
    return count >= max(3, contributors_min(_wary_of_few(sparse), count, bad_max))


def _wary_of_few(sparse: bool) -> Rule:
    """The robust rule that wants the fewest contributions."""
    return Rule.MULTI_KRUM if sparse else Rule.MEDIAN


def clipped(given: Round) -> list[list[float]]:
    """Inner products of the deltas after the clip. The caller has put in those from before it."""
    assert given.gram is not None, "a rule by distance needs the inner products"
    clips = [clip / ONE for clip in given.clips_parts]
    return [
        [product * left * right for product, right in zip(row, clips, strict=True)]
        for row, left in zip(given.gram, clips, strict=True)
    ]


def adapt(given: Round) -> tuple[Rule, str]:
    """The rule that the round's own evidence asks for, and why. The evidence is what every member has: how many came,
    whose norm was far over the median before the clip, whose delta points against the sum of the others'.

    Without evidence the mean loses least (relative error of 15 peers' aggregate: mean .265, multi-Krum .313; under
    ALIE, which leaves no such trace, .50 and .63; with 4 of 15 flipped 1.07 and .31: TRAINING.md 4).
    """
    count = len(given.clips_parts)
    calm = Rule.MEAN_NONZERO if given.sparse else Rule.WEIGHTED
    if count < 3:
        return calm, f"{calm}: of {count} there is no majority to go by"
    if not needs_gram(Rule.ADAPTIVE, count, given.sparse, given.bad_max):
        wary = _wary_of_few(given.sparse)
        wanted = contributors_min(wary, count, given.bad_max)
        return calm, f"{calm}: bad ones cannot be told among {count}, and {wary} wants at least {wanted}"
    gram_RR = clipped(given)
    assert given.gram is not None, "adaptive needs the inner products"
    squares = [row[at] for at, row in enumerate(given.gram)]
    loud = sum(square > LOUD * LOUD * lower_median(squares) for square in squares)
    against = sum(
        math.fsum(product for other, product in enumerate(row) if other != at) < 0.0 for at, row in enumerate(gram_RR)
    )
    if not loud and not against:
        return calm, f"{calm}: {count} agree in direction and none is over {LOUD} times the median norm"
    seen = f"{against} of {count} point against the others and {loud} are over {LOUD} times the median norm"
    wary = Rule.MULTI_KRUM
    if count < contributors_min(wary, count, given.bad_max):
        wary = _wary_of_few(given.sparse)
    return wary, f"{wary}: {seen}"


def multi_krum(gram_RR: Gram, bad: int) -> frozenset[int]:
    """Which R - bad contributions have the least sum of squared distances to their R - bad - 2 nearest; of equals, the
    first in order."""
    count = len(gram_RR)
    nearest = count - bad - 2
    sums = []
    for at in range(count):
        others = sorted(squared_distance(gram_RR, at, other) for other in range(count) if other != at)
        sums.append((math.fsum(others[:nearest]), at))
    return frozenset(at for _, at in sorted(sums)[: count - bad])


def geometric_median(gram_RR: Gram) -> list[float]:
    """Each contribution's share, summing to 1, of the point with the least sum of distances: Weiszfeld's steps.

    The start weighs each by one over its median distance to the others, so that no far point has a hold on it.
    Distances count as at least a thousandth of the middle one: a step that lands on a contribution would stay there.
    """
    count = len(gram_RR)
    distances = [
        lower_median([math.sqrt(squared_distance(gram_RR, at, other)) for other in range(count) if other != at])
        for at in range(count)
    ]
    shares = _nearer_weighs_more(distances)
    for _ in range(WEISZFELD_STEPS):
        shares = _nearer_weighs_more(distances_to(gram_RR, shares))
    return shares


def centered_clip(gram_RR: Gram) -> list[float]:
    """Each contribution's factor in the centre v = v + mean of (x - v) min(1, radius / |x - v|), from v = 0.

    The radius of a step is the median distance to v, so that it needs no setting and half the contributions bound it.
    """
    count = len(gram_RR)
    factors = [0.0] * count
    for _ in range(CLIPPING_STEPS):
        distances = distances_to(gram_RR, factors)
        radius = lower_median(distances)
        pulls = [1.0 if distance <= radius else radius / distance for distance in distances]
        left = 1.0 - math.fsum(pulls) / count
        factors = [factor * left + pull / count for factor, pull in zip(factors, pulls, strict=True)]
    return factors


def squared_distance(gram_RR: Gram, at: int, other: int) -> float:
    """|x_at - x_other|^2, never under 0."""
    products = (gram_RR[at][at], gram_RR[other][other], -gram_RR[at][other], -gram_RR[other][at])
    return max(0.0, math.fsum(products))


def distances_to(gram_RR: Gram, factors: Sequence[float]) -> list[float]:
    """Each contribution's distance to the combination of all with `factors`."""
    with_it = [math.fsum(p * factor for p, factor in zip(row, factors, strict=True)) for row in gram_RR]
    itself = math.fsum(product * factor for product, factor in zip(with_it, factors, strict=True))
    return [
        math.sqrt(max(0.0, math.fsum((gram_RR[at][at], -2.0 * product, itself)))) for at, product in enumerate(with_it)
    ]


def _nearer_weighs_more(distances: Sequence[float]) -> list[float]:
    """Shares that fall as one over the distance, and sum to 1; equal when the middle distance is 0."""
    floor = lower_median(distances) / 1_000
    if floor == 0.0:
        inverses = [1.0 if distance == 0.0 else 0.0 for distance in distances]
    else:
        inverses = [floor / max(distance, floor) for distance in distances]
    total = math.fsum(inverses)
    return [inverse / total for inverse in inverses]


def _mean_of_senders(rule: Rule, why: str, factors: Sequence[float], sparse: bool) -> Plan:
    """The mean of those whose factor is not 0: over all of them, or over those that sent the coordinate."""
    count = sum(factor != 0.0 for factor in factors)
    senders_min = -(-count // CAPTURE_SHARE) if sparse else 0
    return Plan(rule=rule, why=why, factors=_fp32(factors), divisor=float(count), senders_min=senders_min)


def _fp32(numbers: Sequence[float]) -> tuple[float, ...]:
    """The nearest fp32 numbers: rounded here, once, and not by whatever multiplies with them."""
    return tuple(struct.unpack("<f", struct.pack("<f", number))[0] for number in numbers)
