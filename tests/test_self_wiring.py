"""The self-state of a running node: what moves each member that the wiring feeds; what the memory has of its life."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from crypto.identity import Identity
from node import self_period, self_sampler
from node.consciousness_fields import FIELDS
from node.errors import BadRequest, NotReady, UnknownModel
from node.events import Event, Inference, Kept, Outcome, Peer, Start, State, Stop
from node.facts import Merged
from node.memory_events import replayed
from node.self_face import Question
from node.self_state import PEER_EVENTS_MAX
from node.store import Store
from p2p.loopback import LoopbackNetwork
from tests.fake_runtime import FakeRuntime
from tests.node_swarm import work
from tests.self_world import Here, living, until
from tests.store_world import World

pytestmark = pytest.mark.slow
Move = Callable[[Here], Awaitable[None]]


def bodies(events: list[Kept], kind: type[Any]) -> list[Any]:
    return [event.body for event in events if isinstance(event.body, kind)]


# --- a cause of each member that is measured while the node runs ---


async def load(here: Here) -> None:
    """Requests that stay under way, more than there are slots."""
    assert here.node._keeping is not None
    hosting = here.node._inference.hosting
    assert hosting is not None

    async def stay() -> None:
        async with hosting.generate(work("x", 1_900)):
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for _ in range(here.runtime.slots + 2):
            nursery.start_soon(stay)
        await until(lambda: hosting.statistics().queue_length == 2)
        await trio.sleep(5)  # two of node.recent's samples
        await here.sampled()
        nursery.cancel_scope.cancel()


async def lag(here: Here) -> None:
    here.node.state.process.lag_s.observe(30.0)
    await here.sampled()


async def learn(here: Here) -> None:
    here.learner.doing = "training"
    here.learner.rounds = [
        Merged(run="r", round=3, accepted=2, rejected={"copy": 1}, loss_before_nats=3.0, loss_after_nats=2.5)
    ]
    await here.sampled()


async def meet(here: Here) -> None:
    """A peer comes, is measured, and a request to it fails and one works."""
    watch, now = here.node._gossip.observations, trio.current_time()
    folder = here.node._config.data_dir / "other"
    async with living(folder, network=here.network, model="none", memory=False) as other:
        peer = await here.node._network.transport.dial(other.node._network.transport.addresses()[0])
        await until(lambda: peer in here.node._peering.peers())
        watch.rtt(peer, 0.25)
        watch.started(peer, now)
        watch.failed(peer, "broken", now)
        watch.ended(peer, now)
        await here.sampled()


async def grow(here: Here) -> None:
    """The process takes more memory."""
    ballast = bytearray(64 << 20)
    ballast[:: 1 << 12] = b"1" * len(ballast[:: 1 << 12])
    await here.sampled()
    assert len(ballast)


async def weights(here: Here) -> None:
    hosting = here.node._inference.hosting
    assert hosting is not None
    await hosting.switch(object(), "r2")  # type: ignore[attr-defined]  # a Hosting
    await here.sampled()


async def remember(here: Here) -> None:
    await here.itself.note("a note", "s")
    await until(lambda: here.itself._recall.embedded == 1)
    await here.sampled()


async def drain(here: Here) -> None:
    here.node.state.phase = "stopping"
    await until(lambda: here.now("identity.phase") == "stopping")


async def fill_disk(here: Here) -> None:
    """Another disk's figures, since a test cannot fill this one."""
    before = shutil.disk_usage
    self_sampler.shutil.disk_usage = lambda path: before(path)._replace(free=12_345)  # type: ignore[assignment]
    try:
        await here.sampled()
    finally:
        self_sampler.shutil.disk_usage = before


async def take_accelerator(here: Here) -> None:
    hosting = here.node._inference.hosting
    assert hosting is not None

    class Runtime(FakeRuntime):
        def accelerator_bytes(self) -> int:
            return 77

    hosting.runtime = Runtime()  # type: ignore[misc]  # the same but for that
    await here.sampled()


