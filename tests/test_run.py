"""node/run.py: the tree of tasks of a live node, its ready file, signals, its end. Real clock, real threads."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from crypto.identity import Identity, PeerId
from gossip.directory import Offer
from gossip.messages import Advert, Capacity, ModelKind, ModelOffer
from gossip.routing import Candidate
from model.errors import BadModel, ModelError
from model.requests import Output
from node.config import NodeConfig
from node.errors import ConfigError, NotReady, PeerFailed
from node.front import RouteHint
from node.inference import INFER_PROTOCOL
from node.remote import Remote
from node.run import Node, _bootstrap
from node.start import leaves
from node.work import WORK_LIMITS, EmbedWork, Finished, GenerateWork, Sampling, from_wire, to_wire
from p2p.calls import Calls
from p2p.errors import P2PError, RemoteError
from p2p.hello import RPC_PROTOCOL
from p2p.loopback import LoopbackNetwork, LoopbackTransport
from p2p.rpc import Call, encode_frame
from p2p.transport import Stream
from tests.fake_outside import FakeOutside
from tests.fake_runtime import FakeRuntime
from tests.node_swarm import work

pytestmark = pytest.mark.slow
ARCHITECTURE = Path(__file__).parent.parent / "docs" / "ARCHITECTURE.md"
PATIENCE_S = 30  # hang guard

# docs/ARCHITECTURE.md's names of the tasks in the node nursery, and what Trio calls them
TASKS = {
    "signals": "node.run._signals",
    "control calls": "p2p.calls.Calls.run",
    "inference calls": "p2p.calls.Calls.run",
    "round calls": "p2p.calls.Calls.run",
    "direct channels": "p2p.direct.Direct.run",
    "gossip": "gossip.service.GossipService.run",
    "peering": "p2p.peering.Peering.run",
    "reaching": "p2p.reaching.Reaching.run",
    "memory": "node.recorder.Recorder.run",
    "sampler": "node.self_sampler.Sampler.run",
    "vectors": "node.self_recall.Recall.run",
    "looks": "node.self_looks.Looks.run",
    "measure": "node.run.Node._measure",
    "watch": "node.process.Process.watch",
    "host the model": "node.run.Node._host_model",
    "hosting": "node.hosting.Hosting.run",
    "training": "node.training.Training.run",
    "web": "node.run.Node._web",
}
# the same, one floor deeper; what Hypercorn starts is its own
INSIDE = {
    "gossip.service.GossipService.run": [
        "gossip.finder.Finder.sample_now_and_then",
        "gossip.self_topic.SelfTopic.speak",
        "gossip.service.GossipService._enforce_verdicts",
        "gossip.service.GossipService._keep_house",
        "gossip.service.GossipService._pull_from_the_joined",
        "gossip.service.GossipService._pull_from_the_joined",
        "gossip.service.GossipService._pull_from_the_joined",
        "gossip.service.GossipService._pull_from_the_joined",
        "gossip.service.GossipService._speak",
    ],
    "p2p.direct.Direct.run": ["trio._highlevel_serve_listeners._serve_one_listener"],
    "p2p.peering.Peering.run": ["p2p.peering.Peering._keep", "p2p.peering.Peering._save_now_and_then"],
    "node.recorder.Recorder.run": ["node.recorder.Recorder._retain_hourly"],
    "node.run.Node._web": ["node.web.serve.serve"],
}


class SlowRuntime(FakeRuntime):
    """Its steps take time of the worker thread."""

    def step(self) -> list[Output]:
        time.sleep(0.01)
        return super().step()


@dataclass
class Running:
    """A node.run.Node as a child of the test."""

    node: Node
    transport: LoopbackTransport
    network: LoopbackNetwork
    config: NodeConfig
    task: Callable[[], trio.lowlevel.Task | None]

    @property
    def ready_file(self) -> Path:
        assert self.config.ready_file is not None
        return self.config.ready_file

    def is_busy(self, peer: PeerId) -> bool:
        return self.node._peering._roster.is_busy(peer)

    def breaches(self) -> int:
        return self.node._gossip.standing.statistics(trio.current_time()).faults["malformed"]

    async def ready(self) -> None:
        await until(self.ready_file.exists)

    async def ended(self) -> None:
        await until(lambda: self.task() is None)


async def until(true: Callable[[], bool]) -> None:
    with trio.fail_after(PATIENCE_S):
        while not true():  # noqa: ASYNC110  # of things that know no trio
            await trio.sleep(0.01)


@asynccontextmanager
async def running(
    path: Path, load: Callable[[NodeConfig], Any] | None = None, **changes: Any
) -> AsyncIterator[Running]:
    network = LoopbackNetwork(random.Random(1))
    fields = {"data_dir": path, "http": "off", "mdns": False, "ready_file": path / "ready.json", **changes}
    config = NodeConfig(**fields)
    identity = Identity.make()
    async with network.join(identity) as transport, trio.open_nursery() as nursery:
        node = Node(config, identity, transport, (), load or (lambda _config: SlowRuntime()), outside=FakeOutside())

        def task() -> trio.lowlevel.Task | None:
            return next((child for child in nursery.child_tasks if child.name == "node.run.Node.run"), None)

        nursery.start_soon(node.run)
        yield Running(node, transport, network, config, task)
        nursery.cancel_scope.cancel()


def signal_me(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def names(task: trio.lowlevel.Task) -> list[str]:
    return sorted(child.name for nursery in task.child_nurseries for child in nursery.child_tasks)


def children(task: trio.lowlevel.Task) -> list[trio.lowlevel.Task]:
    return [child for nursery in task.child_nurseries for child in nursery.child_tasks]


async def test_the_live_tree_of_tasks_is_the_one_in_the_documents(tmp_path: Path) -> None:
    written = ARCHITECTURE.read_text().split("## Tree of tasks")[1].split("Stop order")[0]
    labels = [line.strip()[3:].split("  ")[0] for line in written.splitlines() if line.startswith("   ")]
    assert labels == list(TASKS)
    async with running(tmp_path, http="127.0.0.1:0") as here:
        await here.ready()
        task = here.task()
        assert task is not None
        assert names(task) == sorted(TASKS.values())
        for child in children(task):
            if child.name != "p2p.calls.Calls.run":  # a task a stream
                assert names(child) == INSIDE.get(child.name, []), child.name


async def test_a_node_whose_training_is_switched_off_has_no_task_of_it(tmp_path: Path) -> None:
    async with running(tmp_path, training=False) as here:
        await here.ready()
        task = here.task()
        assert task is not None
        assert "node.hosting.Hosting.run" in names(task)
        assert "node.training.Training.run" not in names(task)


async def test_ready_means_ready(tmp_path: Path) -> None:
    async with running(tmp_path, http="127.0.0.1:0") as here:
        await here.ready()
        said = json.loads(here.ready_file.read_text())
        assert said["peer_id"] == here.transport.peer_id
        assert said["listen"] == list(here.transport.addresses())
        assert (said["model"], said["revision"], said["pid"]) == ("tale", "r1", os.getpid())
        stream = await trio.open_tcp_stream("127.0.0.1", int(said["http"].split(":")[1]))
        async with stream:
            await stream.send_all(b"GET /readyz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            assert b" 200 " in await stream.receive_some()
        with trio.fail_after(30):  # what is written just now is there for a moment
            while [name for name in os.listdir(tmp_path) if "tmp" in name and not name.startswith("memory")]:  # noqa: ASYNC110  # files
                await trio.sleep(0.05)
        assert here.node.state.readiness().ready
        assert json.dumps(here.node.state.status())
        signal_me()
        await here.ended()
        assert not here.ready_file.exists()


async def test_a_node_without_a_model_is_ready(tmp_path: Path) -> None:
    async with running(tmp_path, model="none") as here:
        await here.ready()
        assert json.loads(here.ready_file.read_text())["model"] is None
        signal_me(signal.SIGINT)
        await here.ended()


async def test_a_model_that_cannot_be_loaded_ends_the_node_with_its_error(tmp_path: Path) -> None:
    def load(_config: NodeConfig) -> Any:
        raise BadModel("the weights are corrupt")

    with pytest.raises(BaseExceptionGroup) as caught:
        async with running(tmp_path, load):
            await trio.sleep(PATIENCE_S)
    errors = list(leaves(caught.value))
    assert [type(error) for error in errors] == [BadModel]
    assert isinstance(errors[0], ModelError)
    assert not (tmp_path / "ready.json").exists()


async def test_a_ready_file_that_cannot_be_written_is_a_clear_end(tmp_path: Path) -> None:
    with pytest.raises(BaseExceptionGroup) as caught:
        async with running(tmp_path, ready_file=tmp_path / "no" / "such" / "ready.json"):
            await trio.sleep(PATIENCE_S)
    (error,) = leaves(caught.value)
    assert isinstance(error, ConfigError)
    assert "ready.json" in str(error)


async def test_a_signal_while_the_model_loads_does_not_wait_for_it(tmp_path: Path) -> None:
    go_on = threading.Event()

    def load(_config: NodeConfig) -> Any:
        go_on.wait(PATIENCE_S)
        return FakeRuntime()

    try:
        async with running(tmp_path, load) as here:
            await until(lambda: here.node.state.phase == "loading")
            readiness = here.node.state.readiness()
            assert (readiness.ready, readiness.loading) == (False, True)
            told = {"state": "loading", "model": here.config.model, "progress": None}
            assert readiness.progress == told
            with pytest.raises(NotReady, match="is loading; try again") as caught:
                async with here.node.state.answer(GenerateWork(request_id="q", text="x"), RouteHint()) as items:
                    await anext(aiter(items))
            assert caught.value.more == {"loading": told}
            with pytest.raises(NotReady, match="this node is not ready yet"):
                await here.node.state.embed(EmbedWork(request_id="q", texts=("a",)), RouteHint())
            await trio.sleep(0.1)
            signal_me()
            await here.ended()
            assert not here.ready_file.exists()
    finally:
        go_on.set()


async def test_a_model_that_is_loaded_too_late_is_not_served(tmp_path: Path) -> None:
    """Told to stop while it loads, and a client's request to a peer still runs."""
    go_on, loaded = threading.Event(), threading.Event()

    def load(_config: NodeConfig) -> Any:
        go_on.wait(PATIENCE_S)
        loaded.set()
        return FakeRuntime()

    async with running(tmp_path, load) as here:
        await until(lambda: here.node.state.phase == "loading")
        with here.node._inference._counted():
            signal_me()
            await until(lambda: here.node.state.phase == "stopping")
            go_on.set()
            await until(loaded.is_set)
            await trio.sleep(0.2)
            assert here.node.state.phase == "stopping"
            assert here.node._inference.hosting is None
        await here.ended()


