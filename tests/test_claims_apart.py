"""Peers' claims of their own state are kept apart: no trust, vote, weight or memory can read them; lies change none.

What may import them, and what may reach them by attribute, is listed here whole; a new reader has to be argued for.
"""

from __future__ import annotations

import ast
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from crypto.identity import Identity, PeerId
from gossip.service import GossipService
from gossip.summaries import SUMMARY_EVERY_S, SelfSummary
from tests.gossip_swarm import config
from tests.round_world import NETWORK, World
from tests.simulator_summaries import LIE
from tests.test_house import ROOT, imports, name_of, sources, tree_of

CLAIMS = frozenset({"gossip.summaries", "gossip.claims", "gossip.claims_hearing", "gossip.self_topic"})
MAY_IMPORT = {
    "gossip/claims.py",
    "gossip/claims_hearing.py",
    "gossip/self_topic.py",
    "gossip/service.py",  # the loop that owns them, and hands `hint` to routing
    "node/self_summary.py",  # what is said of ourselves
    "node/run.py",  # the topic's name, for the host's allow-list
}
MAY_REACH = {
    "gossip/service.py",
    "node/state.py",  # GET /api/v1/peers: shown as claims
}
ROUNDS, WORK_S = 4, SUMMARY_EVERY_S / 2  # everybody has told its lies by the second one
# whatever says who is trusted, who votes, what is merged and with which weight
JUDGES = (
    *(f"gossip/{name}.py" for name in ("standing", "observations", "breaker", "directory", "hearing", "routing")),
    *(f"gossip/{name}.py" for name in ("electors", "ballots", "agreement", "averaging", "gathering", "donors")),
    *sorted(name_of(path) for path in (ROOT / "gossip").glob("round*.py")),
    *sorted(name_of(path) for path in (ROOT / "model").glob("*.py")),
)


def reached(name: str) -> set[str]:
    """All modules of ours that a file imports, and those that these import, and so on."""
    found, left = set[str](), [name]
    while left:
        for module in imports(tree_of(ROOT / left.pop())):
            path = ROOT / (module.replace(".", "/") + ".py")
            if module not in found and path.exists():
                found.add(module)
                left.append(name_of(path))
    return found


@pytest.mark.parametrize("name", JUDGES)
def test_nobody_who_judges_can_read_a_claim(name: str) -> None:
    assert reached(name) & CLAIMS == set()


def test_the_search_finds_what_is_there() -> None:
    assert reached("gossip/service.py") >= CLAIMS
    assert {"gossip/electors.py", "gossip/rounds.py", "gossip/round_history.py", "model/merge.py"} <= set(JUDGES)


def test_who_imports_claims_is_known() -> None:
    found = {
        name_of(path)
        for path in sources("crypto", "p2p", "model", "gossip", "node")
        if CLAIMS & {*imports(tree_of(path))}
    }
    assert found == MAY_IMPORT


def test_who_reaches_claims_by_attribute_is_known() -> None:
    found = {
        name_of(path)
        for path in sources("gossip", "node")
        for item in ast.walk(tree_of(path))
        if isinstance(item, ast.Attribute) and item.attr == "self_topic"
    }
    assert found == MAY_REACH


# --- a round of training among liars ---


@dataclass
class Done:
    """What a run came to: who counted with which weight, who voted, and the weights after each round."""

    shares: list[list[tuple[object, ...]]]
    voters: tuple[PeerId, ...]
    states: dict[int, bytes]
    claims: int


async def rounds(path: Path, lies: tuple[SelfSummary, ...]) -> Done:
    """Four founders train for some rounds; all the while each tells these of itself, one after the other."""
    async with trio.open_nursery() as nursery:
        world = World(path, nursery)
        world.identities = [Identity(bytes([number, 9]) * 16) for number in range(8)]
        services = list[GossipService]()
        for number in range(4):
            member = await world.start(number, work_s=WORK_S)
            changes = config(network=NETWORK, instance=f"{number:08x}", wall_clock_ms=world.now_ms)
            service = GossipService(member.transport, world.identities[number], changes, random.Random(number))
            await nursery.start(service.run)
            services.append(service)

        async def lie() -> None:
            while True:
                for each in lies:
                    for service in services:
                        service.offer_summary(each)
                    await trio.sleep(1)

        if lies:
            nursery.start_soon(lie)
        await world.until(ROUNDS, within_s=400.0)
        world.agree()
        first = world.members[0]
        done = Done(
            shares=[
                [(each.peer, each.blob, each.weight, each.clip, each.leaves) for each in manifest.shares]
                for manifest in first.manifests[:ROUNDS]
            ],
            voters=first.history.chain.electors.voters,
            states={number: weights for number, weights in first.owner.states.items() if number <= ROUNDS},
            claims=sum(len(service.self_topic.claims) for service in services),
        )
        nursery.cancel_scope.cancel()
    return done


@pytest.mark.slow
async def test_lies_change_no_vote_and_no_weight(tmp_path: Path, autojump_clock: MockClock) -> None:
    plain = await rounds(tmp_path / "plain", ())
    lied = await rounds(tmp_path / "lied", (LIE, SelfSummary(busy=1.0, calibration_error=1.0, latency_skill=-100.0)))
    assert (plain.claims, lied.claims) == (0, 12), "each heard the three others"
    assert lied.voters == plain.voters
    assert lied.shares == plain.shares
    assert [len(each) for each in plain.shares] == [4] * ROUNDS, "each counts in each round"
    assert lied.states == plain.states
