"""A process that uses up sequences, hears adverts, bans peers and saves all of it as fast as it can, until killed.

Each line on stdout is a promise: what it says happened before it was written, so that a kill must not undo it.
`S n`: we spoke under sequence n. `F peer n`: an advert under n was believed, so no older one is ever again. `B peer`:
a ban is kept. `K n`: a book of n addresses is kept. Run by tests/test_kill.py: FOLDER, LIFE. Each life's clock is an
hour behind the one before.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

import trio
import trio.lowlevel

from crypto.identity import Identity, PeerId
from gossip.messages import Advert, Capacity, seal_advert
from gossip.saved import RESERVED
from gossip.service import GossipConfig, GossipService
from gossip.standing import Fault
from p2p.address import parse_address
from p2p.book import Book, Source
from p2p.bootstrap import BookFile
from p2p.loopback import LoopbackNetwork

OWN, OTHER = Identity(bytes(32)), Identity(bytes(range(32)))
BANNED_AFTER = 2  # turns of a life before it bans somebody: a ban lasts, and there is room for 4096


def say(word: str) -> None:
    os.write(1, f"{word}\n".encode())  # unbuffered, or a kill would unsay it


async def live(folder: Path, life: int) -> None:
    """Never returns."""
    rng = random.Random(life)

    def wall_clock_ms() -> int:
        return time.time_ns() // 1_000_000 - life * 3_600_000

    config = GossipConfig(
        network="main",
        instance=f"{life:032x}",
        agent="test",
        state_path=folder / "gossip.json",
        wall_clock_ms=wall_clock_ms,
    )
    book, file = Book(OWN.peer_id, rng), BookFile(folder / "addresses.json")
    file.load(book, 0.0)
    async with LoopbackNetwork(rng).join(OWN) as transport, trio.open_nursery() as nursery:
        gossip = GossipService(transport, OWN, config, rng)
        await nursery.start(gossip.run)
        floor = gossip.directory.floors().get(OTHER.peer_id, 0)
        turn = 0
        while True:
            turn += 1
            await gossip._publish()
            say(f"S {gossip._own.sequence}")
            floor += 1
            now_ms = wall_clock_ms()
            advert = Advert(instance="0" * 32, started_ms=now_ms, agent="x", addresses=(), capacity=Capacity())
            raw = seal_advert(OTHER, advert, network="main", sequence=floor, time_ms=now_ms)
            gossip._hearing.handed(OTHER.peer_id, raw, trio.current_time(), now_ms)  # a giver has no quota
            assert gossip.directory.floors()[OTHER.peer_id] == floor
            say(f"F {OTHER.peer_id} {floor}")
            banned = PeerId(f"banned-{life}")
            if turn == BANNED_AFTER:
                gossip.blame(banned, Fault.FATAL, "a test")
            state = gossip._state(RESERVED)
            assert gossip._keeper.save(state)
            if turn >= BANNED_AFTER:
                say(f"B {banned}")
            book.add(
                parse_address(f"/ip4/10.0.0.{1 + turn % 250}/tcp/{1 + life}/p2p/{OTHER.peer_id}"), Source.MDNS, 0.0
            )
            assert file.save(book.to_json(0.0, 0.0))
            say(f"K {book.statistics(0.0).addresses}")
            await trio.lowlevel.checkpoint()


if __name__ == "__main__":
    trio.run(live, Path(sys.argv[1]), int(sys.argv[2]))
