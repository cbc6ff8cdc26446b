"""`python -m bench.swarm`: many simulated nodes under churn, loss, cuts and liars; what became of every request.

Rules: the simulator (tests/simulator.py) runs the node's own cores; a seed is a history, and its hash says so. The
first seed that goes wrong is named with the command that replays it, and the exit code is 1.
`--quick`: 5 seeds. `--seed N --replay`: one seed, line by line. `--jobs N`: so many processes, the same figures.
The 1,000 seeds of `pytest -m soak tests/test_simulator.py` are `--seeds 1000 --seconds 20 --fetches-per-min 30`.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from functools import partial
from pathlib import Path

from bench.harness import Options, Row, quantile, report
from tests.simulator import Outcome, Scenario, replay_command, simulate

SEEDS, SEEDS_QUICK = 40, 5


def main() -> int:
    """Run the seeds, check, report; 0 when every request of every seed ended once and right."""
    arguments, scenario = _arguments()
    count = SEEDS_QUICK if arguments.quick else arguments.seeds
    seeds = range(arguments.first, arguments.first + count) if arguments.seed is None else [arguments.seed]
    outcomes = list[Outcome]()
    for outcome in _outcomes(seeds, partial(simulate, scenario=scenario, keep_lines=arguments.replay), arguments.jobs):
        outcomes.append(outcome)
        print(*outcome.lines, sep="\n", end="\n" if outcome.lines else "")
        print(f"seed {outcome.seed}: {outcome.accepted} accepted, {outcome.ends}, history {outcome.digest}", flush=True)
        if outcome.wrong or outcome.unresolved:
            print(f"WRONG: {outcome.unresolved} unresolved; {'; '.join(outcome.wrong[:5])}", file=sys.stderr)
            print(f"replay with: {replay_command(outcome.seed, scenario)}", file=sys.stderr)
            return 1
    report("swarm", rows(outcomes), Options(quick=arguments.quick, json_path=arguments.json))
    return 0


def _outcomes(seeds: Iterable[int], run: Callable[[int], Outcome], jobs: int) -> Iterator[Outcome]:
    """In the order of the seeds. The first that the caller does not want any more ends what has not begun."""
    if jobs == 1:
        yield from map(run, seeds)
        return
    pool = ProcessPoolExecutor(jobs)
    try:
        yield from pool.map(run, seeds)
    finally:
        pool.shutdown(cancel_futures=True)


def rows(outcomes: list[Outcome]) -> list[Row]:
    """The figures of MEASURE.md."""
    ends = [outcome.ends for outcome in outcomes]
    stayed = sum(sum(each.values()) - each.get("cancelled", 0) - each.get("door_died", 0) for each in ends)
    latencies_s = [latency for outcome in outcomes for latency in outcome.latencies_s]
    whole = hashlib.sha256("".join(outcome.digest for outcome in outcomes).encode()).hexdigest()[:16]
    print(f"history of all seeds: {whole}")
    return [
        Row(figure="accepted", value=sum(outcome.accepted for outcome in outcomes), unit="requests", better="higher"),
        Row(figure="unresolved", value=sum(each.unresolved for each in outcomes), unit="requests", better="lower"),
        Row(
            figure="success_ratio",
            value=sum(each.get("finished", 0) for each in ends) / max(1, stayed),
            unit="of those whose client and door stayed",
            better="higher",
        ),
        Row(figure="p95_s", value=quantile(latencies_s, 0.95), unit="s simulated", better="lower"),
        Row(figure="takeovers", value=sum(each.takeovers for each in outcomes), unit="answers", better="lower"),
        Row(
            figure="bytes_per_peer_s",
            value=sum(each.bytes_per_peer_s for each in outcomes) / len(outcomes),
            unit="B/s",
            better="lower",
        ),
    ]


def _arguments() -> tuple[argparse.Namespace, Scenario]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="five seeds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="this one only")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--replay", action="store_true", help="print what happened")
    for each in fields(Scenario):
        default = each.default
        if isinstance(default, int | float):
            parser.add_argument(f"--{each.name.replace('_', '-')}", type=type(default), default=default)
    arguments = parser.parse_args()
    chosen = {each.name: getattr(arguments, each.name) for each in fields(Scenario) if hasattr(arguments, each.name)}
    return arguments, Scenario(**chosen)


if __name__ == "__main__":
    sys.exit(main())
