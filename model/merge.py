"""Deltas -> one update, and the outer step by it: the same bits on every member's machine.

Rules: fp32 on the CPU, contributions in the order given (the manifest's, sorted by peer), each element's arithmetic a
fixed sequence of single operations, never a fused one (`add(alpha=)`, `lerp`, `addcmul` and torch.optim round otherwise
where the CPU has FMA). Every element of an update is a sum that starts from +0.0, so that it is never -0.0: which of
two zeros is the lesser depends on the SIMD path, and on where threads cut. Memory beside the update: a slice, times R
where values are sorted. What a delta with `entries` did not send costs nothing, and gives the bits that zeros would.
The gate (model/gate.py) comes first; here only what would make the update meaningless is refused.
Legend: N elements of the run's vector, S of a slice, R contributions.
Source: TRAINING.md 1, 3 and 4; sorting network: Batcher 1968; outer Nesterov momentum: DiLoCo (arXiv 2311.08105).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from model.delta import CHUNK, Delta
from model.errors import CannotMerge
from model.evidence import entries, gram, slices
from model.gate import ONE, WEIGHT_CAP
from model.layout import layout_of
from model.rules import Plan, Round, Rule, check, make_plan, needs_gram

Comparators = tuple[tuple[int, int], ...]

SLICE: Final = 16 * CHUNK  # 64 rows of it are 16 MiB; 16 rows stay in a core's cache while they are sorted
SLICE_STEP: Final = 128 * CHUNK  # 2 MiB, which stays in a core's cache between sum and step
SLICE_SUM: Final = 256 * CHUNK  # 4 MiB, and few enough slices that calls cost nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """One line of the manifest with its payload.

    weight_parts: in the token-weighted mean; 0: heard, and not counted by any rule. clip_parts: the factor that brings
    its norm down to the median. Both in parts of gate.ONE.
    """

    delta: Delta
    weight_parts: int = ONE
    clip_parts: int = ONE


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """update: fp32_N, start - end as a delta is, so that it is subtracted. plan: by which rule, with which factors (of
    the contributions that count, in their order), and why."""

    update: torch.Tensor
    plan: Plan


def merge(
    contributions: Sequence[Contribution], rule: Rule, *, bad_max: int | None = None, out_N: torch.Tensor | None = None
) -> Merged:
    """The round's update by `rule`. out_N: a vector to write it into, else a new one.

    bad_max: how many bad contributions a robust rule stands; None: fewer than a third.
    Raises CannotMerge: too few or too many contributions, deltas of different n or kind, weights or clips out of range,
    a rule that means nothing on them, or an update that is not finite; out_N then holds nothing of use.
    """
    plan, deltas = _planned(contributions, rule, bad_max)
    update_N = torch.empty(deltas[0].n, dtype=torch.float32) if out_N is None else out_N
    assert update_N.shape == (deltas[0].n,), f"out_N is {list(update_N.shape)}, the deltas {deltas[0].n}"
    assert update_N.dtype == torch.float32, f"out_N is {update_N.dtype}"
    for _ in _updates(plan, deltas, lambda start, stop: update_N[start:stop]):
        pass
    return Merged(update=update_N, plan=plan)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """theta: fp32_N, the weights after a round, new. moved: how far that is from those before, Euclidean."""

    theta: torch.Tensor
    moved: float
    plan: Plan


def merge_and_step(
    contributions: Sequence[Contribution], rule: Rule, outer: OuterStep, theta_N: torch.Tensor
) -> Stepped:
    """`merge` and then the outer step from theta_N, which stays as it is: the same bits, in one pass over memory.

    Raises CannotMerge, and then nothing has changed.
    """
    plan, deltas = _planned(contributions, rule, None)
    assert theta_N.shape == (deltas[0].n,), f"theta_N is {list(theta_N.shape)}, the deltas {deltas[0].n}"
    room_S = torch.empty(min(SLICE_STEP, deltas[0].n))
    updates = _updates(plan, deltas, lambda start, stop: room_S[: stop - start])
    after_N, moved = outer.stepped(theta_N, updates)
    return Stepped(theta=after_N, moved=moved, plan=plan)


def merge_named(
    contributions: Sequence[Mapping[str, torch.Tensor]], rule: Rule, *, bad_max: int | None = None
) -> dict[str, torch.Tensor]:
    """`merge` for named arrays as they are: the aggregate of each, fp32. Raises CannotMerge, BadModel."""
    if not contributions:
        raise CannotMerge("no contribution came, wanted at least 1")
    layout = layout_of(contributions[0])
    vectors = [Contribution(delta=Vector(layout.flatten(named))) for named in contributions]
    return layout.views(merge(vectors, rule, bad_max=bad_max).update)


@dataclass(frozen=True, slots=True)
class Vector:
    """A delta that is a plain fp32 vector, as named arrays are and our own is before it is encoded."""

    values: torch.Tensor

    @property
    def n(self) -> int:
        """Elements."""
        return self.values.numel()

    @property
    def sparse(self) -> bool:
        """Never."""
        return False

    def dense(self, start: int, stop: int) -> torch.Tensor:
        """A copy of [start, stop)."""
        return self.values[start:stop].clone()

    def sent(self, start: int, stop: int) -> torch.Tensor:
        """All of them."""
        return torch.ones(stop - start, dtype=torch.bool)


class OuterStep:
    """theta <- theta - rate * update, or with Nesterov momentum v <- m v + u; theta <- theta - rate (u + m v).

    velocity: v_N, the state to keep over a restart; None without momentum, and before the first step.
    """

    def __init__(self, rate: float, momentum: float = 0.0, velocity: torch.Tensor | None = None) -> None:
        assert 0.0 < rate < math.inf, f"an outer rate of {rate}"
        assert 0.0 <= momentum < 1.0, f"an outer momentum of {momentum}"
        self._rate = rate
        self._momentum = momentum
        self.velocity = velocity

    def step_(self, theta_N: torch.Tensor, update_N: torch.Tensor) -> None:
        """Change theta_N (fp32, CPU) in place."""
        assert theta_N.dtype == update_N.dtype == torch.float32
        assert theta_N.shape == update_N.shape
        if self._momentum and self.velocity is None:
            self.velocity = torch.zeros_like(theta_N)
        for start, stop in slices(theta_N.numel(), SLICE_SUM):
            step_S = update_N[start:stop]
            if self.velocity is not None:
                step_S = self._with_momentum(self.velocity[start:stop], step_S)
            theta_N[start:stop].sub_(step_S * self._rate)

    def stepped(
        self, theta_N: torch.Tensor, updates: Iterator[tuple[int, int, torch.Tensor]]
    ) -> tuple[torch.Tensor, float]:
        """A new theta_N, what `step_` makes of the same update, and how far it is from the old one (Euclidean).

        updates: (start, stop, update_S), the whole update in slices, each of use until the next is asked for. When they
        raise, the velocity is as it was.
        """
        after_N, squares = torch.empty_like(theta_N), list[float]()
        velocity_N = None
        if self._momentum:
            velocity_N = torch.zeros_like(theta_N) if self.velocity is None else self.velocity.clone()
        for start, stop, update_S in updates:
            turned_S = update_S if velocity_N is None else self._with_momentum(velocity_N[start:stop], update_S)
            step_S = turned_S if self._rate == 1.0 else turned_S * self._rate
            torch.sub(theta_N[start:stop], step_S, out=after_N[start:stop])
            squares.append(float(step_S.dot(step_S)))
        self.velocity = velocity_N
        return after_N, math.sqrt(math.fsum(squares))

    def _with_momentum(self, velocity_S: torch.Tensor, update_S: torch.Tensor) -> torch.Tensor:
        """Changes velocity_S; the step, new."""
        velocity_S.mul_(self._momentum)
        velocity_S.add_(update_S)
        return (velocity_S * self._momentum).add_(update_S)


def _planned(contributions: Sequence[Contribution], rule: Rule, bad_max: int | None) -> tuple[Plan, list[Delta]]:
    """How, and of what. Raises CannotMerge."""
    counted = _counted(contributions)
    deltas = [contribution.delta for contribution in counted]
    check(rule, len(counted), bool(deltas) and deltas[0].sparse, bad_max)
    _alike(deltas)
    plan = make_plan(
        rule,
        Round(
            sparse=deltas[0].sparse,
            weights_parts=tuple(contribution.weight_parts for contribution in counted),
            clips_parts=tuple(contribution.clip_parts for contribution in counted),
            gram=_finite_gram(deltas) if needs_gram(rule, len(deltas), deltas[0].sparse, bad_max) else None,
            bad_max=bad_max,
        ),
    )
    return plan, deltas


def _updates(
    plan: Plan, deltas: Sequence[Delta], room: Callable[[int, int], torch.Tensor]
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(start, stop, update_S) of the update that `plan` makes of `deltas`, in order, written into room(start, stop).

    Raises CannotMerge where it is not finite.
    """
    used = [(delta, factor) for delta, factor in zip(deltas, plan.factors, strict=True) if factor != 0.0]
    comparators = () if plan.kept is None else network(len(used), *plan.kept)
    for start, stop in slices(deltas[0].n, SLICE if plan.kept else SLICE_STEP):
        update_S = room(start, stop)
        if plan.kept is not None:
            _middle(used, start, update_S, plan, comparators)
        elif deltas[0].sparse:
            _sum_of_sent(used, start, update_S, plan)
        else:
            _sum(used, start, update_S, plan)
        lowest, highest = torch.aminmax(update_S)  # either is nan if any element is
        if not (math.isfinite(float(lowest)) and math.isfinite(float(highest))):
            raise CannotMerge("the update is not finite: a contribution is not, and the gate has to refuse it first")
        yield start, stop, update_S


