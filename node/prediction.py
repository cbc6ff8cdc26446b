"""What a node expects of its own next period, and how well such expectations came true.

Rules: core, pure. A level is the exponential mean of past periods' figures, its interval as wide as past errors call
for; nothing is expected of a figure before two periods of it were measured. The naive forecast is "as now". There are
no seasons: a table by hour of day needs days before it helps, and more figures than an event has.
Source: Brown, exponential smoothing (1956); Hyndman, Koehler, "Another look at measures of forecast accuracy" (2006).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from node.averages import mixed
from node.consciousness import FIGURE_MAX, Measured
from node.errors import BadFigure

FORETOLD: Final = ("latency_s", "active_requests", "live_peers", "loss_nats")
LEVEL_WEIGHT: Final = 0.3  # of the newest period, once ten or so were seen: half the level is of the last two
ERROR_WEIGHT: Final = 0.1  # of the newest error: a width must not follow one bad minute
INTERVAL_SHARE: Final = 0.8  # of outcomes that an interval is meant to hold
# 80 % of errors lie within so many mean absolute errors: 1.61 if they are Laplace's (ln 5), 1.61 if normal
# (1.2816 / sqrt(2 / pi)); how many do is measured (Forecasts.inside).
INTERVAL_WIDTH: Final = 1.61
SKILL_LEAST: Final = -100.0  # worse than that says nothing more


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected(Measured):
    """One figure of a prediction. naive: what it is now; low and high: INTERVAL_SHARE of outcomes are meant to lie
    there."""

    value: float
    naive: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction(Measured):
    """What is expected of a period to come."""

    from_ms: int
    to_ms: int
    figures: Mapping[str, Expected]

    def __post_init__(self) -> None:
        """Checked when made. Raises BadFigure."""
        Measured.__post_init__(self)
        if self.to_ms < self.from_ms:
            raise BadFigure(f"a period from {self.from_ms} to {self.to_ms} ms came: it ends before it begins")
        check_names(self.figures)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score(Measured):
    """How one figure came out. error, naive_error: measured less foretold; is_inside: of the interval."""

    SIGNED = frozenset({"error", "naive_error"})
    measured: float
    error: float
    naive_error: float
    is_inside: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome(Measured):
    """What came of the prediction that has this id in the memory."""

    prediction: int
    figures: Mapping[str, Score]

    def __post_init__(self) -> None:
        """Checked when made. Raises BadFigure."""
        Measured.__post_init__(self)
        check_names(self.figures)


@dataclass(frozen=True, slots=True, kw_only=True)
class Level(Measured):
    """What is known of one figure's past. scale: its mean absolute error; None: never foretold and measured."""

    now: float
    value: float
    scale: float | None = None
    periods: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictor:
    """The levels of all figures that were ever measured."""

    levels: Mapping[str, Level] = field(default_factory=dict)

    def observed(self, figures: Mapping[str, float]) -> Predictor:
        """A period is over, and this was measured of it. Raises BadFigure for a figure that is none."""
        check_names(figures)
        levels = dict(self.levels)
        for name, measured in figures.items():
            seen = Level(now=measured, value=measured)  # refuses what is no figure before it is averaged
            levels[name] = _next(levels[name], measured) if name in levels else seen
        return replace(self, levels=levels)

    def predict(self, now_ms: int, period_ms: int) -> Prediction:
        """What is expected of the period_ms to come."""
        return Prediction(
            from_ms=now_ms,
            to_ms=now_ms + period_ms,
            figures={
                name: _expected(level, level.scale) for name, level in self.levels.items() if level.scale is not None
            },
        )


def resumed(last: Prediction) -> Predictor:
    """The predictor that made this prediction, as far as a restart needs: levels, widths, what was last measured."""
    return Predictor(
        levels={
            name: Level(
                now=each.naive,
                value=each.value,
                scale=(each.high - each.value) / INTERVAL_WIDTH,
                periods=round(1 / LEVEL_WEIGHT) + 1,
            )
            for name, each in last.figures.items()
        }
    )


def score(prediction: Prediction, measured: Mapping[str, float], prediction_id: int) -> Outcome:
    """How the prediction came out, of the figures that were both foretold and measured. Raises BadFigure."""
    check_names(measured)
    scores = {}
    for name, value in measured.items():
        if (foretold := prediction.figures.get(name)) is None:
            continue
        scores[name] = Score(
            measured=value,
            error=value - foretold.value,
            naive_error=value - foretold.naive,
            is_inside=foretold.low <= value <= foretold.high,
        )
    return Outcome(prediction=prediction_id, figures=scores)


def skill_of(error: float, naive_error: float) -> float | None:
    """1 - error / naive_error, of mean absolute errors: 1 is perfect, 0 no better than "as now", below 0 worse. None
    while "as now" was never wrong, of which no share can be taken."""
    if naive_error == 0.0:
        return None
    return max(SKILL_LEAST, 1.0 - error / naive_error) if error / naive_error < -SKILL_LEAST else SKILL_LEAST


def check_names(figures: Mapping[str, object]) -> None:
    """Raises BadFigure for a name that nothing is foretold of."""
    if unknown := figures.keys() - set(FORETOLD):
        raise BadFigure(f"figures {sorted(unknown)[:8]} came, foretold are {', '.join(FORETOLD)}")


def _next(level: Level, measured: float) -> Level:
    periods = min(level.periods + 1, int(FIGURE_MAX))
    error = abs(measured - level.value)
    return Level(
        now=measured,
        value=mixed(level.value, measured, max(1 / periods, LEVEL_WEIGHT)),
        scale=error if level.scale is None else mixed(level.scale, error, max(1 / periods, ERROR_WEIGHT)),
        periods=periods,
    )


def _expected(level: Level, scale: float) -> Expected:
    width = INTERVAL_WIDTH * scale
    return Expected(
        value=level.value,
        naive=level.now,
        low=max(0.0, level.value - width),
        high=min(FIGURE_MAX, level.value + width),
    )
