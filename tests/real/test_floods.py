"""Floods at a real node, from a process of their own, with honest peers beside them (bench/flood.py, flood_end.py).

What must be so while each attack lasts; how long anything took is bench.flood's to report. PATIENCE_S only ends a test
in which nothing happens.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import trio

from bench.flood import MIB, Siege, besieged
from node.commands.processes import Cluster, NodeProcess

pytestmark = [pytest.mark.real, pytest.mark.slow]
PATIENCE_S = 120.0
LOOK_S = 0.2
MESSAGES = 5  # of the honest, heard under attack
JOINS = 3  # of new honest peers


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[tuple[NodeProcess, str]]:
    with Cluster(tmp_path) as cluster:
        yield cluster.start("victim", "--model", "none").wait_ready(), cluster.network


async def drops(node: NodeProcess) -> Counter[str]:
    """What /metrics counts as dropped, by reason."""
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        text = (await client.get(f"{node.url}/metrics")).text
    rows = [line.split('reason="')[1].split('"} ') for line in text.splitlines() if line.startswith("openagi_drops")]
    return Counter({reason: int(float(count)) for reason, count in rows})


async def until(what: str, is_so: Callable[[], bool]) -> None:
    with trio.move_on_after(PATIENCE_S):
        while not is_so():  # noqa: ASYNC110  # of other processes
            await trio.sleep(LOOK_S)
        return
    pytest.fail(f"within {PATIENCE_S:.0f} s it did not come about that {what}")


async def dropped(node: NodeProcess, least: int, *reasons: str) -> None:
    """Wait until so many things were dropped for one of these reasons."""
    with trio.move_on_after(PATIENCE_S):
        while True:
            counts = await drops(node)
            if max(counts[reason] for reason in reasons) >= least:
                return
            await trio.sleep(LOOK_S)
    pytest.fail(f"within {PATIENCE_S:.0f} s no {' or '.join(reasons)} was counted {least} times")


async def served_under_attack(siege: Siege) -> None:
    """From now on honest messages go through the victim, and new honest peers get in."""
    heard, joined = len(siege.pair.delays_s), len(siege.pair.joins_s)
    await until("honest messages come through", lambda: len(siege.pair.delays_s) >= heard + MESSAGES)
    await until("new peers get in", lambda: len(siege.pair.joins_s) >= joined + JOINS)
    assert siege.pair.refused == 0


async def nothing_is_lost(siege: Siege) -> None:
    """All that the honest one said arrives at the other."""
    await until("the last honest message comes", lambda: not siege.pair.lost)


async def test_ten_thousand_valid_messages_a_second(victim: tuple[NodeProcess, str]) -> None:
    node, network = victim
    async with besieged(node, 5 * PATIENCE_S, network, "gossip", network, "10000") as siege:
        await dropped(node, 1, "gossip_over_quota", "over_quota")
        await dropped(node, 1, "gossip_flood")  # a neighbour is cut off for it
        await served_under_attack(siege)
        await until("the log names a peer for it", lambda: "more gossip than a neighbour may" in node.log)
        told = await siege.end()
        await nothing_is_lost(siege)
    assert told["cuts"] > 0
    blamed = [line for line in node.log.splitlines() if "more gossip than a neighbour may" in line]
    assert {*re.findall(r"12D3KooW\w+", " ".join(blamed))} == {told["peer"]}
    assert siege.grown_bytes < 64 * MIB


async def test_two_thousand_idle_sockets_of_fifty_addresses(victim: tuple[NodeProcess, str]) -> None:
    node, network = victim
    async with besieged(node, 5 * PATIENCE_S, network, "idle", "2000", "127.0.9", "50") as siege:
        await dropped(node, 100, "pending_yielded")  # all places before the handshake are taken
        await served_under_attack(siege)
        told = await siege.end()
        await nothing_is_lost(siege)
    assert told["opened"] > 64
    assert siege.grown_bytes < 32 * MIB


async def test_two_hundred_claims_of_a_gibibyte_before_the_handshake(victim: tuple[NodeProcess, str]) -> None:
    node, network = victim
    async with besieged(node, 5 * PATIENCE_S, network, "claims", "200") as siege:
        await served_under_attack(siege)
        told = await siege.end()
        await nothing_is_lost(siege)
    assert told["taken_bytes"] > 0
    assert siege.grown_bytes < 32 * MIB
    assert node.process.poll() is None
