"""The cores of many nodes together, under weather, churn and liars: every request ends once, and right.

Rules: SOAK_SEEDS is `pytest -m soak tests/test_simulator.py`. Times are the simulator's own, so that a bar on them says
the same on every machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import gossip.transfer
from bench.harness import quantile
from node.judge import Judge
from node.pursuit import Pursuit
from tests.simulator import Crowd, Outcome, Scenario, crowd, replay_command, simulate
from tests.simulator_request import Ask

pytestmark = pytest.mark.slow
SEEDS, SOAK_SEEDS = 20, 1_000
STORM = Scenario(seconds=20.0, fetches_per_min=30.0)
SMALL = Scenario(peers=12, seconds=15.0)
CALM = {"churn_per_min": 0.0, "pauses_per_min": 0.0, "cuts_per_min": 0.0}
HOSTILE_SEEDS = (11, 12)
# clients that leave time for a second and a third try; half of the network's room is used
PATIENT = {**CALM, "seconds": 30.0, "requests_per_peer_min": 4.0, "deadline_s": (25.0, 35.0)}


def check(outcome: Outcome, scenario: Scenario) -> None:
    """Nothing unresolved, nothing wrong."""
    replay = f"replay with: {replay_command(outcome.seed, scenario)}"
    assert outcome.wrong == (), replay
    assert outcome.unresolved == 0, replay
    assert sum(outcome.ends.values()) == outcome.accepted > 0


@pytest.mark.parametrize(
    "seed", [*range(SEEDS), *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(SEEDS, SOAK_SEEDS))]
)
def test_every_accepted_request_ends_once_and_right(seed: int) -> None:
    check(simulate(seed, STORM), STORM)


def success(outcomes: list[Outcome]) -> float:
    """Of the requests whose client and door stayed."""
    ends = [outcome.ends for outcome in outcomes]
    stayed = sum(sum(each.values()) - each.get("cancelled", 0) - each.get("door_died", 0) for each in ends)
    return sum(each.get("finished", 0) for each in ends) / stayed


def p95_s(outcomes: list[Outcome]) -> float:
    return quantile([latency for outcome in outcomes for latency in outcome.latencies_s], 0.95)


@pytest.fixture(scope="module")
def healthy() -> list[Outcome]:
    scenario = Scenario(**PATIENT)  # type: ignore[arg-type]  # numbers all
    return [simulate(seed, scenario) for seed in HOSTILE_SEEDS]


@pytest.mark.parametrize(
    "bad", [{"black_holes": 0.3}, {"stallers": 0.3}, {"liars": 0.3}], ids=lambda bad: next(iter(bad))
)
def test_a_third_of_bad_servers_costs_little(bad: dict[str, float], healthy: list[Outcome]) -> None:
    scenario = Scenario(**PATIENT, **bad)  # type: ignore[arg-type]
    outcomes = [simulate(seed, scenario) for seed in HOSTILE_SEEDS]
    for outcome in outcomes:
        check(outcome, scenario)
        assert outcome.asked_of_holes <= 5
    assert success(healthy) == 1.0
    assert success(outcomes) >= 0.99
    assert p95_s(outcomes) <= 2 * p95_s(healthy)


def test_a_flooder_is_cut_off_and_disturbs_nobody(healthy: list[Outcome]) -> None:
    scenario = Scenario(flooders=0.06, **PATIENT)  # type: ignore[arg-type]
    outcomes = [simulate(seed, scenario) for seed in HOSTILE_SEEDS]
    for outcome in outcomes:
        check(outcome, scenario)
        assert 0.0 < outcome.flooder_kept_s < 3.0
    assert success(outcomes) == 1.0
    assert p95_s(outcomes) <= 1.5 * p95_s(healthy)


def test_who_contradicts_himself_is_known_to_nearly_all() -> None:
    scenario = Scenario(equivocators=0.1, **PATIENT)  # type: ignore[arg-type]
    for seed in HOSTILE_SEEDS:
        outcome = simulate(seed, scenario)
        check(outcome, scenario)
        assert outcome.banned["equivocator"] > 0.9


def test_three_sybils_for_each_honest_peer_cost_time_and_no_answers() -> None:
    kind = {**PATIENT, "peers": 32}
    swarms = [Scenario(**kind, sybils=sybils) for sybils in (0, 96)]  # type: ignore[arg-type]
    (alone, besieged) = ([simulate(seed, each) for seed in HOSTILE_SEEDS] for each in swarms)
    for outcome in besieged:
        check(outcome, swarms[1])
        assert outcome.asked_of_holes <= 5
    assert success(besieged) >= 0.99
    assert p95_s(besieged) <= 2.5 * p95_s(alone)  # four networks, one try in each


@pytest.mark.parametrize("bad", [{}, {"liars": 0.3}, {"black_holes": 0.3}], ids=lambda bad: next(iter(bad), "none"))
def test_a_blob_comes_whole_whatever_a_third_of_its_donors_do(bad: dict[str, float]) -> None:
    scenario = Scenario(peers=24, seconds=30.0, fetches_per_min=60.0, **bad)  # type: ignore[arg-type]
    for seed in HOSTILE_SEEDS:
        outcome = simulate(seed, scenario)
        check(outcome, scenario)
        stayed = sum(outcome.fetches.values()) - outcome.fetches.get("door_died", 0)
        assert outcome.fetches["finished"] >= 0.95 * stayed > 10


def test_bytes_that_nobody_compared_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gossip.transfer, "digest", lambda _content: EveryDigest())
    scenario = Scenario(peers=24, seconds=30.0, fetches_per_min=60.0, liars=0.3)
    assert any("has other bytes" in sentence for sentence in simulate(HOSTILE_SEEDS[0], scenario).wrong)


class EveryDigest:
    """Equal to any."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


