"""`python -m bench.selfstate`: what the decisions that read the self-state change, each with and without.

Rules: three ablations. Admission (bench/selfstate_admission.py): who would miss its deadline is declined at once; over
the node's scheduler with a made machine, and over the embedded engine. Training (selfstate_training.py): none where the
expected load leaves no room. Routing (selfstate_routing.py): by peers' reliability, remembered over a restart, and not
observed at all. The rival of each figure is the same node without. `--part` runs some of them.
`--quick`: fewer seeds and waves, and no embedded engine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.harness import Options, Row, report

PARTS = ("routing", "admission", "admission_real", "training")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="at most two minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this; may be repeated")
    chosen = parser.parse_args()
    parts = chosen.part or [part for part in PARTS if not (chosen.quick and part == "admission_real")]
    rows = [row for part in parts for row in rows_of(part, quick=chosen.quick)]
    report("selfstate", rows, Options(quick=chosen.quick, json_path=chosen.json))


def rows_of(part: str, *, quick: bool) -> Iterator[Row]:
    """The figures of one ablation."""
    makers: dict[str, Callable[[bool], Iterator[Row]]] = {
        "routing": routing,
        "admission": admission,
        "admission_real": admission_real,
        "training": training,
    }
    return makers[part](quick)


def routing(quick: bool) -> Iterator[Row]:
    """In the simulator."""
    from bench import selfstate_routing

    return selfstate_routing.rows(1 if quick else 8)


def admission(quick: bool) -> Iterator[Row]:
    """On a clock that jumps."""
    from bench import selfstate_admission

    return selfstate_admission.rows("made", selfstate_admission.made, 2 if quick else 10, 60.0 if quick else 180.0)


def admission_real(quick: bool) -> Iterator[Row]:
    """The embedded engine, in real time."""
    from bench import selfstate_admission

    return selfstate_admission.rows("real", selfstate_admission.Real().run, 1 if quick else 3, 20.0 if quick else 40.0)


def training(quick: bool) -> Iterator[Row]:
    """Real engines and rounds, in real time."""
    from bench import selfstate_training

    return selfstate_training.rows(2 * selfstate_training.WAVE_S if quick else 96.0, 1 if quick else 2)


if __name__ == "__main__":
    main()