def _sum(used: Sequence[tuple[Delta, float]], start: int, update_S: torch.Tensor, plan: Plan) -> None:
    """The sum of the scaled values over the divisor."""
    update_S.zero_()
    for delta, factor in used:
        values_S = delta.dense(start, start + update_S.numel())
        update_S.add_(values_S if factor == 1.0 else values_S.mul_(factor))
    _divide(update_S, plan.divisor)


def _sum_of_sent(used: Sequence[tuple[Delta, float]], start: int, update_S: torch.Tensor, plan: Plan) -> None:
    """The same over what was sent alone; the divisor may be the number of senders. Places are unique in a delta, so
    each scatter_add_ adds one value to an element."""
    update_S.zero_()
    senders_S = torch.zeros_like(update_S, dtype=torch.uint8)
    for delta, factor in used:
        places_K, values_K = entries(delta, start, start + update_S.numel())
        update_S.scatter_add_(0, places_K, values_K if factor == 1.0 else values_K * factor)
        if plan.senders_min:
            senders_S.scatter_add_(0, places_K, torch.ones_like(places_K, dtype=torch.uint8))
    if plan.senders_min == 1:  # of most coordinates there is one sender, or none
        shared_K = (senders_S > 1).nonzero().squeeze(1)
        update_S[shared_K] = update_S[shared_K].div_(senders_S[shared_K].float())
    elif plan.senders_min:
        update_S.div_(senders_S.clamp_(min=plan.senders_min).float())
    else:
        _divide(update_S, plan.divisor)