async def foretell(here: Here) -> None:
    """Four periods: two to foretell from, and two foretold."""
    for n in range(4):
        period = here.itself.period
        for _ in range(2):
            period.looked(n, n)
            period.answered(float(n))
            period.held_out(float(n))
        here.itself.foretell(60_000)
        await here.written()  # so that the outcome can name the prediction's place


CAUSES: dict[str, Move] = {
    "identity.revision": weights,
    "identity.phase": drain,
    "identity.round": learn,
    "load.queue_length": load,
    "load.active_requests": load,
    "load.tokens_s": load,
    "load.loop_lag_ms": lag,
    "learning.phase": learn,
    "learning.loss_before_nats": learn,
    "learning.loss_after_nats": learn,
    "learning.merges": learn,
    "learning.accepted": learn,
    "learning.rejected": learn,
    "body.rss_bytes": grow,
    "body.accelerator_bytes": take_accelerator,
    "body.disk_free_bytes": fill_disk,
    "social.live_peers": meet,
    "social.observed_peers": meet,
    "social.success_mean": meet,
    "social.success_least": meet,
    "social.rtt_ms": meet,
    "memory.entries": remember,
    "memory.last_write_ms": remember,
    "memory.head_id": remember,
    "memory.head_hash": remember,
    **{row.path: foretell for row in FIELDS if row.path.startswith("self_prediction_error.")},
}
# by the start or the stop alone, and by helpers of their own: tests below, and tests of node/self_looks.py
OTHERWISE = {"identity.peer_id", "identity.model", "identity.last_stop", "identity.stop_reason", "identity.boot_count"}
MOVE_BY_THEMSELVES = {"identity.uptime_s"}  # a clock


def test_every_member_that_the_wiring_feeds_has_a_cause_here() -> None:
    fed = {row.path for row in FIELDS if row.path.split(".")[0] in (
        "identity", "load", "learning", "body", "social", "memory", "self_prediction_error"
    )}  # fmt: skip
    assert fed == CAUSES.keys() | OTHERWISE | MOVE_BY_THEMSELVES


SAMPLED_NOISE = {path for path in self_period.NOISE if path.startswith(("load.loop", "load.tokens", "body."))}


def members(here: Here) -> dict[str, Any]:
    return {row.path: here.now(row.path) for row in FIELDS}


@pytest.mark.parametrize("move", list(dict.fromkeys(CAUSES.values())), ids=lambda move: move.__name__)
async def test_a_cause_moves_its_members_and_no_others(tmp_path: Path, move: Move) -> None:
    own = {path for path, cause in CAUSES.items() if cause is move}
    async with living(tmp_path) as here:
        if move is foretell:
            await foretell(here)
        await here.sampled()
        before = members(here)
        await here.sampled()
        without = members(here)
        await move(here)
        after = members(here)
    still = own - SAMPLED_NOISE - {path for path in own if path.startswith("memory.")}
    assert {path for path in still if before[path] != without[path]} == set()  # the cause was not there
    assert {path for path in own if after[path] == without[path]} == set()
    others = before.keys() - own - SAMPLED_NOISE - MOVE_BY_THEMSELVES
    moved = {path for path in others if after[path] != without[path] and not path.startswith("memory.")}
    assert moved == set()


async def test_a_node_says_who_it_is_and_how_the_run_before_ended(tmp_path: Path) -> None:
    async with living(tmp_path) as here:
        assert here.now("identity.peer_id") == here.node._network.transport.peer_id
        assert (here.now("identity.boot_count"), here.now("identity.last_stop")) == (1, "first")
        assert here.itself.told()["before"] == "nothing is recorded of this node yet"
        assert here.now("identity.stop_reason") is None
    async with living(tmp_path, model="other") as here:
        assert (here.now("identity.boot_count"), here.now("identity.last_stop")) == (2, "order")
        assert here.now("identity.model") == "other"
        told = here.itself.told()
        assert told["before"].startswith("run 1; default; running; stopped in order (order); 0 requests under way")
        assert told["doing"].startswith("run 2; other; running")
        events = await here.written()
    starts, stops = bodies(events, Start), bodies(events, Stop)
    assert [(start.boot, start.last_stop) for start in starts] == [(1, "first"), (2, "order")]
    assert [stop.reason for stop in stops] == ["order"]


