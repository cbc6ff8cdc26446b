"""`python -m bench.poison`: what bad members do to a run's held-out loss, and whom the gate refuses.

Rules: ten members with books of their own, two of them bad; a byte model of 67,000 parameters, so that a round with all
its scores takes two CPU seconds; one start, rows and rounds for every attack. Runs begin where the model is about to
learn most: before that a byte model stays for long at the frequencies of letters, whatever anybody does. Each attack of
TRAINING.md 4 on dense payloads with the rule that a run has by default, most on ef64.2b and some on ef256.2b. `late`
runs begin with a model that has nearly learned what it can: there honest deltas gain little or nothing, and whoever is
refused for that is refused wrongly. `undefended` is a plain mean without any gate, to see that the attack is one.
The bar: a loss of at most RATIO_MAX times the clean run's. Losses of two runs differ by 0.02 by chance.
`--quick`: five members, one bad, three rounds, some of the attacks.
Source: TRAINING.md 4; MEASURE.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from rich.table import Table

from bench.attacks import ATTACKS, CLEAN
from bench.harness import Options, Row, report
from bench.learning import INNER, SEED, TEXT, Scale, Shards, Together, byte_model, shards_of, steps
from bench.poison_run import UNDEFENDED, Case, Family, PoisonedRun, Result, play
from model.config import TrainConfig
from model.corpus import read_text
from model.rules import Rule
from model.train import Trainer

RATIO_MAX: Final = 1.05
DENSE = Family(name="dense", codec="int4", rule=Rule.ADAPTIVE, outer_rate=1.0)
SPARSE_64 = Family(name="sparse64", codec="ef64.2b", rule=Rule.ADAPTIVE, outer_rate=1.0)
SPARSE_256 = Family(name="sparse256", codec="ef256.2b", rule=Rule.MEAN_NONZERO, outer_rate=0.5)
FAMILIES = (DENSE, SPARSE_64, SPARSE_256)
PLAYED = {
    DENSE.name: frozenset(attack.name for attack in ATTACKS),
    SPARSE_64.name: frozenset(attack.name for attack in ATTACKS) - {"replay", "stale_base", "equivocation", "sybils"},
    SPARSE_256.name: frozenset({"sign_flip_x1", "label_flip", "copy"}),
}
LATE = frozenset({"sign_flip_x1", "noise"})  # of the dense family
QUICK = frozenset({"sign_flip_x1", "sign_flip_x10", "not_finite", "copy"})
YOUNG_STEPS = 80  # of all workers together: the model knows how often each letter is, and is about to learn most
LATE_STEPS = 600  # then rounds gain thousandths of a nat


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """How long runs are, and how many of their members are bad."""

    scale: Scale
    bad: int
    rounds: int
    late_rounds: int
    micro_steps: int = 10


def cases(quick: bool) -> Iterator[Case]:
    """Every run, the clean one of a group before the others."""
    for family in FAMILIES[:2] if quick else FAMILIES:
        yield Case(family=family, attack=CLEAN)
        for attack in ATTACKS:
            if attack.name in (QUICK if quick else PLAYED[family.name]):
                yield Case(family=family, attack=attack)
            if attack.name == "sign_flip_x10" and family is DENSE and not quick:
                yield Case(family=replace(family, rule=Rule.MEAN), attack=attack, is_gated=False)
    for family in () if quick else FAMILIES:
        yield Case(family=family, attack=CLEAN, is_late=True)
        for attack in ATTACKS if family is DENSE else ():
            if attack.name in LATE:
                yield Case(family=family, attack=attack, is_late=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Starts:
    """The weights that runs begin with: vectors_N."""

    young: torch.Tensor
    late: torch.Tensor | None


def starts(shards: Shards, scale: Scale, *, with_late: bool) -> Starts:
    """The weights after YOUNG_STEPS, and LATE_STEPS, on everybody's rows."""
    config = TrainConfig(seed=SEED, accumulation=scale.workers, **INNER)  # type: ignore[arg-type]  # fits
    trainer = Trainer(byte_model(scale), Together(shards.workers), config)
    steps(trainer, YOUNG_STEPS * scale.workers)
    young_N = trainer.layout.flatten(trainer.named)
    if not with_late:
        return Starts(young=young_N, late=None)
    steps(trainer, (LATE_STEPS - YOUNG_STEPS) * scale.workers)
    return Starts(young=young_N, late=trainer.layout.flatten(trainer.named))


def played(case: Case, shards: Shards, length: Length, begin: Starts | None) -> Result:
    """One run from its start to its end; begin None: from weights that know nothing."""
    run = PoisonedRun(
        case,
        shards,
        length.scale,
        bad=0 if case.attack is CLEAN else length.bad,
        start_N=None if begin is None else begin.late if case.is_late else begin.young,
    )
    rounds = length.late_rounds if case.is_late else length.rounds
    return play(run, shards, rounds=rounds, micro_steps=length.micro_steps)


