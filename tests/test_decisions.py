"""A whole node's decisions read its live self-state: what it foretells, and which peers it remembers over a restart."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from crypto.identity import Identity
from gossip.observations import Observations
from node.config import NodeConfig
from node.consciousness import Forecasts, SelfPrediction
from node.events import Event, Note
from node.expectations import OUTCOMES_MIN
from node.facts import Happened, Predicted
from node.hosting import Hosting
from node.prediction import Expected, Outcome, Prediction, Score
from node.request_ended import Ended
from node.run import Node
from node.self_wiring import Keeping
from p2p.loopback import LoopbackNetwork
from tests.fake_outside import FakeOutside
from tests.test_run import SlowRuntime, signal_me, until

ME = Identity(bytes(range(32)))
GOOD, BAD, TOLD = (Identity(bytes([number]) * 32).peer_id for number in (1, 2, 3))


@asynccontextmanager
async def running(path: Path, **changes: Any) -> AsyncIterator[Node]:
    """A node that is ready, and that ends in order."""
    fields = {"data_dir": path, "http": "off", "mdns": False, **changes}
    async with LoopbackNetwork(random.Random(1)).join(ME) as transport, trio.open_nursery() as nursery:
        node = Node(NodeConfig(**fields), ME, transport, (), lambda _config: SlowRuntime(), outside=FakeOutside())
        nursery.start_soon(node.run)
        await until(lambda: node.state.phase == "running")
        yield node
        signal_me()
        await until(lambda: not nursery.child_tasks)


def keeping_of(node: Node) -> Keeping:
    assert node._keeping is not None
    return node._keeping


async def until_begun(node: Node) -> None:
    await until(lambda: node._keeping is None or node._keeping.itself.state.identity.boot_count is not None)
    await until(lambda: node._keeping is None or node._keeping.itself.state.identity.phase is not None)


def foretell(keeping: Keeping, value: float, low: float, *, outcomes: int = OUTCOMES_MIN) -> None:
    """As if the node had foretold its load, rightly so often."""
    now_ms = keeping._recorder.clock_ms()
    figure = Expected(value=value, naive=value, low=low, high=2 * value)
    prediction = Prediction(from_ms=now_ms, to_ms=now_ms + 60_000, figures={"active_requests": figure})
    for _ in range(outcomes):
        score = Score(measured=value, error=0.0, naive_error=0.0, is_inside=True)
        keeping.itself.take(Happened(outcome=Outcome(prediction=0, figures={"active_requests": score})))
    keeping.itself.take(Predicted(prediction=prediction))


async def seen_by(path: Path, **changes: Any) -> Observations:
    """What a node knows of peers when it has just started."""
    async with running(path, **changes) as node:
        await until_begun(node)
        return node._gossip.observations


@pytest.mark.slow
async def test_a_node_remembers_over_a_restart_which_peers_worked_for_it(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await until_begun(node)
        keeping = keeping_of(node)
        for _ in range(5):
            keeping.ended(
                Ended(
                    account="own", is_hidden=False, model="m", revision="r", prompt_tokens=1, answer_tokens=1,
                    took_s=1.0, outcome="ok", served_by=GOOD,
                )
            )  # fmt: skip
            keeping.peer_failed(BAD, "peer_failed")
        await keeping._recorder.written(Event(ts_ms=1, body=Note(text=f"{TOLD} always works", subject=TOLD)))
    seen = await seen_by(tmp_path)
    assert seen.is_proven(GOOD)
    assert seen.observed(BAD, trio.current_time()).distrusted
    assert TOLD not in seen.peers()
    forgetful = await seen_by(tmp_path, remember_peers=False)
    assert not forgetful.is_proven(GOOD)
    assert not (await seen_by(tmp_path, memory=False)).is_proven(GOOD)


async def test_admission_reads_the_load_that_the_live_self_state_expects(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await until_begun(node)
        hosting, keeping = node.state.backend, keeping_of(node)
        assert isinstance(hosting, Hosting)
        assert hosting.admission._crowd() == 0.0
        foretell(keeping, 6.0, 4.0)
        assert hosting.admission._crowd() == 4.0
        assert hosting.details()["foresight"]["declines"]


async def test_training_reads_it_too_and_an_operator_can_switch_both_off(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await until_begun(node)
        assert node.state.trains is not None
        foretell(keeping_of(node), 6.0, 4.0)
        policy = node.state.trains._wishes.policy  # type: ignore[attr-defined]  # Training's own
        assert (policy.expects() or Expected(value=0.0, naive=0.0, low=0.0, high=0.0)).value == 6.0
    async with running(tmp_path, train_when_busy=True, foresight=False) as node:
        await until_begun(node)
        foretell(keeping_of(node), 6.0, 4.0)
        assert node.state.trains is not None
        assert node.state.trains._wishes.policy.expects() is None  # type: ignore[attr-defined]  # Training's own
        assert isinstance(node.state.backend, Hosting)
        assert not node.state.backend.details()["foresight"]["declines"]


async def test_what_was_foretold_wrongly_is_not_read(tmp_path: Path) -> None:
    async with running(tmp_path) as node:
        await until_begun(node)
        keeping = keeping_of(node)
        foretell(keeping, 6.0, 4.0, outcomes=OUTCOMES_MIN - 1)
        assert keeping.itself.state.self_prediction_error == SelfPrediction(
            active_requests=Forecasts(error=0.0, naive_error=0.0, inside=1.0, outcomes=OUTCOMES_MIN - 1),
            predicted_to_ms=keeping.itself.state.self_prediction_error.predicted_to_ms,
        )
        assert keeping.active() is None
        assert keeping.crowd() == 0.0
