"""kill -9 of a node under load at many instants: the next start says what it was doing, and its memory is whole.

The whole of it, a hundred instants: `python -m pytest tests/real/test_memory_kill.py -m soak -s`.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from crypto.identity import Identity
from node.commands.processes import Cluster, NodeProcess
from node.config import KEY_FILE
from node.events import Inference, Kept, Start, Stop
from node.memory_events import doing, replayed
from node.self_recall import last_events
from node.store import Store
from tests.real.test_full_disk import DISK_KIB, disk, fill, serves
from tests.real.test_stop import ask_until

__all__ = ["DISK_KIB", "disk"]  # a fixture

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="signals")]
CLIENTS = 3
INSTANT_S_MAX = 1.5
EARLY_SHARE = 0.3  # of kills that come while the node starts
SEED = 20261130


def memory_of(root: Path) -> Store:
    """The memory of a node that has ended."""
    return Store(root / "memory.db", Identity.load_or_make(root / KEY_FILE))


def left_by(root: Path) -> tuple[str, list[Kept]]:
    """What the memory says that the node was doing when it was killed, and all starts and stops; it must be whole."""
    store = memory_of(root)
    try:
        statistics = store.statistics()
        assert (statistics.set_aside, statistics.degraded) == ("", "")
        assert store.verify() is None
        ends = [event for kind in ("start", "stop") for event in store.recent(kind, 1000)]
        return doing(replayed(last_events(store))), sorted(ends, key=lambda event: event.id)
    finally:
        store.close()


def kill_at_random_instants(cluster: Cluster, kills: int) -> tuple[list[str], int]:
    """Kill the node under load; (what each run was doing, how many requests the memory has in the end)."""
    rng, told, root = random.Random(SEED), list[str](), cluster.root / "n"
    node = cluster.start("n", "--max-batch", "4")
    for number in range(kills):
        if number and rng.random() < EARLY_SHARE:
            time.sleep(rng.uniform(0.0, 4.0))
            node.process.send_signal(signal.SIGKILL)
        else:
            kill_under_load(node, rng)
        node.process.wait()
        said, ends = left_by(root)
        told.append(said)
        stops = [event for event in ends if isinstance(event.body, Stop)]
        starts = [event.body for event in ends if isinstance(event.body, Start)]
        assert not stops
        assert [start.last_stop for start in starts] == ["first", *["kill"] * (len(starts) - 1)]
        assert [start.boot for start in starts] == list(range(1, len(starts) + 1))
        assert said.startswith(f"run {len(starts)}; default; "), said
        node = cluster.start("n", "--max-batch", "4")
    node.wait_ready()
    time.sleep(2)
    assert node.stop() == 0, node.log
    store = memory_of(root)
    (last,) = store.recent(None, 1)
    assert isinstance(last.body, Stop)
    assert last.body.reason == "SIGTERM"
    answered = sum(isinstance(event.body, Inference) for event in store.recent("inference", 1000))
    store.close()
    return told, answered


def kill_under_load(node: NodeProcess, rng: random.Random) -> None:
    node.wait_ready()
    done = threading.Event()
    with ThreadPoolExecutor(CLIENTS) as pool:
        for _ in range(CLIENTS):
            pool.submit(ask_until, done, node.url, rng.randrange(1 << 30))
        time.sleep(rng.uniform(0.2, INSTANT_S_MAX))
        node.process.send_signal(signal.SIGKILL)
        done.set()


def test_a_killed_node_says_what_it_was_doing_and_its_memory_verifies(cluster: Cluster) -> None:
    told, answered = kill_at_random_instants(cluster, 20)
    assert any("; running; " in sentence and "requests under way" in sentence for sentence in told)
    assert answered


@pytest.mark.soak
def test_a_node_killed_at_a_hundred_instants(cluster: Cluster) -> None:
    told, answered = kill_at_random_instants(cluster, 100)
    print(f"{answered} requests remembered; it was doing:", *sorted(told), sep="\n")


def test_a_full_disk_under_the_memory_stops_no_node(cluster: Cluster, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
    data = disk / "data"
    node = cluster.start("n", "--data-dir", str(data)).wait_ready()
    time.sleep(2)
    fill(disk)
    for _ in range(3):
        serves(node)
        time.sleep(1.2)
    assert "goes on without remembering" in node.log
    assert node.stop() == 0, node.log
