"""`python -m bench.idle`: what a node costs while it waits: time to ready, memory, CPU; with and without a model.

Rules: beside each start stands a bare process that only imports the same libraries (transformers with the class of the
default model: its other parts load lazily), started in the same minute.
CPU is user and system time of the process over the wall time, with peers connected and gossip running.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from bench.harness import Row, options, report
from node.commands.processes import Cluster, NodeProcess

IMPORTS = {
    "default": "import torch, transformers, libp2p; from transformers import LlamaForCausalLM",
    "none": "import libp2p",
}
PEERS = 8
MIB = 1 << 20


def main() -> None:
    """Measure and report."""
    chosen = options(__doc__)
    repeats, watch_s = (1, 10.0) if chosen.quick else (3, 60.0)
    rows: list[Row] = []
    for model in ("default", "none"):
        bare = [bare_import(IMPORTS[model]) for _ in range(repeats)]
        with tempfile.TemporaryDirectory() as place, Cluster(Path(place)) as cluster:
            ours = [start(cluster, f"n{number}", model) for number in range(repeats)]
        suffix = "" if model == "default" else "_no_model"
        bare_s, bare_mb = (statistics.median(column) for column in zip(*bare, strict=True))
        ready_s, rss_mb = (statistics.median(column) for column in zip(*ours, strict=True))
        rival = "importing the libraries alone"
        rows.append(
            Row(figure=f"ready_s{suffix}", value=ready_s, unit="s", better="lower", rival=rival, rival_value=bare_s)
        )
        rows.append(
            Row(figure=f"rss_mb{suffix}", value=rss_mb, unit="MiB", better="lower", rival=rival, rival_value=bare_mb)
        )
    rows.append(Row(figure="cpu_percent", value=idle_percent(watch_s, chosen.quick), unit="%", better="lower"))
    report("idle", rows, chosen)


def bare_import(statement: str) -> tuple[float, float]:
    """Seconds and MiB of a process that only imports."""
    code = f"{statement}\nimport psutil, sys\nprint(psutil.Process().memory_info().rss, flush=True)\nsys.stdin.read()"
    began = time.monotonic()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE) as process:
        assert process.stdout is not None
        rss = int(process.stdout.readline())
        took_s = time.monotonic() - began
        process.communicate()
    return took_s, rss / MIB


def start(cluster: Cluster, name: str, model: str) -> tuple[float, float]:
    """Seconds from start to the ready file, and MiB then; the node is stopped again."""
    began = time.monotonic()
    node = cluster.start(name, "--model", model).wait_ready()
    took_s = time.monotonic() - began
    rss_mb = rss(node)
    node.stop()
    return took_s, rss_mb


def rss(node: NodeProcess) -> float:
    """Resident MiB of a node."""
    return float(psutil.Process(node.process.pid).memory_info().rss / MIB)


def idle_percent(watch_s: float, quick: bool) -> float:
    """CPU percent of a node with the default model and PEERS peers, while nobody asks anything."""
    peers = 3 if quick else PEERS
    with tempfile.TemporaryDirectory() as place, Cluster(Path(place)) as cluster:
        address = cluster.reserve("server")
        server = cluster.start("server")
        others = [cluster.start(f"p{n}", "--model", "none", join=[address]) for n in range(peers)]
        for node in (server, *others):
            node.wait_ready()
        time.sleep(5.0)  # until the last one has joined and been told of
        process = psutil.Process(server.process.pid)
        before = process.cpu_times()
        time.sleep(watch_s)
        after = process.cpu_times()
        return 100 * (after.user + after.system - before.user - before.system) / watch_s


if __name__ == "__main__":
    main()
