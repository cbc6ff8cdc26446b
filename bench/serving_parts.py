"""The parts of bench.serving: what each measures, turn by turn beside the rivals, and the figures that it gives.

Rules: contestants take turns with the same load, in the other order every other turn, so that what else the machine
does meets all of them; the first turn warms up and counts nowhere. A ratio is the median of the turns' ratios, a
figure the median of the turns. A part ends after its turns or, with one turn at least, its time. Each figure names its
path: the kind of our linear layers, and whether an answer's bits were the same alone and in a batch.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from bench.harness import Row, quantile
from bench.serving_asks import Ask, Shape, Told, ids, mixed, poisson, together
from bench.serving_lag import lags_s
from bench.serving_load import answer, outcomes, users
from bench.serving_model import SLOTS, Served
from bench.serving_rivals import CONTINUOUS, GENERATE, LLAMACPP, Contestant, RivalLostError
from model.engine import Engine

PRECISIONS: Final = {"bf16": "bf16", "int8": "q8_0", "int8-dynamic": "q8_0"}  # ours, and llama.cpp's beside it
BATCHES: Final = (1, SLOTS)
SHORT_TIMES: Final = 3  # a turn with one request is short
SERVED_GAP_S: Final = 0.02  # all have come in a second: more than any contestant serves in that time
PREFIX_TOKENS, TAIL_TOKENS = 512, 16  # MEASURE.md; and a question behind it
ALONE, ALONE_NEW = 4, 8  # answers of a batch that are made again alone, and their length


Answers = dict[str, list[Told]]  # contestant -> turns
Load = Callable[[random.Random, bool], list[Ask]]  # chance, and whether it is to warm up only


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How much is measured. part_s: after that a part begins no new turn."""

    turns: int
    part_s: float
    served_asks: int  # requests of a served load
    users_each: int  # requests of each of many users
    alone_each: int  # requests of one user alone
    lag_s: float


FULL: Final = Pace(turns=5, part_s=200.0, served_asks=32, users_each=6, alone_each=16, lag_s=15.0)
QUICK: Final = Pace(turns=2, part_s=18.0, served_asks=32, users_each=3, alone_each=6, lag_s=2.0)
TINY: Final = Pace(turns=1, part_s=1.0, served_asks=8, users_each=2, alone_each=2, lag_s=0.3)


@dataclass(slots=True, kw_only=True)
class Bench:
    """What all parts share. engines: of our kinds; each lives through all parts, as a node's does."""

    shape: Shape
    ours: list[Served]
    rivals: dict[str, Contestant]
    pace: Pace
    seed: int
    note: Callable[[str], None]
    engines: dict[str, Engine] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """An engine for each kind."""
        self.engines = {served.kind: served.engine() for served in self.ours}

    @property
    def main(self) -> Served:
        """The path of what is measured on one only: bf16 where it is computed here."""
        return next((served for served in self.ours if served.kind == "bf16"), self.ours[0])

    def rng(self, *names: object) -> random.Random:
        """Chance of its own for each name: no prompt comes twice."""
        return random.Random(f"{self.seed} {names}")

    def count(self, many: int = 1) -> Iterator[int]:
        """The turns of a part, so many times as usual; -1 warms up."""
        began = time.monotonic()
        for turn in range(-1, self.pace.turns * many):
            if turn > 0 and time.monotonic() - began > self.pace.part_s:
                return
            yield turn

    def turns(self, part: str, rivals: Sequence[str], load: Load, many: int = 1) -> Answers:
        """All of ours, and those of these rivals that are there, on one load a turn."""
        contestants: dict[str, Contestant] = {
            **{kind: partial(answer, engine) for kind, engine in self.engines.items()},
            **{name: self.rivals[name] for name in rivals if name in self.rivals},
        }
        made: Answers = {name: [] for name in contestants}
        for turn in self.count(many):
            asks = load(self.rng(part, turn), turn < 0)
            for name in sorted(contestants, reverse=turn % 2 == 1):
                try:
                    told = contestants[name](asks)
                except RivalLostError as exc:
                    self.note(f"{name} is left out from now on: {exc}")
                    del contestants[name], made[name], self.rivals[name]
                    continue
                if turn >= 0:
                    made[name].append(told)
        return made


Key = Callable[[Told], float]


def cpu(told: Told) -> float:
    """Tokens a CPU-second, end to end."""
    return told.tok_per_cpu_s


def wall(told: Told) -> float:
    """Tokens a second, end to end."""
    return told.tok_per_s


def decode(told: Told) -> float:
    """Tokens a CPU-second, decoding only."""
    return told.decode_tok_per_cpu_s


def late(told: Told) -> float:
    """Seconds to the first token, of the 95th of a hundred."""
    return quantile(told.first_s, 0.95)