async def test_without_a_memory_there_is_no_self_state(tmp_path: Path) -> None:
    async with living(tmp_path, memory=False) as here:
        assert here.node.state.itself is None
        assert await here.ask()
    assert "memory" not in " ".join(os.listdir(tmp_path))


# --- requests ---


async def test_a_request_is_remembered_without_its_text_and_can_be_forgotten(tmp_path: Path) -> None:
    async with living(tmp_path) as here:
        answer = await here.ask("a secretword", account="key:7")
        (body,) = bodies(await here.written(), Inference)
        assert (body.model, body.revision, body.outcome) == ("tale", "r1", "ok")
        assert (body.prompt_tokens, body.answer_tokens) == (12, 5)
        assert (body.subject, body.served_by, body.text) == ("key:7", "", None)
        assert await here.itself.recall(Question(query="secretword")) == []
        assert await here.itself.recall(Question(query=answer.split()[0])) == []
        assert await here.itself.forget("key:7") == 1
        assert await here.itself.recall(Question(subject="key:7")) == []
        assert (await here.itself.verify())["is_whole"]


async def test_text_is_remembered_where_the_operator_opted_in_and_the_client_did_not_say_no(tmp_path: Path) -> None:
    async with living(tmp_path, remember_text=True) as here:
        answer = await here.ask("an opted secretword", account="key:7")
        await here.ask("a private whisper", private=True)
        (found,) = await here.itself.recall(Question(query="secretword"))
        assert found["body"]["text"] == f"an opted secretword\n\n{answer}"
        assert await here.itself.recall(Question(query="whisper")) == []
        assert len(bodies(await here.written(), Inference)) == 1  # the private one is not even counted there
        assert here.node.state.statistics().requests == 2
        await until(lambda: here.itself._recall.embedded == 1)
        (alike,) = await here.itself.recall(Question(query=found["body"]["text"], by="meaning"))
        assert (alike["id"], alike["likeness"]) == (found["id"], pytest.approx(1.0))
        assert await here.itself.forget("key:7") == 1
        assert await here.itself.recall(Question(query="secretword")) == []
        assert await here.itself.recall(Question(query="x", by="meaning")) == []
        raw = World(tmp_path).raw()
        assert b"secretword" not in raw
        assert answer.encode() not in raw
        assert b"whisper" not in raw


async def test_failures_are_remembered_by_their_code(tmp_path: Path) -> None:
    async with living(tmp_path) as here:
        with pytest.raises(UnknownModel):
            await here.ask(model="nowhere")
        (body,) = bodies(await here.written(), Inference)
        assert (body.outcome, body.model) == ("unknown_model", "nowhere")


async def test_a_peers_request_is_remembered_by_peer_and_never_its_text(tmp_path: Path) -> None:
    network = LoopbackNetwork(random.Random(1))
    async with living(tmp_path / "a", network=network, remember_text=True) as server:
        async with living(tmp_path / "b", network=network, model="none") as door:
            await door.node._network.transport.dial(server.node._network.transport.addresses()[0])
            await until(lambda: bool(door.node.state.models()))
            await door.ask("their secretword")
            await door.ask("a private one", private=True)
            (asked,) = bodies(await door.written(), Inference)
            assert asked.served_by == server.node._network.transport.peer_id
            (served,) = bodies(await server.written(), Inference)
            assert served.subject == door.node._network.transport.peer_id
            assert (served.served_by, served.text, served.answer_tokens) == ("", None, 5)
        await until(lambda: not server.node._network.transport.peers())
        happened = [body.happened for body in bodies(await server.written(), Peer)]
        assert happened == ["joined", "left"]
        assert await server.itself.forget(served.subject) == 3