def rows_of(results: Sequence[tuple[Case, Result]]) -> list[Row]:
    """Of each attack the worst ratio and how many of its payloads were refused; of each group the clean run's loss, and
    how many honest payloads were refused in all of its runs."""
    clean = {case.group: result.loss for case, result in results if case.attack is CLEAN}
    ratios = dict[str, float]()
    bad, honest = dict[str, Counter[str]](), dict[str, Counter[str]]()
    for case, result in results:
        tally = result.tally
        if case.attack is not CLEAN:
            ratios[case.name] = max(ratios.get(case.name, 0.0), result.loss / clean[case.group])
            bad.setdefault(case.name, Counter()).update(sent=tally.bad, refused=tally.refused_bad.total())
        honest.setdefault(case.group, Counter()).update(sent=tally.honest, refused=tally.refused_honest.total())
    rows = list[Row]()
    for name, ratio in ratios.items():
        rows.append(Row(figure=f"{name}_loss_ratio", value=ratio, unit="x clean, the worst run", better="lower"))
        if not name.startswith(UNDEFENDED):
            rows.append(Row(figure=f"{name}_refused", value=_share(bad[name]), unit="of its payloads", better="higher"))
    for group, loss in clean.items():
        rows.append(Row(figure=f"{group}_clean_loss", value=loss, unit="nats a byte, held out", better="lower"))
        rows.append(
            Row(figure=f"{group}_honest_refused", value=_share(honest[group]), unit="of all runs'", better="lower")
        )
    return rows


def show(results: Sequence[tuple[Case, Result]]) -> None:
    """Print what became of each run."""
    clean = {case.group: result.loss for case, result in results if case.attack is CLEAN}
    table = Table(title=f"poisoned runs; the bar is {RATIO_MAX}")
    for column in ("group", "attack", "loss", "to clean", "bad refused", "honest refused", "rules", "CPU s"):
        table.add_column(column, justify="right" if column in ("loss", "to clean", "CPU s") else "left")
    for case, result in results:
        tally = result.tally
        table.add_row(
            case.group,
            case.name,
            f"{result.loss:.3f}",
            f"{result.loss / clean[case.group]:.3f}",
            _counts(tally.refused_bad, tally.bad),
            _counts(tally.refused_honest, tally.honest),
            ", ".join(f"{rule} {count}" for rule, count in tally.rules.most_common()),
            f"{result.cpu_s:.0f}",
        )
    Console(width=160).print(table)


def main() -> int:
    """Run every case; 1 when one misses the bar."""
    chosen = _arguments()
    if not chosen.text.is_file():
        print(f"there is no text at {chosen.text}; give one: python -m bench.poison --text FILE", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    members = 5 if chosen.quick else 10
    scale = Scale(workers=members, rows=2, context=64, width=64, layers=1)
    length = Length(scale=scale, bad=members // 5, rounds=3 if chosen.quick else 9, late_rounds=10)
    shards = shards_of(read_text(chosen.text), scale)
    begin = starts(shards, scale, with_late=not chosen.quick)
    results = list[tuple[Case, Result]]()
    for case in cases(chosen.quick):
        result = played(case, shards, length, begin)
        results.append((case, result))
        refused = _counts(result.tally.refused_bad, result.tally.bad)
        print(f"{case.group} {case.name}: {result.loss:.3f} nats, {result.cpu_s:.0f} s CPU; {refused}", flush=True)
    show(results)
    print(f"{time.process_time():.0f} s CPU in all")
    rows = rows_of(results)
    report("poison", rows, Options(quick=chosen.quick, json_path=chosen.json))
    missed = [
        row.figure
        for row in rows
        if row.figure.endswith("_loss_ratio") and not row.figure.startswith(UNDEFENDED) and row.value > RATIO_MAX
    ]
    for figure in missed:
        print(f"{figure} is over the bar of {RATIO_MAX}", file=sys.stderr)
    return 1 if missed else 0


def _share(count: Counter[str]) -> float:
    return count["refused"] / max(1, count["sent"])


def _counts(refused: dict[str, int], sent: int) -> str:
    """Such as "20 of 20: score 19, copy 1"."""
    if not sent:
        return ""
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(refused.items(), key=lambda each: -each[1]))
    return f"{sum(refused.values())} of {sent}" + (f": {reasons}" if reasons else "")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer members, rounds and attacks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--text", type=Path, metavar="FILE", default=TEXT, help="UTF-8, plain or .xz, books by two "
                        "blank lines")  # fmt: skip
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