def over(made: Answers, ours: str, theirs: str, key: Key) -> float:
    """The median of the turns' ratios."""
    return statistics.median(key(a) / key(b) for a, b in zip(made[ours], made[theirs], strict=True))


def figure(made: Answers, name: str, unit: str, key: Key, beside: tuple[str, str | None]) -> Row:
    """One contestant's median, beside a rival's if it is there; beside: (contestant, rival)."""
    ours, rival = beside
    theirs = made.get(rival or "")
    return Row(
        figure=name,
        value=statistics.median(map(key, made[ours])),
        unit=unit,
        better="lower" if key is late else "higher",
        rival=rival if theirs else None,
        rival_value=statistics.median(map(key, theirs)) if theirs else None,
    )


def times(made: Answers, name: str, served: Served, rival: str, key: Key) -> list[Row]:
    """How many times the rival's; nothing if it is not there."""
    if rival not in made:
        return []
    value = over(made, served.kind, rival, key)
    return [
        Row(
            figure=name,
            value=value,
            unit=f"times, {served.path}",
            better="lower" if key is late else "higher",
            rival=rival,
            rival_value=1.0,
        )
    ]


def checked_invariance(bench: Bench) -> list[Row]:
    """Some answers of a batch made again alone, in engines that know nothing: equal to the bit or not. From now on
    each path is called what was found."""
    rows = []
    for at, served in enumerate(bench.ours):
        rng = bench.rng("invariance")
        asks = {str(n): mixed(rng, 0.0, bench.shape)._replace(new=ALONE_NEW) for n in range(SLOTS)}
        batch = outcomes(served.engine(), asks)
        equal = sum(outcomes(served.engine(), {name: asks[name]})[name] == batch[name] for name in list(asks)[:ALONE])
        if served.is_invariant and equal < ALONE:
            bench.note(f"{served.kind} is called batch-invariant, and {ALONE - equal} of {ALONE} answers were not")
            bench.ours[at] = replace(served, is_invariant=False)
        unit = f"of {ALONE}, alone as in {SLOTS}"
        rows.append(Row(figure=f"invariant_{served.slug}", value=equal, unit=unit, better="higher"))
    return rows


def batch_rows(bench: Bench) -> list[Row]:
    """Batches that start and end together: end to end, and decoding only."""
    return [row for size in BATCHES for row in _batch_rows(bench, size)]


def _batch_rows(bench: Bench, size: int) -> list[Row]:
    rivals, many = (GENERATE, CONTINUOUS, *LLAMACPP.values()), SHORT_TIMES if size == 1 else 1
    made = bench.turns(f"b{size}", rivals, lambda rng, _: together(rng, size, bench.shape), many)
    rows = []
    for served in bench.ours:
        precision = PRECISIONS.get(served.kind)
        rows += _speed_rows(made, served, size, precision)
        if size > 1:
            rows += times(made, f"e2e_b{size}_{served.slug}_ratio", served, GENERATE, cpu)
            rows += times(made, f"e2e_b{size}_{served.slug}_continuous_ratio", served, CONTINUOUS, cpu)
        if precision is not None:
            other = "" if served.kind in ("bf16", "int8") else f"_{served.slug}"
            rows += times(made, f"llamacpp_b{size}_{precision}{other}_ratio", served, LLAMACPP[precision], cpu)
    if size == 1:
        rows += _best_rows(bench, made)
    for rival in rivals:
        if rival in made:
            slug = rival.replace(" ", "_").replace(".", "")
            rows.append(figure(made, f"{slug}_b{size}_tok_per_cpu_s", "tok/CPU-s", cpu, (rival, None)))
    return rows


def _speed_rows(made: Answers, served: Served, size: int, precision: str | None) -> list[Row]:
    """Of one of our kinds."""
    name, path, beside = f"b{size}_{served.slug}", served.path, (served.kind, GENERATE)
    pair = (served.kind, None if precision is None else LLAMACPP[precision])
    return [
        figure(made, f"e2e_{name}_tok_per_cpu_s", f"tok/CPU-s, {path}", cpu, beside),
        figure(made, f"e2e_{name}_tok_per_s", f"tok/s, {path}", wall, beside),
        figure(made, f"decode_{name}_tok_per_cpu_s", f"tok/CPU-s, {path}", decode, pair),
    ]


def _best_rows(bench: Bench, made: Answers) -> list[Row]:
    """Batch 1, the best path, and the best that is invariant."""
    ranked = sorted(bench.ours, key=lambda served: -statistics.median(map(cpu, made[served.kind])))
    best = ranked[0]
    rows = times(made, "e2e_b1_ratio", best, GENERATE, cpu)
    rows += times(made, "e2e_b1_continuous_ratio", best, CONTINUOUS, cpu)
    for served in [each for each in ranked if each.is_invariant][:1]:
        rows += times(made, "e2e_b1_invariant_ratio", served, GENERATE, cpu)
    rows.append(figure(made, "decode_b1_tok_per_cpu_s", f"tok/CPU-s, {best.path}", decode, (best.kind, None)))
    return rows


