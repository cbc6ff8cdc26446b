"""node/training*.py together: members that found, join, pause, leave and lie, and serve meanwhile. Real time."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

from gossip.round_service import Work
from model.linears import kinds_here
from model.load import load
from node.errors import BadRequest, NotReady
from node.front import Measured
from node.lineage import lineage_of
from node.metrics import prometheus_text
from node.metrics_network import TRAININGS
from node.training_pause import PausePolicy
from node.training_plan import plan_of
from node.training_wish import Privacy, Wished
from tests.node_swarm import ask, work
from tests.tiny_models import save_causal
from tests.training_world import Trainee, common_rounds, grown, until, world

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_causal(path)
    return path


async def test_one_member_alone_trains_and_serves_what_it_learnt(tmp_path: Path, model: Path) -> None:
    async with world(tmp_path, model) as all_of_them:
        one = await all_of_them.start(0)
        before = one.revision
        assert one.status["state"] == "idle"
        told = await one.begin()
        await all_of_them.rounds(3)
        status = one.status
        assert status["run"]["name"] == "tales"
        assert status["run"]["id"] == told["id"]
        assert status["run"]["started_from"] == before
        assert [each["round"] for each in status["rounds"]] == list(range(len(status["rounds"])))
        assert all(each["contributed"] == (one.id,) for each in status["rounds"])
        assert all(each["moved"] > 0 for each in status["rounds"])
        metrics = prometheus_text({}, Measured(training=status))
        untold = {metric.name for metric in TRAININGS if f'\n{metric.name}{{run="tales"}} ' not in metrics}
        assert untold == ({"openagi_training_held_out_loss"} if status["held_out_loss"] is None else set())
        await until(lambda: one.revision == one.status["revision"] and one.revision.startswith("tales-r"))


@pytest.mark.parametrize(
    ("founders", "codec", "momentum"), [(2, "int4", 0.0), (4, "int4", 0.0), (2, "fp32", 0.5)], ids=str
)
async def test_founders_have_equal_weights_and_serve_one_revision(
    tmp_path: Path, model: Path, founders: int, codec: str, momentum: float
) -> None:
    async with world(tmp_path, model) as all_of_them:
        trainees = await grown(all_of_them, founders, codec=codec, momentum=momentum)
        await all_of_them.rounds(3)
        common = common_rounds(*trainees)
        assert max(common) >= 3
        assert all(len(states) == 1 for states in common.values()), "members differ"
        by_round = [{each["round"]: each for each in trainee.status["rounds"]} for trainee in trainees]
        for number in range(2):
            told = [rounds[number] for rounds in by_round]
            assert len({(each["revision"], each["root"], each["rule"]) for each in told}) == 1
        assert all(len(each.status["members"]) == founders for each in trainees)
        for each in trainees[1:]:
            await each.training.pause(is_paused=True)
        await trainees[0].training.pause(is_paused=True)  # nobody works on: all come to rest at one round
        await until(lambda: all(each.status["state"] == "paused" for each in trainees))
        # a round's weights may still be on their way into what is served: the one to wait for is the training's own
        await until(lambda: len({of for each in trainees for of in (each.revision, each.status["revision"])}) == 1)
        revision = trainees[0].revision
        assert revision.startswith("tales-r")

        def seen() -> bool:  # by each node, of each other
            return all(
                {(offer.peer, model.revision) for offer in each.offers() for model in offer.capacity.models}
                >= {(other.id, revision) for other in trainees if other is not each}
                for each in trainees
            )

        await until(seen, lambda: [each.status for each in trainees])
        assert not any(each.blames for each in trainees)
        assert all(each.status["refused"] == {} for each in trainees)


Lie = Callable[[Trainee], None]


def spoils(value: float) -> Lie:
    """An element of each update is this."""

    def lie(liar: Trainee) -> None:
        weights = liar.session.weights
        write = weights.participant.write

        def written(*args: Any, **fields: Any) -> bytes:
            raw = bytearray(write(*args, **fields))
            size = 4 * weights.participant.layout.size
            at = raw.index(b"\xc6" + size.to_bytes(4, "big")) + 5  # the only section of fp32, as bin 32
            raw[at : at + 4] = struct.pack("<f", value)
            return bytes(raw)

        weights.participant.write = written  # type: ignore[method-assign]

    return lie


def claims(tokens: int) -> Lie:
    def lie(liar: Trainee) -> None:
        liar.session.weights.tokens_of = lambda steps: tokens  # type: ignore[method-assign]

    return lie


def cheats(liar: Trainee) -> None:
    """The header says less than the update."""
    contribute = liar.session.service.contribute

    async def contributed(chain: Any, work: Work | None, **fields: Any) -> bool:
        return await contribute(chain, None if work is None else replace(work, steps=1), **fields)

    liar.session.service.contribute = contributed  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("lie", "why"),
    [
        (spoils(float("nan")), "not a number"),
        (spoils(1e30), "not a number of at most"),
        (claims(1_000_000_000), "1,000,000,000 tokens, a round has at most"),
        (cheats, "the header says 1 steps"),
    ],
    ids=["NaN", "1e30", "claims", "header"],
)
async def test_who_lies_is_refused_and_named_and_the_others_go_on(
    tmp_path: Path, model: Path, lie: Lie, why: str
) -> None:
    async with world(tmp_path, model) as all_of_them:
        trainees = await grown(all_of_them, 4, codec="fp32")
        liar, *honest = trainees[::-1]
        await until(lambda: liar.training._session is not None)
        lie(liar)
        await until(lambda: all(liar.id in each.status.get("refused", {}) for each in honest), lambda: honest[0].status)
        begun = max(each.round for each in honest)
        await all_of_them.rounds(begun + 2, *honest)
        for each in honest:
            assert why in each.status["refused"][liar.id]
            assert {peer for peer, _ in each.blames} == {liar.id}
            assert each.status["problem"] == ""
            last = each.status["rounds"][-1]
            assert liar.id not in last["contributed"]
            assert set(last["contributed"]) <= {other.id for other in honest}
        assert all(len(states) == 1 for states in common_rounds(*honest).values())


async def test_a_newcomer_joins_by_the_first_digits_of_the_id_and_is_heard_on_probation(
    tmp_path: Path, model: Path
) -> None:
    async with world(tmp_path, model) as all_of_them:
        founders = await grown(all_of_them, 2, probation=2)
        await all_of_them.rounds(2)
        late = await all_of_them.start(2)
        await late.join(founders[0].status["run"]["id"][:8])
        await until(lambda: any(late.id in each["not_counted"] for each in founders[0].status["rounds"]))
        await until(lambda: any(late.id in each["contributed"] for each in founders[0].status["rounds"]))
        [why] = {
            each["not_counted"][late.id] for each in founders[0].status["rounds"] if late.id in each["not_counted"]
        }
        assert "probation" in why
        assert all(len(states) == 1 for states in common_rounds(late, *founders).values())
        assert late.status["wanted"]["run"] == "tales"


async def test_two_runs_of_one_name_are_told_apart_by_their_ids(tmp_path: Path, model: Path) -> None:
    async with world(tmp_path, model) as all_of_them:
        first, second, third = [await all_of_them.start(number) for number in range(3)]
        ids = sorted([(await each.begin())["id"] for each in (first, second)])
        await until(lambda: first.round >= 0 and second.round >= 0)
        await third.join("tales")
        await until(lambda: third.status["state"] == "stopped", lambda: third.status)
        problem = third.status["problem"]
        assert "there are 2 runs 'tales': join one by its id" in problem
        assert f"({ids[0][:16]}, {ids[1][:16]})" in problem
        await third.join(ids[0][:16])  # the operator's next word
        await until(lambda: third.round >= 0)
        assert third.status["run"]["id"] == ids[0]


async def test_a_short_prefix_is_a_name_and_a_run_that_nobody_is_in_is_sought(tmp_path: Path, model: Path) -> None:
    async with world(tmp_path, model) as all_of_them:
        one, other = [await all_of_them.start(number) for number in range(2)]
        told = await one.begin()
        await until(lambda: one.round >= 0)
        await other.join(told["id"][:7])
        await until(lambda: other.status["state"] == "seeking")
        assert told["id"][:7] in other.status["why"]
        await trio.sleep(0.2)
        assert other.status["state"] == "seeking"
        await other.training.pause(is_paused=True)  # a word meanwhile changes nothing of it
        await other.training.leave()
        await until(lambda: other.status["state"] == "idle")
        with pytest.raises(BadRequest, match="in no run"):
            await other.training.leave()
        with pytest.raises(BadRequest, match="train start"):
            await other.training.pause(is_paused=True)


async def test_a_wish_that_was_paused_while_it_was_sought_keeps_its_plan(tmp_path: Path, model: Path) -> None:
    async with world(tmp_path, model) as all_of_them:
        one = await all_of_them.start(0)
        await one.join()
        await until(lambda: one.status["state"] == "seeking")
        await one.training.pause(is_paused=True)
        other = await all_of_them.start(1)
        await other.begin()
        await until(lambda: one.status["state"] == "paused", lambda: one.status)
        kept = Wished(one.folder / "wish.state").read()
        assert kept is not None
        assert kept.paused
        assert kept.plan is not None
        assert plan_of(kept.plan).name == "tales"


async def test_a_run_of_another_network_or_model_is_refused_in_words(tmp_path: Path, model: Path) -> None:
    save_causal(tmp_path / "other", seed=5)
    async with world(tmp_path, model) as all_of_them:
        one = await all_of_them.start(0)
        await one.begin()
        await until(lambda: one.round >= 0)
        elsewhere = await all_of_them.start(1, network="elsewhere")
        otherwise = await all_of_them.start(2, model=tmp_path / "other")
        for each in (elsewhere, otherwise):
            await each.join()
        await until(lambda: all(each.status["state"] == "stopped" for each in (elsewhere, otherwise)))
        assert elsewhere.status["problem"] == "run tales is of network main, this node is in elsewhere"
        assert otherwise.status["problem"].startswith("run tales starts from the model tiny at revision sha256-")
        assert "this node hosts other at sha256-" in otherwise.status["problem"]
        assert otherwise.status["problem"].endswith("start it with --model tiny")
        assert one.status["problem"] == ""


async def test_a_node_that_serves_in_fewer_bits_trains_with_the_others(tmp_path: Path, model: Path) -> None:
    async with world(tmp_path, model) as all_of_them:
        one, other = await all_of_them.start(0), await all_of_them.start(1, dtype="bfloat16")
        await one.begin(founders=(other.id,))
        await other.join()
        await all_of_them.rounds(2)
        assert all(len(states) == 1 for states in common_rounds(one, other).values())
        await until(lambda: other.revision.startswith("tales-r"))
        assert other.hosting.runtime.facts.dtype == "bfloat16"


@pytest.mark.parametrize("quantize", ["int8", "int4"])
async def test_a_node_that_serves_quantized_trains_with_the_others(tmp_path: Path, model: Path, quantize: str) -> None:
    if quantize not in kinds_here():
        pytest.skip(f"no packed {quantize} layers here")
    async with world(tmp_path, model) as all_of_them:
        one, other = await all_of_them.start(0), await all_of_them.start(1, quantize=quantize)
        await one.begin(founders=(other.id,))
        await other.join()
        await all_of_them.rounds(2)
        assert all(len(states) == 1 for states in common_rounds(one, other).values())
        await until(lambda: other.revision.startswith("tales-r"))
        assert other.revision.endswith(f"-{quantize}")
        assert lineage_of(other.revision) != lineage_of(one.revision)


@pytest.mark.parametrize("asked", [{"lora_rank": 4}, {"privacy": Privacy(epsilon=50.0, delta=1e-4)}], ids=str)
async def test_adapters_and_private_training_go_the_same_way(
    tmp_path: Path, model: Path, asked: dict[str, Any]
) -> None:
    async with world(tmp_path, model) as all_of_them:
        one, other = await grown(all_of_them, 2, **asked)
        await all_of_them.rounds(2)
        assert all(len(states) == 1 for states in common_rounds(one, other).values())
        await until(lambda: one.revision.startswith("tales-r") and other.revision.startswith("tales-r"))
        got = await ask(other.node, work("Once upon a time", 3))
        assert got.error is None
        await one.stop()
        again = await all_of_them.start(0)
        begun = other.round
        await all_of_them.rounds(begun + 1, again, other)
        assert again.status["problem"] == ""


async def test_a_pause_sits_rounds_out_and_resume_goes_on(tmp_path: Path, model: Path) -> None:
    async with world(tmp_path, model) as all_of_them:
        one, other = await grown(all_of_them, 2)
        await all_of_them.rounds(1)
        await one.training.pause(is_paused=True)
        await until(lambda: one.status["state"] == "paused")
        assert "train resume" in one.status["why"]
        assert one.status["paused"] is True
        await until(lambda: sum(one.id in each["sat_out"] for each in other.status["rounds"]) >= 2)
        steps = one.status["work"]["steps"]
        begun = one.round
        await all_of_them.rounds(begun + 2)
        assert one.status["work"]["steps"] == steps
        await one.training.pause(is_paused=False)
        await until(lambda: other.status["rounds"][-1]["contributed"] == tuple(sorted((one.id, other.id))))
        assert one.status["paused"] is False
        assert all(len(states) == 1 for states in common_rounds(one, other).values())


async def test_a_run_in_which_all_rest_makes_no_rounds(tmp_path: Path, model: Path) -> None:
    async with world(tmp_path, model) as all_of_them:
        one = await all_of_them.start(0)
        await one.begin()
        await all_of_them.rounds(1)
        await one.training.pause(is_paused=True)
        await until(lambda: one.status["state"] == "paused")
        assert one.status["step"] == 0  # of this round, not the last one's
        began_s = one.status["round_s"]
        stood = one.round
        await trio.sleep(1.0)
        assert one.round == stood
        assert one.status["round_s"] >= began_s + 0.9


async def test_hours_that_are_over_pause_and_say_so(tmp_path: Path, model: Path) -> None:
    hour = time.localtime().tm_hour
    never = PausePolicy(hours=((hour + 2) % 24, (hour + 3) % 24))
    async with world(tmp_path, model) as all_of_them:
        one = await all_of_them.start(0, policy=never)
        await one.begin()
        await until(lambda: one.status["state"] == "paused")
        assert "o'clock only (train_hours)" in one.status["why"]
        assert one.status["paused"] is False  # the operator said nothing
        assert one.status["work"]["steps"] == 0


async def test_who_leaves_is_gone_for_the_others_and_may_come_again(tmp_path: Path, model: Path) -> None:
    async with world(tmp_path, model) as all_of_them:
        one, other = await grown(all_of_them, 2)
        await all_of_them.rounds(2)
        await one.training.leave()
        assert one.status["state"] in ("leaving", "waiting", "idle")
        with pytest.raises(NotReady, match="leaving"):
            await one.join()
        await until(lambda: one.status["state"] == "idle")
        assert one.status["run"] is None
        assert one.revision.startswith("tales-r")  # what was learnt is served on
        await until(lambda: [each["peer_id"] for each in other.status["members"]] == [other.id])
        assert Wished(one.folder / "wish.state").read() is None
        begun = other.round
        await all_of_them.rounds(begun + 2, other)
        await one.join()  # its engine has other weights than those that the run started from
        await until(lambda: one.round > begun, lambda: one.status)
        assert all(len(states) == 1 for states in common_rounds(one, other).values())


async def test_leaving_ends_also_when_there_is_nobody_to_hear_it(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.training_session.LEAVE_S_MAX", 0.5)
    async with world(tmp_path, model) as all_of_them:
        one, other = await grown(all_of_them, 2)
        await all_of_them.rounds(1)
        await other.stop()
        await until(lambda: one.status["state"] == "waiting" and one.steps > 0)
        await one.training.leave()
        assert one.status["state"] == "leaving"
        await until(lambda: one.status["state"] == "idle", lambda: one.status)


async def test_the_last_member_leaves_at_once(tmp_path: Path, model: Path) -> None:
    async with world(tmp_path, model) as all_of_them:
        one = await all_of_them.start(0)
        await one.begin(steps=1_000)
        await until(lambda: one.steps > 0)
        with trio.fail_after(10):  # and not after a thousand steps
            await one.training.leave()
            await until(lambda: one.status["state"] == "idle", lambda: one.status)
        assert one.status["problem"] == ""


async def test_requests_are_answered_while_a_run_goes_on_and_each_by_one_revision(tmp_path: Path, model: Path) -> None:
    async with world(tmp_path, model) as all_of_them:
        one = await all_of_them.start(0)
        await one.begin()
        await all_of_them.rounds(1)
        revisions = set[str]()
        while len(revisions) < 3:
            got = await ask(one.node, work("Once upon a time", 12))
            assert got.error is None
            assert got.finished is not None
            revisions.add(got.started[0].revision)
        begun = one.round
        await all_of_them.rounds(begun + 2)


async def test_rounds_are_applied_while_requests_never_rest(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training waits for the engine, and what others committed does not wait for training."""
    monkeypatch.setattr("node.training_weights.BUSY_S_MAX", 0.5)
    async with world(tmp_path, model) as all_of_them:
        trainees = await grown(all_of_them, 4)
        await all_of_them.rounds(1)
        busy, *others = trainees
        async with trio.open_nursery() as nursery:

            async def ask_on() -> None:
                while True:
                    async with busy.hosting.generate(work("Once upon a time", 400)) as items:
                        async for _ in items:
                            pass

            for _ in range(2):
                nursery.start_soon(ask_on)
            begun = max(each.round for each in others)
            await all_of_them.rounds(begun + 3, *trainees)
            nursery.cancel_scope.cancel()


async def test_a_run_of_adapters_trains_these_alone_and_serves_them_merged(tmp_path: Path, model: Path) -> None:
    pytest.importorskip("peft", reason="pip install -e '.[adapters]'")
    async with world(tmp_path, model) as all_of_them:
        trainees = await grown(all_of_them, 2, codec="fp32", lora_rank=2, rate=0.02)
        frozen = dict(load(trainees[0].hosting.runtime.loaded.found, dtype="float32").model.named_parameters())
        await all_of_them.rounds(3)
        assert all(len(states) == 1 for states in common_rounds(*trainees).values()), "members differ"
        run = trainees[0].status["run"]
        assert run["parameters"] < sum(value.numel() for value in frozen.values()) / 4
        await until(lambda: trainees[0].revision.startswith("tales-r"))
        _, after = trainees[0].session.weights._newest
        changed = {name for name, value in after.items() if not torch.equal(value, frozen[name])}
        assert changed
        assert all("proj" in name for name in changed)
