"""gossip/self_topic.py, node/self_summary.py: what nodes tell of themselves over a network, and who is heard."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from crypto.identity import Identity
from gossip.claims_hearing import CLAIM_EVERY_S
from gossip.errors import LocalProtocolError
from gossip.standing import Verdict
from gossip.summaries import (
    SECONDS_MAX,
    SKILL_MIN,
    SUMMARY_EVERY_S,
    SUMMARY_LIFE_MS,
    SUMMARY_REFRESH_S,
    SelfSummary,
    checked_summary,
    seal_summary,
    summary_topic,
)
from model.histogram import REQUEST_S, Histogram
from model.requests import EngineStatistics
from model.timings import Timings
from node.consciousness import (
    Calibration,
    ConsciousnessState,
    Forecasts,
    Load,
    Recorded,
    SelfPrediction,
    Social,
    Uncertainty,
)
from node.consciousness import Identity as Self
from node.self_summary import self_summary
from p2p.loopback import LoopbackNetwork
from tests.fake_runtime import FakeRuntime
from tests.gossip_swarm import CAPACITY, START_MS, Node, node, swarm, until, wall_clock_ms
from tests.node_swarm import Swarm, ask, eventually, work
from tests.test_run import running

TOPIC = summary_topic("main")
SUMMARY = SelfSummary(uptime_s=5.0, busy=0.5, head_id=7, head_hash=bytes(32))


@pytest.fixture
def network() -> LoopbackNetwork:
    return LoopbackNetwork(random.Random(5))


def claim(here: Node, of: Node) -> SelfSummary | None:
    found = here.gossip.self_topic.claims.claim_of(of.peer, trio.current_time())
    return None if found is None else found.summary


async def test_what_one_tells_of_itself_the_others_hear(network: LoopbackNetwork, autojump_clock: MockClock) -> None:
    async with swarm(network, 5) as nodes:
        for each in nodes:
            each.gossip.offer(CAPACITY)
        nodes[0].gossip.offer_summary(SUMMARY)
        await until(lambda: all(claim(other, nodes[0]) == SUMMARY for other in nodes[1:]), SUMMARY_EVERY_S + 1)
        assert claim(nodes[0], nodes[0]) is None
        assert all(set(each.gossip.standing.statistics(0.0).faults.values()) == {0} for each in nodes)
        assert nodes[0].gossip.statistics().claims.said == 1
        assert nodes[3].gossip.statistics().claims.heard == {"accepted": 1}


async def test_however_often_it_is_offered_it_is_told_seldom(
    network: LoopbackNetwork, autojump_clock: MockClock
) -> None:
    async with swarm(network, 3) as nodes:
        for step in range(600):
            nodes[0].gossip.offer_summary(SelfSummary(busy=step % 2, uptime_s=float(step)))
            await trio.sleep(1)
        said = nodes[0].gossip.statistics().claims.said
        assert 600 / SUMMARY_REFRESH_S - 1 < said <= 600 / SUMMARY_EVERY_S + 1
        assert nodes[1].gossip.statistics().claims.heard == {"accepted": said}, "each is taken: none comes too fast"
        assert "summary_over_quota" not in nodes[1].gossip.statistics().drops


async def test_who_is_gone_claims_nothing_any_more(network: LoopbackNetwork, autojump_clock: MockClock) -> None:
    async with swarm(network, 3) as nodes:
        nodes[0].gossip.offer_summary(SUMMARY)
        await until(lambda: claim(nodes[1], nodes[0]) is not None, SUMMARY_EVERY_S + 1)
        network.crash(nodes[0].peer)
        await trio.sleep(SUMMARY_LIFE_MS / 1000 + 2)
        assert len(nodes[1].gossip.self_topic.claims) == 0


async def test_after_goodbye_nothing_is_told(network: LoopbackNetwork, autojump_clock: MockClock) -> None:
    async with swarm(network, 3) as nodes:
        nodes[0].gossip.offer_summary(SUMMARY)
        await nodes[0].gossip.withdraw()
        nodes[0].gossip.offer_summary(SUMMARY)
        await trio.sleep(300)
        assert nodes[0].gossip.statistics().claims.said == 0


async def test_what_peers_would_refuse_is_not_offered(network: LoopbackNetwork, autojump_clock: MockClock) -> None:
    async with node(network) as here:
        with pytest.raises(LocalProtocolError, match="busy"):
            here.gossip.offer_summary(SelfSummary(busy=2.0))


async def test_a_flooder_of_summaries_is_cut_off(network: LoopbackNetwork, autojump_clock: MockClock) -> None:
    async with node(network) as honest, network.join(flooder := Identity.make()) as transport:
        await transport.dial(honest.transport.addresses()[0])
        began, sequence = trio.current_time(), START_MS
        while honest.transport.peers() and trio.current_time() < began + 10:
            sequence += 1
            now_ms = wall_clock_ms()
            raw = seal_summary(flooder, SUMMARY, network="main", sequence=sequence, time_ms=now_ms)
            await transport.publish(TOPIC, raw)
            await trio.sleep(0.02)
        assert not honest.transport.peers()
        assert trio.current_time() - began < 5
        assert honest.gossip.statistics().claims.heard == {"accepted": 1}


async def test_a_liar_in_form_is_banned_and_its_claims_are_gone(
    network: LoopbackNetwork, autojump_clock: MockClock
) -> None:
    async with node(network) as honest, network.join(liar := Identity.make()) as transport:
        await transport.dial(honest.transport.addresses()[0])
        told = {"network": "main", "time_ms": wall_clock_ms()}
        await transport.publish(TOPIC, seal_summary(liar, SUMMARY, sequence=1, **told))
        await until(lambda: len(honest.gossip.self_topic.claims) == 1, 1)
        await trio.sleep(CLAIM_EVERY_S)
        await transport.publish(TOPIC, seal_summary(Identity.make(), SUMMARY, sequence=2, **told))
        await until(lambda: not honest.transport.peers(), 1)
        assert honest.gossip.standing.verdict(liar.peer_id, trio.current_time()) is Verdict.BANNED
        assert len(honest.gossip.self_topic.claims) == 0


async def test_a_sequence_is_not_used_twice_over_a_restart(
    network: LoopbackNetwork, autojump_clock: MockClock, tmp_path: Any
) -> None:
    identity, used = Identity.make(), list[int]()
    for back_ms in (0, 3_600_000):  # in its second life its clock is an hour behind
        path, clock = tmp_path / "gossip.json", lambda back_ms=back_ms: wall_clock_ms() - back_ms
        async with node(network, identity, state_path=path, wall_clock_ms=clock) as here:
            first = here.gossip.self_topic.own.sequence
            here.gossip.offer_summary(SUMMARY)
            await trio.sleep(SUMMARY_EVERY_S + 1)
            used += [first, here.gossip.self_topic.own.sequence]
    assert used[0] < used[1] <= used[2] < used[3]


async def test_an_observed_peer_has_its_claims_beside(autojump_clock: MockClock) -> None:
    async with Swarm().running() as running:
        door, peer = await running.start(), await running.start(FakeRuntime())
        await running.settled()
        assert (await ask(door, work())).error is None
        assert [row["claims"] for row in door.state.peers()] == [None]
        peer.network.gossip.offer_summary(replace_summary(SUMMARY, first_token_s=0.2))
        await eventually(lambda: door.state.peers()[0]["claims"] is not None, SUMMARY_EVERY_S + 2)
        row = door.state.peers()[0]
        assert row["claims"]["busy"] == 0.5
        assert row["claims"]["head_hash"] == "00" * 32
        assert row["claims"]["observation"] == "unknown", "one answer is too few"
        assert row["observed"]["answers"] == 1
        assert not set(row["claims"]) & {"success", "proven"}, "nothing of it stands among what was observed"


def replace_summary(summary: SelfSummary, **changes: Any) -> SelfSummary:
    return SelfSummary(**{**{name: getattr(summary, name) for name in summary.__struct_fields__}, **changes})


# --- what a state becomes ---

STATE = ConsciousnessState(
    identity=Self(peer_id="me", model="tale", revision="sha256-01", boot_count=3, uptime_s=60.5),
    uncertainty=Uncertainty(entropy_nats=2.5, margin=0.25, tokens=10),
    calibration=Calibration(error=0.125),
    self_prediction_error=SelfPrediction(latency_s=Forecasts(skill=0.5), active_requests=Forecasts(skill=-0.25)),
    load=Load(queue_length=2, active_requests=3, loop_lag_ms=1.5),
    social=Social(success_mean=0.75, success_least=0.5),
    memory=Recorded(head_id=9, head_hash="ab" * 32),
)


def engine(slots: int = 4) -> EngineStatistics:
    timings = Timings()
    timings.came("a", 1.0)
    timings.runs(["a"], 1.5)
    timings.stepped(3, {"a"}, 1.75)
    return EngineStatistics(slots_total=slots, timings=timings.read())


def test_a_summary_is_the_states_own_figures() -> None:
    assert self_summary(STATE, engine()) == SelfSummary(
        revision="sha256-01", uptime_s=60.5, boot_count=3, loop_lag_ms=1.5, busy=0.75, queued=0.25, first_token_s=0.75,
        entropy_nats=2.5, margin=0.25, calibration_error=0.125, latency_skill=0.5, load_skill=-0.25, success_mean=0.75,
        success_least=0.5, head_id=9, head_hash=b"\xab" * 32,
    )  # fmt: skip


def test_what_was_not_measured_is_not_told() -> None:
    assert self_summary(ConsciousnessState()) == SelfSummary()
    assert self_summary(ConsciousnessState(), EngineStatistics()) == SelfSummary()
    idle = EngineStatistics(slots_total=4, timings=Timings().read())
    assert self_summary(ConsciousnessState(), idle) == SelfSummary()
    told = self_summary(STATE)
    assert (told.busy, told.queued, told.first_token_s) == (None, None, None)


def test_whatever_the_state_its_summary_can_be_told() -> None:
    wild = ConsciousnessState(
        identity=Self(revision="two words", boot_count=(1 << 53) - 1, uptime_s=9e15),
        load=Load(queue_length=1 << 50, active_requests=1 << 50, loop_lag_ms=9e15),
        self_prediction_error=SelfPrediction(latency_s=Forecasts(skill=-9e15), active_requests=Forecasts(skill=1.5)),
        memory=Recorded(head_id=9, head_hash="no hash"),
    )
    told = checked_summary(self_summary(wild, engine()))
    assert (told.revision, told.head_id, told.head_hash) == (None, None, None)
    assert (told.busy, told.queued, told.latency_skill, told.load_skill) == (1.0, 1.0, SKILL_MIN, 1.0)
    assert (told.uptime_s, told.loop_lag_ms) == (SECONDS_MAX, SECONDS_MAX)


def test_no_text_of_the_state_is_told_but_the_revision() -> None:
    told = self_summary(replace(STATE, identity=replace(STATE.identity, stop_reason="a secret", phase="running")))
    assert [each for each in map(str, told.__class__.__struct_fields__) if isinstance(getattr(told, each), str)] == [
        "revision"
    ]


def test_the_mean_first_token_is_that_of_queue_and_prefill() -> None:
    empty = Histogram(REQUEST_S).read()
    statistics = engine()
    assert statistics.timings is not None
    waits_only = replace(statistics, timings=replace(statistics.timings, prefill_s=empty))
    assert self_summary(STATE, waits_only).first_token_s is None


# --- wired ---


@pytest.mark.slow
async def test_a_running_node_tells_of_its_state(tmp_path: Path) -> None:
    async with running(tmp_path) as here:
        await here.ready()
        own = here.node._gossip.self_topic.own
        assert here.node._keeping is not None
        with trio.fail_after(60):
            while own._summary is None or own._summary.head_id is None:
                here.node._keeping._sampler.sample_now()
                await trio.sleep(0.2)
        assert own._summary.boot_count == 1
        assert own._summary.uptime_s is not None
        assert own._summary.first_token_s is None, "nothing was answered yet"
        assert own.deadline() <= trio.current_time() + SUMMARY_EVERY_S