def _middle(
    used: Sequence[tuple[Delta, float]], start: int, update_S: torch.Tensor, plan: Plan, comparators: Comparators
) -> None:
    """The mean of the kept places of the R sorted values of each coordinate."""
    assert plan.kept is not None
    rows = [delta.dense(start, start + update_S.numel()).mul_(factor) for delta, factor in used]
    spare_S = torch.empty_like(update_S)
    for low, high in comparators:
        torch.minimum(rows[low], rows[high], out=spare_S)
        torch.maximum(rows[low], rows[high], out=rows[high])
        rows[low], spare_S = spare_S, rows[low]
    update_S.zero_()
    for row_S in rows[slice(*plan.kept)]:
        update_S.add_(row_S)
    _divide(update_S, plan.divisor)


def _divide(update_S: torch.Tensor, divisor: float) -> None:
    if divisor != 1.0:
        update_S.div_(divisor)


def network(count: int, first: int, last: int) -> Comparators:
    """Comparators (low, high) that bring what belongs at the places [first, last) of `count` sorted values there.

    Batcher's odd-even merge sort without the comparators that reach other places only. Minimum and maximum are exact.
    """
    comparators: list[tuple[int, int]] = []
    width = 1
    while width < count:
        step = width
        while step:
            for base in range(step % width, count - step, 2 * step):
                for low in range(base, min(base + step, count - step)):
                    if low // (2 * width) == (low + step) // (2 * width):
                        comparators.append((low, low + step))
            step //= 2
        width *= 2
    wanted = set(range(first, last))
    kept = []
    for low, high in reversed(comparators):
        if low in wanted or high in wanted:
            wanted |= {low, high}
            kept.append((low, high))
    return tuple(reversed(kept))


def _counted(contributions: Sequence[Contribution]) -> list[Contribution]:
    """Those with a weight. Raises CannotMerge when a number is out of the range that the gate gives."""
    for contribution in contributions:
        weight, clip = contribution.weight_parts, contribution.clip_parts
        if not 0 <= weight <= WEIGHT_CAP * ONE:
            raise CannotMerge(f"a weight of {weight} parts came, wanted 0 to {WEIGHT_CAP * ONE}: refuse the manifest")
        if weight and not 1 <= clip <= ONE:
            raise CannotMerge(f"a clip factor of {clip} parts came, wanted 1 to {ONE}: refuse the manifest")
    return [contribution for contribution in contributions if contribution.weight_parts]


def _alike(deltas: Sequence[Delta]) -> None:
    if len(lengths := sorted({delta.n for delta in deltas})) > 1:
        raise CannotMerge(f"deltas of {lengths} elements came, wanted one length: refuse those of another layout")
    if len({delta.sparse for delta in deltas}) > 1:
        raise CannotMerge("sparse and dense deltas came together, wanted one kind: a run has one codec")


def _finite_gram(deltas: Sequence[Delta]) -> list[list[float]]:
    gram_RR = gram(deltas)
    if not all(math.isfinite(product) for row in gram_RR for product in row):
        raise CannotMerge("a contribution is not finite: the gate has to refuse it first")
    return gram_RR