@asynccontextmanager
async def caller(here: Running) -> AsyncIterator[Calls]:
    """A peer that calls the node's engine."""
    async with here.network.join(Identity.make()) as transport, trio.open_nursery() as nursery:
        calls = Calls(transport, INFER_PROTOCOL, {}, limits=WORK_LIMITS)
        await nursery.start(calls.run)
        await transport.dial(here.transport.addresses()[0])
        yield calls
        nursery.cancel_scope.cancel()


def pieces(items: list[Any]) -> int:
    return sum(item["type"] == "piece" for item in items)


async def test_the_first_signal_lets_a_peers_request_end(tmp_path: Path) -> None:
    async with running(tmp_path) as here, caller(here) as calls:
        await here.ready()
        async with calls.open(here.transport.peer_id, "generate", to_wire(work(tokens=60))) as outgoing:
            await anext(outgoing)
            signal_me()
            items = [item async for item in outgoing]
            assert from_wire(outgoing.result, Finished).completion_tokens == 60
        assert pieces(items) == 60
        assert here.node.state.phase == "stopping"
        assert not here.node.state.readiness().ready
        await here.ended()


async def test_a_long_prompt_is_a_frame_of_inference_and_none_of_control(tmp_path: Path) -> None:
    async with running(tmp_path) as here, caller(here) as calls:
        await here.ready()
        long = GenerateWork(request_id="q", tokens=(1,) * 100_000, sampling=Sampling(max_tokens=1))
        with pytest.raises(RemoteError) as caught:  # the fake runtime has a small context
            await calls.call(here.transport.peer_id, "generate", to_wire(long))
        assert caught.value.code == "context_length_exceeded"
        assert here.breaches() == 0
        stream = await calls._transport.open_stream(here.transport.peer_id, RPC_PROTOCOL)
        await stream.send(encode_frame(Call(1, "generate", to_wire(long)), WORK_LIMITS))
        await until(lambda: here.breaches() == 1)


