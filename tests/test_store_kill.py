"""kill -9 at random instants of a process that writes its memory: it verifies, and holds all that was acknowledged.

The whole of it, a hundred kills: `python -m pytest tests/test_store_kill.py -m soak -s`, which prints the counts.
"""

from __future__ import annotations

import json
import random
import select
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from node.events import HOUR_MS, Pruned
from tests.store_kill_victim import RETENTION
from tests.store_world import World

ROOT = Path(__file__).parent.parent
INSTANT_S_MAX = 0.15  # after the first promise: some ten turns
START_S_MAX = 120.0  # a hang guard
SEED = 20261130

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="kill -9")]


def promises_until_killed(folder: Path, life: int, instant_s: float) -> list[list[str]]:
    """Run the victim, kill it so long after its first promise; the whole lines that it wrote."""
    command = [sys.executable, "-m", "tests.store_kill_victim", str(folder), str(life)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as victim:
        assert victim.stdout is not None
        try:
            ready, _, _ = select.select([victim.stdout], [], [], START_S_MAX)
            assert ready, "the victim said nothing"
            time.sleep(instant_s)
        finally:
            victim.kill()
        said, log = victim.communicate()
    assert victim.returncode == -9, log.decode()[-2000:]
    return [line.decode().split() for line in said.split(b"\n")[:-1]]


def kill(folder: Path, kills: int) -> dict[str, object]:
    """Kill one life after the other over one file; after each, the chain holds and everything promised is there."""
    rng, counts = random.Random(SEED), Counter[str]()
    world = World(folder, RETENTION)
    acknowledged = unpromised = 0
    forgotten: list[str] = []
    for life in range(kills):
        for promise in promises_until_killed(folder, life, rng.uniform(0.0, INSTANT_S_MAX)):
            counts[promise[0]] += 1
            if promise[0] == "A":
                assert int(promise[1]) > acknowledged, f"life {life}: an id came back"
                acknowledged = int(promise[2])
            elif promise[0] == "F":
                assert promise[2] == "1"
                forgotten.append(promise[1])
        world.now_ms += HOUR_MS
        store = world.open()
        raw = world.raw()
        told = store.statistics()
        assert told.set_aside == "", f"life {life}"
        fault = store.verify()
        assert fault is None, f"life {life}: {fault}"
        assert told.head_id >= acknowledged, f"life {life}: acknowledged {acknowledged}, the last is {told.head_id}"
        unpromised += told.head_id - acknowledged
        checkpoints = store.recent("pruned", 1)
        through_id = checkpoints[0].body.through_id if checkpoints and isinstance(checkpoints[0].body, Pruned) else 0
        store.close()
        ids = {event_id for (event_id,) in world.rows("SELECT id FROM events")}
        assert ids >= set(range(through_id + 1, acknowledged + 1)), "verify says so too"
        for subject in forgotten:
            assert f"secret{subject.lower()}".encode() not in raw, f"life {life}: {subject} was forgotten"
    return {"kills": kills, "seed": SEED, "promises": dict(counts), "acknowledged": acknowledged, "beyond": unpromised}


def test_a_kill_takes_back_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    assert kill(tmp_path, 10)["kills"] == 10


@pytest.mark.soak
def test_a_hundred_kills_take_back_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    print(json.dumps(kill(tmp_path, 100)))
