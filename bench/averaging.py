"""`python -m bench.averaging`: a round of 25 million parameters between real processes, counted as hivemind's is.

Rules: 2 and 4 processes (bench/averaging_end.py) over libp2p and direct channels on loopback, each with the node's own
rounds, blobs, codecs, gate and merge; there is no model and no training: every round each has a new random change to
send, which is made beforehand and counts nowhere. CPU is that of a whole process from the start of the round, the work
being done, to the next round, the weights changed, signatures and the rule included, and on the disk in the rounds in
which a run of this size writes and names them (Plan.named_every): the mean over so many rounds that each such round has
its share, median over the processes. A round's seconds are the wall's, the median. group_forms_s: all have their work
ready and say so in the same moment; until the last of them knows that all have.
Replicas are compared by the digest of their weights. The rival is hivemind 1.1.12, which averages 25 million fp32
numbers: with `--hivemind PYTHON SCRIPT` (a Python of an environment that has it, and shared/bench/hivemind_avg.py) run
in the same minute, else as TRAINING.md 7 has it of another machine.
Source: MEASURE.md (averaging).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness import Options, Row, report
from node.training_plan import NAMED_EVERY_MAX

ELEMENTS = 25_500_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """hivemind's round between so many peers, fp32: CPU a peer, the wall's, and until its group has formed (5 s by its
    defaults; at once when it is told how many to wait for)."""

    cpu_s: float
    round_s: float
    group_s: float


HIVEMIND = {2: Rival(cpu_s=0.98, round_s=1.51, group_s=0.07), 4: Rival(cpu_s=1.53, round_s=4.12, group_s=0.23)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One group. name: as figures are named."""

    name: str
    processes: int
    codec: str
    rule: str


CASES = (
    Case(name="sparse_n4", processes=4, codec="ef64.2b", rule="adaptive"),
    Case(name="int4_n4", processes=4, codec="int4", rule="adaptive"),
    Case(name="dense_fp32_n2", processes=2, codec="fp32", rule="mean"),
    Case(name="dense_fp32_n4", processes=4, codec="fp32", rule="mean"),
)


def measure(case: Case, rounds: int, elements: int) -> list[dict[str, Any]]:
    """What each process says in the end. Raises RuntimeError when one failed."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "bench.averaging_end", folder, str(number), str(case.processes), case.codec,
                 case.rule, str(rounds), str(elements)],
                stdout=subprocess.PIPE,
            )
            for number in range(case.processes)
        ]  # fmt: skip
        told = []
        for process in processes:
            out, _ = process.communicate(timeout=900)
            if process.returncode:
                raise RuntimeError(f"a process of {case.name} ended with {process.returncode}")
            told.append(json.loads(out.decode().strip().splitlines()[-1]))
    return told


def hivemind(python: str, script: str, peers: int, elements: int) -> Rival:
    """Run it now. Raises CalledProcessError, TimeoutExpired, ValueError."""
    done = subprocess.run(
        [python, script, "--peers", str(peers), "--numel", str(elements), "--no-tcp"],
        capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    found = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    told = json.loads(found)["summary"]
    return Rival(cpu_s=told["cpu_s_per_peer"], round_s=told["allreduce_s"], group_s=told["matchmaking_s"])


def rows_of(case: Case, told: list[dict[str, Any]], rival: Rival | None, elements: int) -> list[Row]:
    """The figures of one group."""
    cpu_s = statistics.median(each["cpu_s"] for each in told)
    roots = {each["root"] for each in told}
    rows = [
        Row(figure=f"{case.name}_cpu_s", value=cpu_s, unit="CPU-s a peer a round", better="lower",
            rival="hivemind fp32", rival_value=None if rival is None else rival.cpu_s),
        Row(figure=f"{case.name}_s", value=statistics.median(each["round_s"] for each in told), unit="s a round",
            better="lower", rival="hivemind fp32", rival_value=None if rival is None else rival.round_s),
        Row(figure=f"{case.name}_bytes", value=told[0]["payload_bytes"], unit="B a peer a round", better="lower",
            rival="fp32", rival_value=4.0 * elements),
        Row(figure=f"{case.name}_replicas", value=len(roots), unit="different weights after the last round",
            better="lower"),
        Row(figure=f"{case.name}_rss_mb", value=max(each["rss_mb"] for each in told), unit="MB, the largest process",
            better="lower"),
    ]  # fmt: skip
    if case.name == "sparse_n4":
        rows.append(
            Row(figure="group_forms_s", value=max(each["group_s"] for each in told), unit="s", better="lower",
                rival="hivemind, told its size", rival_value=None if rival is None else rival.group_s)
        )  # fmt: skip
    return rows


def main() -> int:
    """Run every group, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two groups, a tenth of the parameters")
    parser.add_argument(
        "--hivemind", nargs=2, metavar=("PYTHON", "SCRIPT"), help="run the rival too, before each of our groups"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    chosen = parser.parse_args()
    cases = (CASES[0], CASES[2]) if chosen.quick else CASES
    rows = list[Row]()
    elements = ELEMENTS // 10 if chosen.quick else ELEMENTS
    for case in cases:
        rival = None if chosen.quick else HIVEMIND[case.processes]
        if chosen.hivemind:
            python, script = chosen.hivemind
            rival = hivemind(python, script, case.processes, elements)
            print(f"hivemind, {case.processes} peers: {rival}", flush=True)
        new = rows_of(case, measure(case, 2 if chosen.quick else NAMED_EVERY_MAX, elements), rival, elements)
        rows += new
        for row in new:
            print(f"{row.figure}: {row.value:.4g} {row.unit}", flush=True)
    report("averaging", rows, Options(quick=chosen.quick, json_path=chosen.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
