"""kill -9 at random instants of a process that writes its state as fast as it can: what it promised still holds.

The whole of it, two hundred kills: `python -m pytest tests/test_kill.py -m soak -s`, which prints the counts.
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

from crypto.identity import Identity, PeerId
from gossip.saved import Keeper
from p2p.book import Book
from p2p.bootstrap import BookFile

ROOT = Path(__file__).parent.parent
INSTANT_S_MAX = 0.12  # after the first promise: some ten turns, so that a kill meets every place of one
START_S_MAX = 120.0  # a hang guard
SEED = 20261122

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="kill -9")]


def promises_until_killed(folder: Path, life: int, instant_s: float) -> list[list[str]]:
    """Run the victim, kill it so long after its first promise; the whole lines that it wrote."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.kill_victim", str(folder), str(life)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    ) as victim:
        assert victim.stdout is not None
        assert victim.stderr is not None
        try:
            ready, _, _ = select.select([victim.stdout], [], [], START_S_MAX)
            assert ready, "the victim said nothing"
            time.sleep(instant_s)
        finally:
            victim.kill()
        said, log = victim.communicate()
    assert victim.returncode == -9, log.decode()[-2000:]
    assert b"moved aside" not in log, log.decode()[-2000:]
    return [line.decode().split() for line in said.split(b"\n")[:-1]]


def kill(folder: Path, kills: int) -> dict[str, object]:
    """Kill one life after the other over one data directory; after each, everything ever promised is there."""
    rng, counts = random.Random(SEED), Counter[str]()
    used: set[int] = set()
    floors: Counter[str] = Counter()
    banned: set[str] = set()
    addresses = left_beside = 0
    for life in range(kills):
        for promise in promises_until_killed(folder, life, rng.uniform(0.0, INSTANT_S_MAX)):
            counts[promise[0]] += 1
            match promise:
                case ["S", sequence]:
                    assert int(sequence) > max(used, default=0), f"life {life}: a sequence came back"
                    used.add(int(sequence))
                case ["F", peer, floor]:
                    assert int(floor) > floors[peer], f"life {life}: a floor went back"
                    floors[peer] = int(floor)
                case ["B", peer]:
                    banned.add(peer)
                case ["K", count]:
                    addresses = int(count)
        left_beside += len(list(folder.glob(".*.tmp-*")))
        keeper, file = Keeper(folder / "gossip.json"), BookFile(folder / "addresses.json")
        state, book = keeper.load(), Book(Identity.make().peer_id, rng)
        file.load(book, 0.0)
        assert state.sequence >= max(used)
        assert all(state.floors[peer] >= floor for peer, floor in floors.items())
        assert {ban.peer for ban in state.bans} >= banned
        assert book.statistics(0.0).addresses >= min(addresses, 1)
        for status in (keeper.status(), file.status()):
            assert status is not None
            assert status.set_aside == ""
    assert floors[PeerId(next(iter(floors)))] > 0
    return {"kills": kills, "seed": SEED, "promises": dict(counts), "bans": len(banned), "left_beside": left_beside}


def test_a_kill_takes_back_nothing_that_was_promised(tmp_path: Path) -> None:
    told = kill(tmp_path, 20)
    assert told["kills"] == 20  # how many promises were made in that time is the machine's affair


@pytest.mark.soak
def test_two_hundred_kills_take_back_nothing_that_was_promised(tmp_path: Path) -> None:
    print(json.dumps(kill(tmp_path, 200)))
