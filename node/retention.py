"""How long each kind of event stays raw, and what is left of it afterwards: one `hour` for a kind and hour.

Rules: core. An event is due when it is older than its kind's age, or when more of its kind are kept than its bound.
Kinds of measurement are condensed to hours; what people or decisions left (notes, merges, starts) just goes, late.
Source: SELF.md, "Memory: retention by kind".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from node.events import (
    FIGURES_MAX,
    HOUR_MS,
    KINDS,
    WORDS_MAX,
    Body,
    Event,
    Hour,
    Summary,
    code_of,
    figures_of,
)  # fmt: skip

DAY_MS: Final = 86_400_000
CONDENSED: Final = frozenset({"state", "prediction", "outcome", "inference", "peer"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """How long a kind stays, and how many of it at most."""

    age_ms: int
    rows_max: int

    def __post_init__(self) -> None:
        """Checked when made."""
        if self.age_ms < 1 or self.rows_max < 1:
            raise ValueError(f"a term of {self.age_ms} ms and {self.rows_max} events came; both must be 1 or more")


def _terms() -> dict[str, Term]:
    """Raw measurements two weeks (one state each 10 s is 120,960), hours a year and more, words ten years."""
    terms = {kind: Term(age_ms=14 * DAY_MS, rows_max=200_000) for kind in CONDENSED}
    terms["inference"] = Term(age_ms=30 * DAY_MS, rows_max=500_000)
    terms["hour"] = Term(age_ms=400 * DAY_MS, rows_max=100_000)
    for kind in KINDS:
        terms.setdefault(kind, Term(age_ms=3_650 * DAY_MS, rows_max=100_000))
    return terms


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """The terms of every kind, and the most that the file may take on disk."""

    terms: dict[str, Term] = field(default_factory=_terms)
    bytes_max: int = 2 << 30  # the file's; writing beyond is refused as on a full disk

    def __post_init__(self) -> None:
        """Every kind has a term."""
        if self.terms.keys() != KINDS.keys():
            raise ValueError(f"terms for {sorted(self.terms)} came, wanted them for {sorted(KINDS)}")
        if self.bytes_max < 1 << 20:
            raise ValueError(f"bytes_max {self.bytes_max} came, wanted at least 1 MiB: an empty memory takes 0.1")


@dataclass(slots=True)
class _Running:
    """One figure while it is summed up."""

    count: int = 0
    mean: float = 0.0
    least: float = float("inf")
    most: float = float("-inf")

    def add(self, value: float) -> None:
        self.count += 1
        self.mean += value / self.count - self.mean / self.count  # value - mean could overflow
        self.least, self.most = min(self.least, value), max(self.most, value)


def condense(events: Iterable[tuple[str, int, Body | None]], now_ms: int) -> list[Event]:
    """(kind, time, body) of events that go -> what stays of them. A forgotten one (None) only counts."""
    groups: dict[tuple[int, str], list[Body | None]] = {}
    for kind, ts_ms, body in events:
        if kind in CONDENSED:
            groups.setdefault((max(0, ts_ms - ts_ms % HOUR_MS), kind), []).append(body)
    return [Event(ts_ms=now_ms, body=_hour(kind, from_ms, groups[from_ms, kind])) for from_ms, kind in sorted(groups)]


def _hour(kind: str, from_ms: int, bodies: list[Body | None]) -> Hour:
    figures: dict[str, _Running] = {}
    codes: Counter[str] = Counter()
    for body in bodies:
        if body is None:
            continue
        for name, value in figures_of(body).items():
            if name in figures or len(figures) < FIGURES_MAX:
                figures.setdefault(name, _Running()).add(float(value))
        code = code_of(body)
        if code and (code in codes or len(codes) < WORDS_MAX):
            codes[code] += 1
    return Hour(
        kind=kind,
        from_ms=from_ms,
        count=len(bodies),
        figures={
            name: Summary(count=each.count, mean=each.mean, least=each.least, most=each.most)
            for name, each in figures.items()
        },
        codes=dict(codes),
    )
