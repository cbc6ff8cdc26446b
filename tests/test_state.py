"""node/state.py: what a node says of itself and advertises, read from whole nodes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from model.config import LinearFacts
from model.errors import ComputeFailed
from node.config import NodeConfig
from node.errors import NotReady, UnknownModel
from node.front import RouteHint
from node.recent import SAMPLE_S
from node.state import EMBED_SLOTS
from node.work import EmbedWork
from tests.fake_runtime import FakeRuntime, facts
from tests.node_swarm import Swarm, ask, work


@pytest.fixture
async def swarm() -> AsyncIterator[Swarm]:
    async with Swarm().running() as running:
        yield running


async def test_a_peer_that_only_embeds_is_asked(swarm: Swarm, autojump_clock: MockClock) -> None:
    """An encoder has no slots; advertised as such, every peer would take it for full."""
    door = await swarm.start()
    encoder = await swarm.start(FakeRuntime(slots=0, facts=facts(name="vectors", kind="encoder")))
    await swarm.settled()
    assert encoder.state.capacity().slots_free == EMBED_SLOTS
    embedded = await door.inference.embed(EmbedWork(request_id="q", model="vectors", texts=("a",)), RouteHint())
    assert embedded.served_by == encoder.id
    assert door.state.default_model("encoder") == "vectors"
    assert door.state.default_model("causal") is None


async def test_models_are_counted_with_this_node(swarm: Swarm, autojump_clock: MockClock) -> None:
    door, one = await swarm.start(), await swarm.start(FakeRuntime())
    await swarm.start(FakeRuntime())
    other = await swarm.start(FakeRuntime(facts=facts(revision="r2")))
    await swarm.settled()
    assert {(row.id, row.revision): (row.peers, row.local) for row in door.state.models()} == {
        ("tale", "r1"): (2, False),
        ("tale", "r2"): (1, False),
    }
    assert {(row.revision): (row.peers, row.local) for row in one.state.models()} == {"r1": (2, True), "r2": (1, False)}
    assert other.state.models()[0].revision == "r2"
    assert other.state.default_model("causal") == "tale"


async def test_status_and_peers_are_json(swarm: Swarm, autojump_clock: MockClock) -> None:
    door, peer = await swarm.start(), await swarm.start(FakeRuntime())
    await swarm.settled()
    assert (await ask(door, work())).error is None
    for node in (door, peer):
        status = json.loads(json.dumps(node.state.status(), allow_nan=False))
        assert set(status) >= {"node", "peering", "gossip", "inference", "model", "readiness"}
        json.dumps(node.state.peers(), allow_nan=False)
    (row,) = door.state.peers()
    assert row["peer_id"] == peer.id
    assert row["connected"]
    assert row["models"][0]["name"] == "tale"
    assert row["observed"]["proven"]


async def test_what_clients_got_wrong_is_no_error_of_the_node(swarm: Swarm, autojump_clock: MockClock) -> None:
    node = await swarm.start(FakeRuntime())
    node.state.sample()
    assert isinstance((await ask(node, work(model="no such"))).error, UnknownModel)
    node.engine.fails = ComputeFailed("not finite")
    assert (await ask(node, work())).error is not None
    node.engine.fails = None
    assert (await ask(node, work())).error is None
    await trio.sleep(2 * SAMPLE_S)
    node.state.sample()
    told = node.state.status()["recent"]
    assert (told["ended"], told["errored"]) == (3, 1)


async def test_quantized_weights_are_told_as_such(swarm: Swarm, autojump_clock: MockClock) -> None:
    linears = LinearFacts(kind="int8", told="int8; not measured")
    peer = await swarm.start(FakeRuntime(facts=facts().quantized("int8"), linears=linears))
    [offer] = peer.state.capacity().models
    assert (offer.dtype, offer.revision) == ("int8", "r1-int8")
    told = json.loads(json.dumps(peer.state.status()))["model"]
    assert told["models"][0]["quantization"] == "int8"
    assert told["linears"] == {"kind": "int8", "told": "int8; not measured", "problem": ""}


async def test_readiness_and_capacity_follow_the_phase(swarm: Swarm, autojump_clock: MockClock) -> None:
    peer = await swarm.start(FakeRuntime())
    assert peer.state.readiness().ready
    assert peer.state.capacity().accepting
    for phase, loading in (("starting", True), ("loading", True), ("stopping", False)):
        peer.state.phase = phase
        readiness = peer.state.readiness()
        assert (readiness.ready, readiness.loading) == (False, loading)
        assert readiness.reason
        assert readiness.retry_after_s
        assert not peer.state.capacity().accepting
        assert peer.state.capacity().models == ()


async def test_training_that_is_switched_off_says_so(swarm: Swarm, autojump_clock: MockClock) -> None:
    node = await swarm.start(FakeRuntime())
    node.state._parts = replace(node.state._parts, config=NodeConfig(training=False))
    assert "switched off at this node (--no-training" in node.state.training.status()["why"]
    with pytest.raises(NotReady, match="switched off"):
        await node.state.training.leave()
