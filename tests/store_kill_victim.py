"""Writes a memory as fast as it can until it is killed: `python -m tests.store_kill_victim FOLDER LIFE`.

Each line on standard output is a promise: `A FIRST LAST` these ids were acknowledged; `F SUBJECT COUNT` this was
forgotten; `R COUNT` so many events were pruned.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from node.events import HOUR_MS
from node.retention import Retention, Term
from tests.store_world import World, inference, note, state

RETENTION = Retention(terms={**Retention().terms, "state": Term(age_ms=HOUR_MS, rows_max=200)})


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def main() -> None:
    folder, life = Path(sys.argv[1]), int(sys.argv[2])
    rng = random.Random(life)
    world = World(folder, RETENTION)
    world.now_ms += life * HOUR_MS
    store = world.open()
    assert store.statistics().set_aside == "", store.statistics().set_aside
    turn = 0
    while True:
        turn += 1
        subject = f"life{life}turn{turn}end"
        events = [state(ts_ms=world.now_ms) for _ in range(rng.randrange(1, 30))]
        events += [inference(world.now_ms, text=f"secret{subject}", subject=subject), note("kept", ts_ms=world.now_ms)]
        ids = store.append(events)
        assert len(ids) == len(events), store.statistics().degraded
        say("A", ids[0], ids[-1])
        if turn % 3 == 0:
            say("F", subject, store.forget(subject))
        if turn % 4 == 0:
            say("R", store.retain(world.now_ms))


if __name__ == "__main__":
    main()
