"""A member of a run is killed at any step, alone or with others, while others join, die or lie: all hold the same.

The whole of it, many seeds: `python -m pytest tests/test_round_kills.py -m soak -s`, which prints the counts.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.round_world import World
from tests.test_round_service import names, world

SEEDS_SOAK = int(os.environ.get("ROUNDS_SEEDS", "60"))
EVENTS = 12


@pytest.mark.slow
@pytest.mark.parametrize(("founders", "stride", "named_every"), [(1, 1, 1), (2, 3, 1), (1, 1, 3)])
async def test_a_kill_at_any_step_of_a_round_loses_nothing(
    tmp_path: Path, autojump_clock: MockClock, founders: int, stride: int, named_every: int
) -> None:
    """What was said is kept, the record is on the disk, the weights change: between any two of these, and within."""
    stood, point = Counter[tuple[int, int]](), 0  # records and weights that a kill left, beyond those of before
    while max(stood, default=(0, 0)) < (2, 0):
        async with world(tmp_path / str(point)) as run:
            run.named_every = named_every
            members = [await run.start(number, founders=founders) for number in range(founders)]
            await run.until(1)
            before = members[0].service.round
            members[0].disk.dies_after = point
            await members[0].ended.wait()
            stood[members[0].service.round - before, members[0].owner.round - before] += 1
            for member in members[1:]:
                await member.stop()
            states = [member.owner.states for member in members]
            members = [await run.start(number, founders=founders) for number in range(founders)]
            await run.until(before + 3)
            assert all(member.blames == [] for member in members)
            for member, kept in zip(members, states, strict=True):
                assert kept.items() <= member.owner.states.items(), "weights of before are others now"
            run.agree()
        point += stride
    assert stood.keys() >= ({(0, 0), (1, 0), (1, 1)} if stride == 1 else {(0, 0)}), stood


async def test_two_members_that_are_killed_at_once_come_back(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as run:
        members = [await run.start(number) for number in range(4)]
        await run.until(2)
        await trio.sleep(0.7)
        await members[2].stop()
        await members[3].stop()
        await trio.sleep(5)
        stood = max(member.owner.round for member in members)
        for number in (2, 3):
            members[number] = await run.start(number)
        await run.until(stood + 2)
        assert names(members[0], stood) >= {members[0].id, members[1].id}
        assert all(member.blames == [] for member in members)
        run.agree()


@pytest.mark.parametrize(("named_every", "rounds"), [(1, 2), (4, 6)])
async def test_all_members_that_are_killed_at_once_go_on(
    tmp_path: Path, autojump_clock: MockClock, named_every: int, rounds: int
) -> None:
    """Nobody is left who could give anything but what the disks hold: their payloads are there again."""
    async with world(tmp_path) as run:
        run.named_every = named_every
        members = [await run.start(number) for number in range(4)]
        await run.until(rounds)
        for member in members:
            member.disk.dies_before_change = True
        for member in members:
            await member.ended.wait()
        assert {member.service.round - member.owner.round for member in members} == {1}
        stood = max(member.service.round for member in members)
        members = [await run.start(number) for number in range(4)]
        await run.until(stood + 2)
        assert all(member.owner.adopted == [] and member.blames == [] for member in members)
        assert all((each.root is None) == bool(each.round % named_every) for each in members[0].manifests)
        run.agree()


@pytest.mark.slow
async def test_who_joins_while_members_die_becomes_a_voter(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as run:
        members = [await run.start(number) for number in range(4)]
        await run.until(3)
        late = await run.start(4)
        await members[3].stop()
        await run.until(members[0].owner.round + 4, *members[:3])
        await members[2].stop()
        await run.until(members[0].owner.round + 4, members[0], members[1], late, within_s=120)
        assert late.id in members[0].history.chain.electors.voters
        assert members[2].id not in members[0].history.chain.electors.voters
        assert all(member.blames == [] for member in run.members)
        run.agree()


@pytest.mark.slow
async def test_what_a_member_forgot_it_does_not_contradict(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Its disk has lost its words: it is silent until the others have ended the round, and then takes part again."""
    async with world(tmp_path) as run:
        members = [await run.start(number) for number in range(4)]
        await run.until(2)
        await trio.sleep(1.1)
        for attempt in range(3):
            state = tmp_path / members[3].id / "round.state"
            await members[3].stop()
            round_before = members[3].service.round
            state.write_bytes(state.read_bytes()[:-1] + b"?")
            members[3] = await run.start(3)
            assert members[3].service.statistics() is None or members[3].service.round >= round_before
            await run.until(round_before + 3)
            await trio.sleep(0.3 + 0.4 * attempt)
        assert all(member.blames == [] for member in members), "it was caught at a contradiction"
        assert members[3].id in names(members[0], members[0].service.round - 1)
        run.agree()


async def random_life(path: Path, seed: int, told: Counter[str]) -> None:
    """Kills, cuts, full disks and joiners in any order; in the end all who live go on together."""
    rng = random.Random(seed)
    async with trio.open_nursery() as nursery:
        run = World(path, nursery, seed)
        members = {number: await run.start(number) for number in range(4)}
        for _ in range(EVENTS):
            await trio.sleep(rng.uniform(0.05, 4.0))
            event = rng.choice(["kill", "kill", "cut", "heal", "full", "room", "join", "lose"])
            told[event] += 1
            number = rng.choice(sorted(members))
            match event:
                case "kill" | "lose":
                    await members[number].stop()
                    if event == "lose" and (log := path / members[number].id / "records.log").stat().st_size:
                        raw = log.read_bytes()
                        log.write_bytes(raw[: rng.randrange(len(raw))])
                    if rng.random() < 0.5:
                        await trio.sleep(rng.uniform(0, 5))
                    members[number] = await run.start(number)
                case "cut":
                    run.network.partition(members[number].id, members[rng.choice(sorted(members))].id)
                case "heal":
                    run.network.heal()
                    for member in members.values():
                        await run.connect(member)
                case "full" | "room":
                    members[number].disk.is_full = event == "full"
                case "join" if len(members) < 6:
                    members[len(members)] = await run.start(len(members))
        run.network.heal()
        for member in members.values():
            member.disk.is_full = False
            await run.connect(member)
        stood = max(member.service.round for member in members.values())
        await run.until(stood + 3, *members.values(), within_s=600)
        run.agree()
        told["rounds"] += stood
        told["accused"] += sum(member.history.counts["accused"] for member in run.members)
        assert not told["accused"], "somebody honest was caught at a contradiction"
        nursery.cancel_scope.cancel()


@pytest.mark.slow
async def test_whatever_befalls_honest_members_they_hold_the_same(tmp_path: Path, autojump_clock: MockClock) -> None:
    await random_life(tmp_path, int(os.environ.get("ROUNDS_SEED", "1")), Counter())


@pytest.mark.soak
async def test_whatever_befalls_honest_members_over_many_seeds(tmp_path: Path, autojump_clock: MockClock) -> None:
    told = Counter[str]()
    for seed in range(SEEDS_SOAK):
        print("SEED", seed, flush=True)
        await random_life(tmp_path / str(seed), seed, told)
    print(json.dumps({"seeds": SEEDS_SOAK, **told}))
