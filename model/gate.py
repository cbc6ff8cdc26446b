"""Who is in a round's merge, with what weight and what clip factor: decided from numbers alone.

Rules: core, no torch. Weights and clip factors are integers in parts of ONE, so that the manifest carries them and
every member computes one update from it. The order of the checks is fixed: layout, finite (a median of NaN is NaN, so
it comes before any median), nothing learned, tokens, copies, scores; then clip and weight among those who are left. A
median is the lower one: of two peers who disagree the smaller number is the safer. What a peer claims counts for at
most WEIGHT_CAP times the median; what it says of itself is not asked. Who is on probation moves no median: else a swarm
of new keys would set the norm. What is a copy, and what is harm, is asked of the round itself: how alike its other
payloads are, and how far apart its scores. Verdicts are data, a sentence each.
Source: TRAINING.md 4, SECURITY.md G1-G3; scores and overlap after Gauntlet (templar), norm clipping after Sun et al.
(arXiv 1911.07963).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import combinations
from typing import Final, TypeVar

from model.errors import CannotMerge

ONE: Final = 1 << 20  # parts of a whole; fp32 holds every such fraction of 1 exactly, and a clip of 1e-6 still counts
WEIGHT_CAP: Final = 2  # times the median claim: TRAINING.md 4
OVERLAP_MAX: Final = 0.4  # share of top-k indices in common that is no copy, whatever the round's others have
SCORERS_MIN: Final = 3  # of fewer the median is one member's word, and that one may be a liar
COMPARED_MIN: Final = 3  # of fewer contributions there is no middle to compare with
COMPARED_SCORERS_MIN: Final = 2  # of four members three report in time: then who did not has 3 scorers, the others 2
HARM_TIMES: Final = 3  # of 500 honest payloads late in runs 1 refuses 25, 2 refuses 4, 3 none, and all flips still
CONTRIBUTORS_MAX: Final = 64  # beyond it the round's contributors are drawn by lottery (TRAINING.md 1)

_Number = TypeVar("_Number", int, float)


class Reason(Enum):
    """Why a contribution is in, or out."""

    ACCEPTED = "accepted"
    PROBATION = "probation"  # in, with weight 0: heard and shown, not counted
    LAYOUT = "layout"
    NOT_FINITE = "not finite"
    NOTHING = "nothing"
    TOKENS = "tokens"
    COPY = "copy"
    SCORE = "score"
    FAR = "far"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What every contribution to a run is like: elements of the flat vector, and whether payloads are sparse."""

    elements: int
    sparse: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrant:
    """What is known of one contribution, in numbers.

    norm: of the whole delta, not finite if any element is not (model/evidence.py). tokens: as the peer claims.
    arrived: its place in the order of commitment, which says who is the copy. scores_parts: how far the held-out loss
    fell by other members' word, parts of ONE nats. probation: it joined this round, or has yet to earn a weight.
    """

    peer: str
    elements: int
    sparse: bool
    norm: float
    tokens: int
    arrived: int = 0
    scores_parts: tuple[int, ...] = ()
    probation: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of one contribution. weight_parts, clip_parts: parts of ONE, both 0 when it does not count."""

    peer: str
    reason: Reason
    sentence: str
    weight_parts: int = 0
    clip_parts: int = 0

    @property
    def accepted(self) -> bool:
        """Whether the manifest lists it."""
        return self.reason in (Reason.ACCEPTED, Reason.PROBATION)


def judge(
    entrants: Sequence[Entrant], run: Run, overlaps: Mapping[tuple[str, str], float] | None = None
) -> tuple[Verdict, ...]:
    """A verdict on each entrant, sorted by peer whatever order they came in.

    overlaps: (peer, peer) -> share of indices in common, in either order of the pair; a missing pair has none.
    Raises CannotMerge: a peer came twice, or there are more than CONTRIBUTORS_MAX.
    """
    ordered = sorted(entrants, key=lambda entrant: entrant.peer)
    peers = [entrant.peer for entrant in ordered]
    if len(set(peers)) != len(peers):
        twice = next(peer for peer in peers if peers.count(peer) > 1)
        raise CannotMerge(f"{twice} came {peers.count(twice)} times in one round, wanted once: keep its first payload")
    if len(ordered) > CONTRIBUTORS_MAX:
        raise CannotMerge(f"{len(ordered)} contributions came, wanted at most {CONTRIBUTORS_MAX}: draw lots")
    out = {entrant.peer: verdict for entrant in ordered if (verdict := _alone(entrant, run)) is not None}
    out |= _copies([entrant for entrant in ordered if entrant.peer not in out], overlaps or {})
    out |= _scored([entrant for entrant in ordered if entrant.peer not in out])
    out |= _far([entrant for entrant in ordered if entrant.peer not in out])
    chosen = [entrant for entrant in ordered if entrant.peer not in out]
    return tuple(sorted((*out.values(), *_accepted(chosen)), key=lambda verdict: verdict.peer))


def clip_parts(norms: Sequence[float]) -> tuple[int, ...]:
    """For each norm the factor that brings it down to the median of all, parts of ONE, rounded down; ONE when below.

    0: over ONE times the median. A manifest's clip factors are checked by calling this with its norms.
    Raises CannotMerge: a norm is not a finite number over 0.
    """
    for norm in norms:
        if not (math.isfinite(norm) and norm > 0.0):
            raise CannotMerge(f"a norm of {norm} came, wanted a finite number over 0: let the gate judge first")
    if not norms:
        return ()
    median = lower_median(norms)
    return tuple(ONE if norm <= median else int(median / norm * ONE) for norm in norms)


def weight_parts(tokens: Sequence[int]) -> tuple[int, ...]:
    """Each claim over the median claim, parts of ONE, rounded down, at least 1 and at most WEIGHT_CAP times ONE.

    Raises CannotMerge: a claim under 1.
    """
    for claim in tokens:
        if claim < 1:
            raise CannotMerge(f"a claim of {claim} tokens came, wanted at least 1: let the gate judge first")
    if not tokens:
        return ()
    median = lower_median(tokens)
    return tuple(max(1, min(claim * ONE // median, WEIGHT_CAP * ONE)) for claim in tokens)


def lower_median(numbers: Iterable[_Number]) -> _Number:
    """The middle number, of an even count the smaller of the two: never a mean of an honest one and a liar's."""
    ordered = sorted(numbers)
    return ordered[(len(ordered) - 1) // 2]


def _alone(entrant: Entrant, run: Run) -> Verdict | None:
    """What is wrong with a contribution by itself, if anything is."""
    kinds = {True: "sparse", False: "dense"}
    if entrant.elements != run.elements:
        return _out(entrant, Reason.LAYOUT, f"its delta has {entrant.elements:,} elements, the run {run.elements:,}")
    if entrant.sparse != run.sparse:
        return _out(entrant, Reason.LAYOUT, f"its delta is {kinds[entrant.sparse]}, the run's are {kinds[run.sparse]}")
    if not math.isfinite(entrant.norm):
        return _out(entrant, Reason.NOT_FINITE, "its delta holds numbers that are not finite")
    if entrant.norm <= 0.0:
        return _out(entrant, Reason.NOTHING, "its delta is zero everywhere: nothing was learned")
    if entrant.tokens < 1:
        return _out(entrant, Reason.TOKENS, f"it claims {entrant.tokens} tokens, wanted at least 1")
    return None


def _copies(entrants: Sequence[Entrant], overlaps: Mapping[tuple[str, str], float]) -> dict[str, Verdict]:
    """Who sends what another committed to before. A copy of a copy is held against the first."""

    def shared(one: Entrant, other: Entrant) -> float:
        pair = (one.peer, other.peer)
        return overlaps.get(pair, overlaps.get(pair[::-1], 0.0))

    limit = _overlap_limit([shared(*pair) for pair in combinations([e for e in entrants if not e.probation], 2)])
    out: dict[str, Verdict] = {}
    kept: list[Entrant] = []
    for entrant in sorted(entrants, key=lambda entrant: (entrant.arrived, entrant.peer)):
        for first in kept:
            if (overlap := shared(first, entrant)) >= limit:
                why = f"{overlap:.0%} of its indices are those of {first.peer}, who came first"
                out[entrant.peer] = _out(entrant, Reason.COPY, f"{why}; {limit:.0%} is a copy in this round")
                break
        else:
            kept.append(entrant)
    return out


def _overlap_limit(shares: Sequence[float]) -> float:
    """Half-way from what the middle pair of this round has in common to all: in a small model's first rounds honest
    pairs have up to 0.6 in common (0.47 the middle one), later 0.2."""
    return OVERLAP_MAX if not shares else max(OVERLAP_MAX, (1.0 + lower_median(shares)) / 2.0)


def _scored(entrants: Sequence[Entrant]) -> dict[str, Verdict]:
    """Who does harm, by the medians of what SCORERS_MIN or more others published; with fewer scorers nobody is out:
    clip and weight cap still bound what it does.

    Near the end of training a delta gains nothing, and half of the honest are below 0 by chance or by what their own
    text has taught them. So harm is what is not above 0 and is out of the round's own spread: further below the middle
    contribution than HARM_TIMES what the best is above it. The upper side is measured, since harm widens the lower one
    only; and a peer that widens the upper one helps by so much.
    """
    scores = {e.peer: lower_median(e.scores_parts) for e in entrants if len(e.scores_parts) >= SCORERS_MIN}
    compared = [
        lower_median(e.scores_parts)
        for e in entrants
        if len(e.scores_parts) >= COMPARED_SCORERS_MIN and not e.probation
    ]
    least, beside = 1, "it has to fall"
    if len(compared) >= COMPARED_MIN:
        middle = lower_median(compared)
        least = min(least, middle - HARM_TIMES * (max(compared) - middle))
        beside = f"the middle one of the round by {-middle / ONE:+.6f}, and {-least / ONE:+.6f} is the most allowed"
    return {
        e.peer: _out(
            e,
            Reason.SCORE,
            f"by the median of {len(e.scores_parts)} members the held-out loss changes by {-scores[e.peer] / ONE:+.6f} "
            f"nats with it; {beside}",
        )
        for e in entrants
        if e.peer in scores and scores[e.peer] < least
    }


def _far(entrants: Sequence[Entrant]) -> dict[str, Verdict]:
    """Whose norm is so far over the median that nothing of the delta is left after the clip. Who goes may lower the
    median of the rest, so it is asked again until nobody goes."""
    out: dict[str, Verdict] = {}
    left = [entrant for entrant in entrants if not entrant.probation]
    while left:
        norms = [entrant.norm for entrant in left]
        gone = [entrant for entrant, clip in zip(left, clip_parts(norms), strict=True) if clip == 0]
        if not gone:
            break
        median = lower_median(norms)
        for entrant in gone:
            why = f"its norm is {entrant.norm:.3g}, over {ONE:,} times the median of {median:.3g}"
            out[entrant.peer] = _out(entrant, Reason.FAR, why)
        left = [entrant for entrant in left if entrant.peer not in out]
    return out


def _accepted(chosen: Sequence[Entrant]) -> list[Verdict]:
    """Clips and weights of those who count, and a word for those on probation."""
    heard = [entrant for entrant in chosen if entrant.probation]
    counted = [entrant for entrant in chosen if not entrant.probation]
    clips = clip_parts([entrant.norm for entrant in counted])
    weights = weight_parts([entrant.tokens for entrant in counted])
    probation = "heard, with weight 0 while on probation"
    return [
        *(Verdict(peer=e.peer, reason=Reason.PROBATION, sentence=f"{e.peer}: {probation}") for e in heard),
        *(
            Verdict(
                peer=entrant.peer,
                reason=Reason.ACCEPTED,
                sentence=f"{entrant.peer}: in" + (", clipped to the median norm" if clip < ONE else ""),
                weight_parts=weight,
                clip_parts=clip,
            )
            for entrant, clip, weight in zip(counted, clips, weights, strict=True)
        ),
    ]


def _out(entrant: Entrant, reason: Reason, why: str) -> Verdict:
    return Verdict(peer=entrant.peer, reason=reason, sentence=f"{entrant.peer}: refused: {why}")
