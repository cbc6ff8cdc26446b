"""`python -m bench.storm`: many real nodes started at once, joined by one bootstrap file; how soon each has its peers.

Rules: the nodes start from bytecode, as they do where Python may write it; `--model none`; gossip peers are those of
gossipsub's mesh, as each node's status tells them. The seconds count from before the first process is started. The
bars are the third issue's: 3 gossip peers in 60 s, kept 30 s more.
`--quick`: 12 nodes, kept 10 s.
"""

from __future__ import annotations

import argparse
import compileall
import json
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from bench.harness import Options, Row, quantile, report
from node.commands.processes import Cluster, NodeProcess

PACKAGES = ("crypto", "p2p", "gossip", "node")
NODES, NODES_QUICK = 32, 12
GOSSIP_PEERS = 3
JOIN_S_MAX = 60.0
WAIT_S_MAX = 240.0  # how long the bench goes on looking, so that a miss has a figure too
KEEP_S, KEEP_S_QUICK = 30.0, 10.0
LOOK_EVERY_S = 1.0  # each look costs every node a request


@dataclass(slots=True, kw_only=True)
class Joined:
    """What was seen of all nodes. Seconds since before the first start."""

    ready_s: dict[str, float] = field(default_factory=dict)
    joined_s: dict[str, float] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)  # below GOSSIP_PEERS after they had them
    peers: dict[str, int] = field(default_factory=dict)  # connections, at the end
    mesh: dict[str, int] = field(default_factory=dict)


def main() -> int:
    """Start, watch, report; 0 when every node had its peers in time and kept them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{NODES_QUICK} nodes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--nodes", type=int, default=0, help=f"how many (default {NODES})")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all processes are ended
    root = Path(__file__).parent.parent
    for package in PACKAGES:
        compileall.compile_dir(root / package, quiet=1)
    count = chosen.nodes or (NODES_QUICK if chosen.quick else NODES)
    with tempfile.TemporaryDirectory(prefix="openagi-storm-") as place, Cluster(Path(place)) as cluster:
        began = time.monotonic()
        nodes = start(cluster, count)
        seen = watch(nodes, began, KEEP_S_QUICK if chosen.quick else KEEP_S)
        cpu_s = sum(cpu(node) for node in nodes)
    report("storm", rows(seen, count, cpu_s), Options(quick=chosen.quick, json_path=chosen.json))
    missing = [node.name for node in nodes if seen.joined_s.get(node.name, WAIT_S_MAX) > JOIN_S_MAX]
    if missing or seen.lost:
        print(f"not {GOSSIP_PEERS} gossip peers in {JOIN_S_MAX:.0f} s: {missing}; lost again: {seen.lost or 'none'}")
    return 1 if missing or seen.lost else 0


def start(cluster: Cluster, count: int) -> list[NodeProcess]:
    """All at once; the first one's address is in everybody's bootstrap file."""
    address = cluster.reserve("n0")
    file = cluster.root / "bootstrap_peers.json"
    file.write_text(json.dumps([{"addr": address, "note": "the first of the storm"}]))
    flags = ("--model", "none", "--bootstrap-file", str(file))
    return [cluster.start(f"n{number}", *flags) for number in range(count)]


def watch(nodes: list[NodeProcess], began: float, keep_s: float) -> Joined:
    """Look until all have their peers, and keep_s longer."""
    seen = Joined()
    keep_until = None
    with httpx.Client(trust_env=False, timeout=30.0) as client, ThreadPoolExecutor(len(nodes)) as threads:
        while (now_s := time.monotonic() - began) < (WAIT_S_MAX if keep_until is None else keep_until):
            list(threads.map(lambda node: look(client, node, seen, began), nodes))  # a busy node answers late
            if keep_until is None and len(seen.joined_s) == len(nodes):
                keep_until = now_s + keep_s
            time.sleep(LOOK_EVERY_S)
    return seen


def look(client: httpx.Client, node: NodeProcess, seen: Joined, began: float) -> None:
    """Ask one node, once it is ready, for its mesh."""
    if not node.ready:
        if not (node.root / f"{node.name}.ready").exists():
            return
        node.wait_ready()
        seen.ready_s[node.name] = time.monotonic() - began
    transport = client.get(f"{node.url}/api/v1/status").json()["transport"]
    seen.peers[node.name], seen.mesh[node.name] = transport["peers"], transport["mesh_peers"]
    if seen.mesh[node.name] >= GOSSIP_PEERS:
        seen.joined_s.setdefault(node.name, time.monotonic() - began)
    elif node.name in seen.joined_s:
        if node.name not in seen.lost:
            print(f"{node.name} fell to {seen.mesh[node.name]} {time.monotonic() - began:.0f} s after the first start")
        seen.lost.add(node.name)


def cpu(node: NodeProcess) -> float:
    """User and system seconds of a node so far."""
    times = psutil.Process(node.process.pid).cpu_times()
    return float(times.user + times.system)


def rows(seen: Joined, count: int, cpu_s: float) -> list[Row]:
    """The figures."""
    joined = [seen.joined_s.get(f"n{number}", WAIT_S_MAX) for number in range(count)]
    return [
        Row(figure="nodes", value=count, unit="processes", better="higher"),
        Row(figure="joined", value=len(seen.joined_s), unit=f"with {GOSSIP_PEERS} gossip peers", better="higher"),
        Row(figure="joined_s_p50", value=quantile(joined, 0.5), unit="s from the first start", better="lower"),
        Row(figure="joined_s_max", value=max(joined), unit="s from the first start", better="lower"),
        Row(
            figure="ready_s_max",
            value=max(seen.ready_s.values(), default=WAIT_S_MAX),
            unit="s from the first start",
            better="lower",
        ),
        Row(figure="lost_again", value=len(seen.lost), unit="nodes", better="lower"),
        Row(figure="mesh_peers_min", value=min(seen.mesh.values(), default=0), unit="at the end", better="higher"),
        Row(
            figure="connections_max",
            value=max(seen.peers.values(), default=0),
            unit="of one node at the end",
            better="lower",
        ),
        Row(figure="cpu_s_per_node", value=cpu_s / count, unit="s to join and to be watched", better="lower"),
    ]


if __name__ == "__main__":
    sys.exit(main())