@pytest.mark.parametrize("protocol", [RPC_PROTOCOL, INFER_PROTOCOL])
async def test_a_peer_that_breaks_the_rules_of_calls_loses_standing_and_at_last_its_connection(
    tmp_path: Path, protocol: str
) -> None:
    async with running(tmp_path) as here, here.network.join(Identity.make()) as peer:
        await here.ready()
        await peer.dial(here.transport.addresses()[0])
        for count in (1, 2, 3):  # the score falls by 10 each, and recovers a little meanwhile
            stream = await peer.open_stream(here.transport.peer_id, protocol)
            await stream.send(b"\xc1")
            with pytest.raises(P2PError):
                await stream.receive()
            await until(lambda so_far=count: here.breaches() == so_far)  # type: ignore[misc]
        await until(lambda: peer.peer_id not in here.transport.peers())


async def test_one_breach_of_a_serving_peer_costs_once_however_many_calls_were_open(tmp_path: Path) -> None:
    async with running(tmp_path, model="none") as here, here.network.join(Identity.make()) as peer:
        await here.ready()
        asked = trio.Event()

        async def lie(stream: Stream) -> None:
            for _ in range(5):
                await stream.receive()
            asked.set()
            await stream.send(b"\xc1")
            await trio.sleep_forever()

        peer.serve(INFER_PROTOCOL, lie)
        await peer.dial(here.transport.addresses()[0])
        advert = Advert(instance="ab" * 16, started_ms=1, agent="liar", capacity=Capacity(accepting=True))
        offer = Offer(peer=peer.peer_id, sequence=1, advert=advert, received_s=0.0, expires_s=float("inf"))
        model = ModelOffer(name="m", revision="r", kind=ModelKind.CAUSAL, context_tokens=64, dtype="float32")
        candidate = Candidate(offer=offer, model=model, cost_s=1.0, in_doubt=False)
        remote = Remote(here.node._inference._network, Counter())

        busy: list[bool] = []

        async def answered() -> None:
            async with remote.generate(candidate, work(tokens=8)) as items:
                busy.append(here.is_busy(candidate.peer))
                async for _ in items:
                    pass

        async def ask() -> None:
            with pytest.raises(PeerFailed):
                await answered()

        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(ask)
        await until(lambda: here.breaches() > 0)
        assert here.breaches() == 1
        assert True in busy  # peering keeps the connection meanwhile