def served_rows(bench: Bench) -> list[Row]:
    """Poisson arrivals, mixed lengths, at most 16 at a time."""

    def load(rng: random.Random, is_warming: bool) -> list[Ask]:
        return poisson(rng, bench.pace.served_asks // (4 if is_warming else 1), SERVED_GAP_S, bench.shape)

    made = bench.turns("served", (CONTINUOUS,), load)
    rows = []
    for served in bench.ours:
        beside, path = (served.kind, CONTINUOUS), served.path
        name = f"served_load_{served.slug}"
        rows.append(figure(made, f"{name}_tok_per_s", f"tok/s, {path}", wall, beside))
        rows.append(figure(made, f"{name}_tok_per_cpu_s", f"tok/CPU-s, {path}", cpu, beside))
        rows.append(figure(made, f"{name}_ttft_p95_s", f"s, {path}", late, beside))
        short = "served_load" if served == bench.main else name
        rows += times(made, f"{short}_ratio", served, CONTINUOUS, wall)
        rows += times(made, f"{short}_cpu_ratio", served, CONTINUOUS, cpu)
        rows += times(made, f"{short}_ttft_ratio", served, CONTINUOUS, late)
    return rows


def users_rows(bench: Bench) -> list[Row]:
    """The time to the first token of 16 users over that of one."""
    engine, pace = bench.engines[bench.main.kind], bench.pace
    alone_ms, many_ms = list[float](), list[float]()
    for turn in bench.count():
        for kept, count, each in ((alone_ms, 1, pace.alone_each), (many_ms, SLOTS, pace.users_each)):
            told_s = users(engine, count, each if turn >= 0 else 2, bench.rng("users", turn, count), bench.shape)
            if turn >= 0:
                kept.append(statistics.median(told_s) * 1e3)
    path = bench.main.path
    ratio = statistics.median(many / alone for many, alone in zip(many_ms, alone_ms, strict=True))
    return [
        Row(figure="ttft_1_user_p50_ms", value=statistics.median(alone_ms), unit=f"ms, {path}", better="lower"),
        Row(figure="ttft_16_users_p50_ms", value=statistics.median(many_ms), unit=f"ms, {path}", better="lower"),
        Row(figure="ttft_16_users_ratio", value=ratio, unit=f"times one user's, {path}", better="lower"),
    ]


def prefix_rows(bench: Bench) -> list[Row]:
    """A second prompt that begins as the first: CPU time to its first token, and the first's over it."""
    engine = bench.engines[bench.main.kind]
    cold_ms, warm_ms = list[float](), list[float]()
    for turn in bench.count():
        rng = bench.rng("prefix", turn)
        head = ids(rng, PREFIX_TOKENS, bench.shape)
        for kept in (cold_ms, warm_ms):
            told = answer(engine, [Ask(0.0, head + ids(rng, TAIL_TOKENS, bench.shape), 1)])
            if turn >= 0:
                kept.append(told.cpu_s * 1e3)
    path = bench.main.path
    ratio = statistics.median(cold / warm for cold, warm in zip(cold_ms, warm_ms, strict=True))
    return [
        Row(figure="prefix_first_cpu_ms", value=statistics.median(cold_ms), unit=f"CPU-ms, {path}", better="lower"),
        Row(figure="prefix_second_cpu_ms", value=statistics.median(warm_ms), unit=f"CPU-ms, {path}", better="lower"),
        Row(figure="prefix_reuse_ratio", value=ratio, unit=f"times faster, {path}", better="higher"),
    ]


def lag_rows(bench: Bench) -> list[Row]:
    """How late the loop is while 16 users are served, beside the same loop idle."""
    idle_ms, busy_ms = list[float](), list[float]()
    for turn in range(2):
        for kept, count in ((idle_ms, 0), (busy_ms, SLOTS)):
            lags = lags_s(bench.main, bench.shape, count, bench.pace.lag_s, bench.seed * 10 + turn)
            kept += [lag * 1e3 for lag in lags]
    return [
        Row(
            figure=f"loop_lag_{name}_ms",
            value=quantile(busy_ms, share),
            unit=f"ms, {bench.main.path}",
            better="lower",
            rival="idle loop",
            rival_value=quantile(idle_ms, share),
        )
        for name, share in (("p50", 0.5), ("p99", 0.99))
    ]


PARTS: Final[dict[str, Callable[[Bench], list[Row]]]] = {
    "batch": batch_rows,
    "served": served_rows,
    "users": users_rows,
    "prefix": prefix_rows,
    "lag": lag_rows,
}