async def test_a_churning_peer_cannot_fill_the_log(tmp_path: Path) -> None:
    async with living(tmp_path) as here:
        for _ in range(100):
            here.itself.peer("peer", "joined")
        assert len(bodies(await here.written(), Peer)) == PEER_EVENTS_MAX[0]
        assert here.itself.told()["memory"]["dropped"] == {"peer": 100 - PEER_EVENTS_MAX[0]}


# --- state, prediction, history ---


async def test_the_log_replays_to_the_very_state_at_each_prediction(tmp_path: Path) -> None:
    async with living(tmp_path) as here:
        await foretell(here)
        await learn(here)
        await here.ask()
        await foretell(here)
        live = here.itself.state
        assert here.itself.prediction is not None
        log = await here.written()
    assert replayed(log) == live
    outcomes = bodies(log, Outcome)
    ids = {event.id for event in log if event.kind == "prediction"}
    assert {body.prediction for body in outcomes} <= ids
    assert outcomes


async def test_a_restart_goes_on_foretelling(tmp_path: Path) -> None:
    async with living(tmp_path) as here:
        await foretell(here)
        last = here.itself.prediction
    async with living(tmp_path) as here:
        again = here.itself.prediction
        assert last is not None
        assert again is not None
        assert again.figures["latency_s"].value == last.figures["latency_s"].value


async def test_an_idle_node_writes_no_samples_without_news(tmp_path: Path) -> None:
    async with living(tmp_path) as here:
        await here.sampled()
        before = len(bodies(await here.written(), State))
        for _ in range(20):
            await here.sampled()
        assert len(bodies(await here.written(), State)) <= before + 1  # memory may grow by more than its noise, once


async def test_history_is_of_snapshots(tmp_path: Path) -> None:
    async with living(tmp_path) as here:
        await learn(here)
        told = await here.itself.history(("learning.merges", "identity.phase", "learning.rejected"), 100)
        assert told["figures"]["learning.merges"][-1] == 1.0
        assert told["figures"]["learning.merges"][0] is None
        assert told["words"]["identity.phase"][-1] == "running"
        assert told["words"]["learning.rejected"][-1] == "copy=1"
        assert len(told["ts_ms"]) == len(told["words"]["identity.phase"])
        with pytest.raises(BadRequest, match="'mood' is no member"):
            await here.itself.history(("mood",), 1)


@pytest.mark.parametrize(
    ("question", "wanted"),
    [
        (Question(n=0), "n = 0: wanted 1 to 100"),
        (Question(query="x" * 1_001), "1001 characters"),
        (Question(kind="mood"), "kind 'mood' is none"),
        (Question(subject="x" * 129), "129 characters"),
        (Question(query="\ud800"), "half a surrogate pair"),
        (Question(by="meaning"), "an empty text"),
    ],
)
async def test_bad_questions_are_refused_with_a_sentence(tmp_path: Path, question: Question, wanted: str) -> None:
    async with living(tmp_path) as here:
        with pytest.raises(BadRequest, match=wanted):
            await here.itself.recall(question)


async def test_questions_by_kind_subject_and_words_together(tmp_path: Path) -> None:
    async with living(tmp_path) as here:
        ids = [await here.itself.note(f"blue {n}", ("a", "b")[n % 2]) for n in range(6)]
        await here.ask()

        async def found(**asked: Any) -> list[int]:
            return [row["id"] for row in await here.itself.recall(Question(**asked))]

        assert await found(query="blue", n=2) == ids[:3:-1]
        assert await found(query="blue", subject="a") == [ids[4], ids[2], ids[0]]
        assert await found(kind="note", n=1) == [ids[5]]
        assert await found(query="blue", kind="peer") == []
        assert await found(subject="b", kind="note", n=2) == [ids[5], ids[3]]
        (row,) = await here.itself.recall(Question(kind="note", n=1))
        assert row["body"] == {"subject": "b", "text": "blue 5"}
        assert len(row["hash"]) == 64
        with pytest.raises(BadRequest, match="no model embeds"):
            await without_vectors(here)


async def without_vectors(here: Here) -> None:
    here.runtime.facts = replace(here.runtime.facts, embeds=False)
    await here.itself.recall(Question(query="x", by="meaning"))