async def test_a_slow_peer_gets_its_last_piece_before_the_end(tmp_path: Path) -> None:
    """The engine is done, the pieces are still on their way: that is a request in flight too."""
    runtime = FakeRuntime()
    async with running(tmp_path, lambda _config: runtime) as here, caller(here) as calls:
        await here.ready()
        async with calls.open(here.transport.peer_id, "generate", to_wire(work(tokens=1000))) as outgoing:
            await anext(outgoing)
            await until(lambda: runtime.holds == 0)  # 256 pieces of credit are used up, the rest waits there
            signal_me()
            await trio.sleep(0.5)
            items = [item async for item in outgoing]
            assert from_wire(outgoing.result, Finished).completion_tokens == 1000
        assert pieces(items) == 1000
        await here.ended()


async def test_the_second_signal_ends_at_once(tmp_path: Path) -> None:
    async with running(tmp_path) as here, caller(here) as calls:
        await here.ready()
        async with calls.open(here.transport.peer_id, "generate", to_wire(work(tokens=1900))) as outgoing:
            await anext(outgoing)
            signal_me()
            await until(lambda: here.node.state.phase == "stopping")
            await trio.sleep(0.1)
            assert here.task() is not None
            signal_me()
            await here.ended()
            here.network.crash(here.transport.peer_id)
            with pytest.raises(P2PError):
                async for _ in outgoing:
                    pass
        assert not here.ready_file.exists()


def test_bad_settings_are_named(tmp_path: Path) -> None:
    config = NodeConfig(data_dir=tmp_path, bootstrap_file=tmp_path / "none.json")
    with pytest.raises(ConfigError, match=r"none\.json"):
        _bootstrap(config)
    key = tmp_path / "psk"
    config = NodeConfig(data_dir=tmp_path, psk_file=key)
    with pytest.raises(ConfigError, match="cannot read"):
        config.psk()
    for text in ("xyz", "ab" * 31):
        key.write_text(text)
        with pytest.raises(ConfigError, match="64 hexadecimal digits"):
            config.psk()
    key.write_text("ab" * 32 + "\n")
    assert config.psk() == b"\xab" * 32