# --- the simulator itself ---


def test_a_seed_is_a_history() -> None:
    first, again, other = (simulate(seed, SMALL) for seed in (1, 1, 2))
    assert first == again
    assert first.digest != other.digest


def test_a_seed_is_a_history_whatever_the_hashes_of_words() -> None:
    code = "from tests.simulator import *; print(simulate(3, Scenario(peers=12, seconds=15.0)).digest)"
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert digests == {simulate(3, SMALL).digest}


def test_a_replay_shows_what_happened() -> None:
    silent, told = simulate(1, SMALL), simulate(1, SMALL, keep_lines=True)
    assert silent.lines == ()
    assert silent.digest == told.digest
    assert sum(" ask " in line for line in told.lines) == told.accepted
    assert replay_command(1, SMALL) == "python -m bench.swarm --seed 1 --peers 12 --seconds 15.0 --replay"


def test_a_forgetful_takeover_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Pursuit.continued

    def forgets(self: Pursuit, now: float) -> object:  # type: ignore[type-arg]
        work = whole(self, now)
        return type(work)(**{**{name: getattr(work, name) for name in work.__struct_fields__}, "delivered": ()})

    scenario = Scenario(peers=16, seconds=30.0, churn_per_min=3.0)
    check(simulate(1, scenario), scenario)
    monkeypatch.setattr(Pursuit, "continued", forgets)
    assert any("wrong tokens" in sentence for sentence in simulate(1, scenario).wrong)


def test_a_lost_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Ask._end
    monkeypatch.setattr(Ask, "_end", lambda self, outcome: whole(self, outcome) if self.number != 3 else None)
    assert simulate(1, SMALL).unresolved == 1


def test_endless_patience_with_the_silent_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Judge, "waits_until", lambda self, now: now + 1e9)
    scenario = Scenario(black_holes=0.3, **PATIENT)  # type: ignore[arg-type]
    assert success([simulate(seed, scenario) for seed in HOSTILE_SEEDS]) < 0.99


# --- a network too large to know ---

CROWD = {
    "serving": 0.3,
    "churn_per_min": 0.02,
    "pauses_per_min": 0.01,
    "cancels": 0.0,
    "rare_requests": 0.2,
}


def crowds(peers: int, seconds: float) -> Crowd:
    """What a node has to do, when nearly all requests are answered, also those for what only one peer serves."""
    scenario = Scenario(peers=peers, seconds=seconds, rare_models=4, requests_per_peer_min=60 / peers, **CROWD)  # type: ignore[arg-type]  # numbers all
    outcome, settled = crowd(1, scenario)
    check(outcome, scenario)
    assert success([outcome]) >= 0.95
    return settled


def test_a_node_in_a_crowd_has_no_more_to_do() -> None:
    little, crowded = crowds(60, 60.0), crowds(180, 120.0)
    assert crowded.bytes_per_peer_s < little.bytes_per_peer_s
    assert crowded.events_per_peer_s < little.events_per_peer_s
    assert crowded.summary_bytes_per_peer_s < little.summary_bytes_per_peer_s < 0.1 * little.bytes_per_peer_s


@pytest.mark.soak
def test_nor_in_one_of_a_thousand() -> None:
    little, crowded = crowds(60, 60.0), crowds(1_000, 600.0)
    assert crowded.bytes_per_peer_s < little.bytes_per_peer_s
    assert crowded.events_per_peer_s < little.events_per_peer_s
    assert crowded.summary_bytes_per_peer_s < little.summary_bytes_per_peer_s
    assert crowded.offers_known < 300  # one in three of a thousand serves