async def test_notes_have_bounds(tmp_path: Path) -> None:
    async with living(tmp_path, model="none") as here:
        for text, subject in (("", "s"), ("x" * 12_001, "s"), ("x", "s" * 129), ("\udfff", "s")):
            with pytest.raises(BadRequest):
                await here.itself.note(text, subject)
        with pytest.raises(BadRequest, match="an empty subject"):
            await here.itself.forget("")
        with pytest.raises(NotReady, match="no model is loaded"):
            await here.itself.recall(Question(query="x", by="meaning"))


# --- what goes wrong ---


async def test_a_memory_held_by_another_process_costs_no_request_and_is_said(tmp_path: Path) -> None:
    other = World(tmp_path).open()
    async with living(tmp_path) as here:
        assert await here.ask()
        assert here.now("identity.last_stop") == "unread"
        assert here.node.state.readiness().ready
        (sentence,) = here.node.state.readiness().degraded
        assert "is open in another process" in sentence
        (row,) = here.node.state.status()["disk"]["degraded"]
        assert (row["what"], row["reason"]) == ("memory", "locked")
        with pytest.raises(NotReady):
            await here.itself.note("x", "")
    other.close()


async def test_what_another_program_wrote_begins_the_state_afresh_and_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    identity = Identity.load_or_make(tmp_path / "identity.key")
    store = Store(tmp_path / "memory.db", identity)
    store.append([Event(ts_ms=1, body=State(figures={"identity.boot_count": -3.0}))])
    store.close()
    async with living(tmp_path, identity=identity) as here:
        assert (here.now("identity.boot_count"), here.now("identity.last_stop")) == (1, "unread")
        assert "it cannot be read: " in here.itself.told()["before"]
        assert "begins afresh" in caplog.text


async def test_a_figure_that_is_none_costs_its_sample_and_not_the_node(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with living(tmp_path) as here:
        here.node._gossip.observations.rtt(Identity.make().peer_id, float("nan"))
        assert here.node._keeping is not None
        here.node._keeping._sampler.sample_now()
        await until(lambda: "is left out" in caplog.text)
        assert await here.ask()


async def test_an_error_that_ends_the_node_is_no_order(tmp_path: Path) -> None:
    with pytest.raises(BaseExceptionGroup):
        await break_while_it_stops(tmp_path)
    async with living(tmp_path) as here:
        assert here.now("identity.last_stop") == "error"
        (stop,) = bodies(await here.written(), Stop)
        assert stop.reason == "error: ZeroDivisionError"


async def break_while_it_stops(folder: Path) -> None:
    async with living(folder) as here:
        here.node._gossip.withdraw = broken  # type: ignore[method-assign]  # a bug
        os.kill(os.getpid(), signal.SIGTERM)
        await trio.sleep(30)


async def broken() -> None:
    await trio.lowlevel.checkpoint()
    raise ZeroDivisionError


async def test_the_last_event_says_which_signal_came(tmp_path: Path) -> None:
    async with living(tmp_path) as here:
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: not (tmp_path / "ready").exists())
        await until(lambda: here.node._keeping is not None and here.node._keeping._recorder._thread.is_closed)
    identity = Identity.load_or_make(tmp_path / "identity.key")
    store = Store(tmp_path / "memory.db", identity)
    (last,) = store.recent(None, 1)
    assert isinstance(last.body, Stop)
    assert last.body.reason == "SIGTERM"
    assert store.verify() is None
    store.close()


async def test_what_it_costs_is_told_by_part(tmp_path: Path) -> None:
    async with living(tmp_path) as here:
        await here.ask()
        await here.sampled()
        cost = here.itself.told()["cost"]
        assert cost.keys() == {"memory", "state", "sampler", "looks"}
        assert all(cost[part]["cpu_s"] > 0 for part in ("memory", "state", "sampler"))
        assert all(0 <= part["share"] < 1 for part in cost.values())
        assert json.dumps(here.itself.told())
