"""`python -m bench.poison`: what bad members do to a run's held-out loss, and whom the gate refuses.

Rules: ten members with books of their own, two of them bad; a byte model of 67,000 parameters, so that a round with all
its scores takes two CPU seconds; one start, rows and rounds for every attack. Each attack of TRAINING.md 4 on both
kinds of payload with the rule that a run has by default, and those that need no luck on ef256.2b as well. `late` runs
begin with a model that has nearly learned what it can: there honest deltas gain nothing on average, and whoever is
refused for that is refused wrongly. `undefended` is a plain mean without any gate, to see that the attack is one.
The bar: a loss of at most RATIO_MAX times the clean run's. Losses of two runs differ by 0.02 by chance.
`--quick`: five members, one bad, four rounds, some of the attacks.
Source: TRAINING.md 4; MEASURE.md.
"""

from __future__ import annotations

import argparse
import sys
import time
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
FEW = frozenset({"sign_flip_x1", "sign_flip_x10", "alie", "label_flip", "copy"})  # on the third family
LATE = frozenset({"sign_flip_x1", "noise"})  # of the dense family
QUICK = frozenset({"sign_flip_x1", "sign_flip_x10", "not_finite", "copy"})
LATE_STEPS = 1_000  # of all workers together: then rounds gain thousandths of a nat


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
            if attack.name in QUICK if quick else family is not SPARSE_256 or attack.name in FEW:
                yield Case(family=family, attack=attack)
            if attack.name == "sign_flip_x10" and family is DENSE and not quick:
                plain = replace(family, rule=Rule.MEAN)
                yield Case(family=plain, attack=attack, is_gated=False)
    for family in () if quick else FAMILIES:
        yield Case(family=family, attack=CLEAN, is_late=True)
        for attack in ATTACKS if family is DENSE else ():
            if attack.name in LATE:
                yield Case(family=family, attack=attack, is_late=True)


def late_start(shards: Shards, scale: Scale) -> torch.Tensor:
    """The weights, vector_N, after LATE_STEPS steps on everybody's rows."""
    config = TrainConfig(seed=SEED, accumulation=scale.workers, **INNER)  # type: ignore[arg-type]  # fits
    trainer = Trainer(byte_model(scale), Together(shards.workers), config)
    steps(trainer, LATE_STEPS * scale.workers)
    return trainer.layout.flatten(trainer.named)


def played(case: Case, shards: Shards, length: Length, late_N: torch.Tensor | None) -> Result:
    """One run from its start to its end."""
    run = PoisonedRun(
        case,
        shards,
        length.scale,
        bad=0 if case.attack is CLEAN else length.bad,
        start_N=late_N if case.is_late else None,
    )
    rounds = length.late_rounds if case.is_late else length.rounds
    return play(run, shards, rounds=rounds, micro_steps=length.micro_steps)


def rows_of(results: Sequence[tuple[Case, Result]]) -> list[Row]:
    """The worst ratio of each attack, and each run's loss and shares of refused payloads."""
    clean = {case.group: result.loss for case, result in results if case.attack is CLEAN}
    worst = dict[str, float]()
    rows = list[Row]()
    for case, result in results:
        name = f"{case.group}_{case.name}"
        is_clean = case.attack is CLEAN
        if not is_clean:
            worst[case.name] = max(worst.get(case.name, 0.0), result.loss / clean[case.group])
        rows.append(
            Row(
                figure=f"{name}_loss",
                value=result.loss,
                unit="nats a byte, held out",
                better="lower",
                rival=None if is_clean else "clean",
                rival_value=None if is_clean else clean[case.group],
            )
        )
        if not case.is_gated:
            continue
        tally = result.tally
        shares = [("honest", tally.refused_honest.total(), tally.honest, "lower")]
        if not is_clean:
            shares.append(("bad", tally.refused_bad.total(), tally.bad, "higher"))
        for who, refused, sent, better in shares:
            rows.append(
                Row(figure=f"{name}_refused_{who}", value=refused / max(1, sent), unit="of payloads", better=better)  # type: ignore[arg-type]  # one of two
            )
    return [
        *(
            Row(figure=f"{name}_loss_ratio", value=ratio, unit="x clean, worst family", better="lower")
            for name, ratio in worst.items()
        ),
        *rows,
    ]


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
    length = Length(scale=scale, bad=members // 5, rounds=4 if chosen.quick else 8, late_rounds=10)
    shards = shards_of(read_text(chosen.text), scale)
    late_N = None if chosen.quick else late_start(shards, scale)
    results = list[tuple[Case, Result]]()
    for case in cases(chosen.quick):
        result = played(case, shards, length, late_N)
        results.append((case, result))
        print(f"{case.group} {case.name}: {result.loss:.3f} nats, {result.cpu_s:.0f} s CPU", flush=True)
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
