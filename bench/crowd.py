"""`python -m bench.crowd`: what gossip costs a node in simulated networks of 50, 1,000 and 3,000 peers, or of more.

Rules: the simulator (tests/simulator.py) runs the node's own cores. Bytes and events are counted once the network has
settled, that is in the second half of the time; requests in the whole of it. One in a hundred peers serves a model
that nobody else serves, and a third of the requests ask for one of these by name.
`--quick`: 50 and 300 peers, two minutes of their time. `--peers N --seconds S`: one size.
What it takes, on a busy core: 1,000 peers half a second for each second of theirs, and 1 GB. All join within N/100 s;
until each has learnt to speak less, some 30 s more, a second takes several times as much. 3,000 peers for 126 s took
524 s, three quarters of it before second 62, and 2.9 GB; 10,000 for 246 s took 55 minutes and 13 GB.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from bench.harness import Options, Row, report
from tests.simulator import WARM_UP_S, Crowd, Outcome, Scenario, crowd

SIZES: tuple[tuple[int, float], ...] = ((50, 600.0), (1_000, 240.0), (3_000, 120.0))
SIZES_QUICK: tuple[tuple[int, float], ...] = ((50, 120.0), (300, 120.0))
SEED = 1


def main() -> int:
    """Run each size, report; 0 when every request of each ended once and right."""
    arguments = _arguments()
    sizes = SIZES_QUICK if arguments.quick else SIZES
    if arguments.peers:
        sizes = ((arguments.peers, arguments.seconds),)
    rows = list[Row]()
    for peers, seconds in sizes:
        began = time.process_time()
        outcome, settled = crowd(SEED, scenario(peers, seconds))
        cpu_s = time.process_time() - began
        print(
            f"{peers} peers, {seconds + WARM_UP_S:.0f} s of their time in {cpu_s:.0f} s CPU: {outcome.ends}", flush=True
        )
        if outcome.wrong or outcome.unresolved:
            print(f"WRONG: {outcome.unresolved} unresolved; {'; '.join(outcome.wrong[:5])}", file=sys.stderr)
            return 1
        rows += _rows(peers, outcome, settled, cpu_s)
    name = f"crowd_{arguments.peers}" if arguments.peers else "crowd"
    report(name, rows, Options(quick=arguments.quick, json_path=arguments.json))
    return 0


def scenario(peers: int, seconds: float) -> Scenario:
    """A large network on an ordinary day: 2 % of the peers crash each minute."""
    return Scenario(
        peers=peers,
        seconds=seconds,
        serving=0.3,
        requests_per_peer_min=min(0.5, 600 / peers),
        churn_per_min=0.02,
        pauses_per_min=0.01,
        cancels=0.0,
        rare_models=max(1, peers // 100),
        rare_requests=1 / 3,
    )


def _rows(peers: int, outcome: Outcome, settled: Crowd, cpu_s: float) -> list[Row]:
    finished = outcome.ends.get("finished", 0)
    stayed = sum(outcome.ends.values()) - outcome.ends.get("door_died", 0)
    return [
        Row(figure=f"bytes_per_s_n{peers}", value=settled.bytes_per_peer_s, unit="B/s a node", better="lower"),
        Row(
            figure=f"bytes_per_s_max_n{peers}",
            value=settled.bytes_per_peer_s_max,
            unit="B/s, the busiest node",
            better="lower",
        ),
        Row(
            figure=f"summary_bytes_per_s_n{peers}",
            value=settled.summary_bytes_per_peer_s,
            unit="B/s a node, of these",
            better="lower",
        ),
        Row(figure=f"events_per_s_n{peers}", value=settled.events_per_peer_s, unit="a node", better="lower"),
        Row(figure=f"offers_known_n{peers}", value=settled.offers_known, unit="servers, mean", better="higher"),
        Row(
            figure=f"searches_n{peers}",
            value=outcome.searches,
            unit="for a model that nobody known served",
            better="lower",
        ),
        Row(figure=f"success_n{peers}", value=finished / max(1, stayed), unit="of requests", better="higher"),
        Row(figure=f"cpu_s_n{peers}", value=cpu_s, unit="s of the simulator", better="lower"),
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="50 and 300 peers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--peers", type=int, help="one size only")
    parser.add_argument("--seconds", type=float, default=3600.0, help="of their time, for --peers")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
