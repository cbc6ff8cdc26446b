"""Floods at a real node, from a process of their own, with honest peers beside them (bench/flood.py, flood_end.py).

The short forms run by default; the full ones, whose figures SECURITY.md names, behind `soak`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from bench.flood import Outcome, attacked
from node.commands.processes import Cluster, NodeProcess

pytestmark = [pytest.mark.real, pytest.mark.slow]
SHORT_S, FULL_S = 6.0, 60.0
LENGTHS = [SHORT_S, pytest.param(FULL_S, marks=pytest.mark.soak)]
CUT_S_MAX = 3.0
HONEST_S_MAX = 1.0
JOIN_S_MAX = 2.0
LOADED = 3.0  # wall times on a machine that others use too; the figures are bench.flood's to report


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[tuple[NodeProcess, str]]:
    with Cluster(tmp_path) as cluster:
        yield cluster.start("victim", "--model", "none").wait_ready(), cluster.network


def counted(node: NodeProcess) -> dict[str, int]:
    """What /metrics says, by reason."""
    text = httpx.get(f"{node.url}/metrics", timeout=30).text
    rows = [line.split('reason="')[1].split('"} ') for line in text.splitlines() if line.startswith("openagi_drops")]
    return {reason: int(count) for reason, count in rows}


def show(name: str, outcome: Outcome) -> None:
    print(
        f"{name}: {len(outcome.delays_s)} honest messages, median {statistics.median(outcome.delays_s) * 1000:.0f} ms,"
        f" worst {max(outcome.delays_s) * 1000:.0f} ms, {outcome.lost} lost; joins worst {max(outcome.joins_s):.2f} s"
        f" of {len(outcome.joins_s)}; grown {outcome.grown_mib:.1f} MiB; attacker: {outcome.told}"
    )


@pytest.mark.parametrize("seconds", LENGTHS)
async def test_ten_thousand_valid_messages_a_second(victim: tuple[NodeProcess, str], seconds: float) -> None:
    node, network = victim
    outcome = await attacked(node, network, seconds, "gossip", network, "10000")
    show("flood", outcome)
    assert outcome.told["first_cut_s"] < CUT_S_MAX * LOADED
    assert statistics.quantiles(outcome.delays_s, n=100, method="inclusive")[98] < HONEST_S_MAX * LOADED
    assert outcome.lost <= 1
    assert outcome.grown_mib < 64
    drops = counted(node)
    assert drops["over_quota"] or drops["gossip_over_quota"]


@pytest.mark.parametrize("seconds", LENGTHS)
async def test_two_thousand_idle_sockets_of_fifty_addresses(victim: tuple[NodeProcess, str], seconds: float) -> None:
    node, network = victim
    outcome = await attacked(node, network, seconds, "idle", "2000", "127.0.9", "50")
    show("idle sockets", outcome)
    assert outcome.told["opened"] >= (2000 if seconds == FULL_S else 200)  # a busy machine opens fewer in a short time
    assert statistics.median(outcome.joins_s) < JOIN_S_MAX * LOADED
    assert max(outcome.joins_s) < JOIN_S_MAX * LOADED
    assert max(outcome.delays_s) < HONEST_S_MAX * LOADED
    assert outcome.grown_mib < 32
    drops = counted(node)
    assert drops["pending_yielded"] > 50


@pytest.mark.parametrize("seconds", LENGTHS)
async def test_two_hundred_claims_of_a_gibibyte_before_the_handshake(
    victim: tuple[NodeProcess, str], seconds: float
) -> None:
    node, network = victim
    outcome = await attacked(node, network, seconds, "claims", "200")
    show("claims", outcome)
    assert outcome.grown_mib < 32
    assert max(outcome.joins_s) < JOIN_S_MAX * LOADED
    assert node.process.poll() is None
