"""node/training*.py together: restarts, damage, full disks, budgets, and what is refused in words. Real time."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest

from node.errors import BadRequest
from node.training import first_wish
from node.training_wish import Begin, Join, Privacy, Wish, Wished
from tests.node_swarm import ask, work
from tests.tiny_models import save_causal, save_encoder
from tests.training_world import common_rounds, grown, root_of, until, world, write_text

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_causal(path)
    return path


async def test_a_restart_goes_on_from_the_disk(tmp_path: Path, model: Path) -> None:
    async with world(tmp_path, model) as all_of_them:
        one = await all_of_them.start(0)
        await one.begin()
        await all_of_them.rounds(3)
        await one.training.pause(is_paused=True)
        await until(lambda: one.status["state"] == "paused")
        stood, base, state = one.round, root_of(one), one.state_at(one.round)
        moment = one.session.weights.participant.trainer.step
        await one.stop()
        again = await all_of_them.start(0)
        await until(lambda: again.status["state"] == "paused")  # a pause outlives a restart
        assert (again.round, root_of(again), again.state_at(again.round)) == (stood, base, state)
        assert again.session.weights.participant.trainer.step == moment
        await until(lambda: again.revision == again.status["revision"])
        assert again.revision.startswith(f"tales-r{stood}-")
        await again.training.pause(is_paused=False)
        await all_of_them.rounds(stood + 2, again)
        assert again.status["problem"] == ""


async def test_a_restart_in_the_middle_of_a_round_goes_on_with_what_it_said(tmp_path: Path, model: Path) -> None:
    async with world(tmp_path, model) as all_of_them:
        one, other = await grown(all_of_them, 2)
        await all_of_them.rounds(1)
        await other.training.pause(is_paused=True)
        await until(lambda: other.status["state"] == "paused")
        await other.stop()
        await until(lambda: one.session.service.history.payloads.own_path(one.round).exists(), lambda: one.status)
        await until(lambda: one.status["state"] == "waiting")
        stood = one.round
        await one.stop()
        one, other = await all_of_them.start(0), await all_of_them.start(1)
        await until(lambda: one.round == stood, lambda: one.status)
        await other.training.pause(is_paused=False)
        await all_of_them.rounds(stood + 2, one, other)
        assert one.status["problem"] == other.status["problem"] == ""
        assert not one.blames
        assert all(len(states) == 1 for states in common_rounds(one, other).values())


@pytest.mark.parametrize("damage", ["newest", "all"])
async def test_states_that_are_damaged_are_passed_over(tmp_path: Path, model: Path, damage: str) -> None:
    async with world(tmp_path, model) as all_of_them:
        one, other = await grown(all_of_them, 2)
        await all_of_them.rounds(4)
        for each in (one, other):
            await each.training.pause(is_paused=True)
        await until(lambda: one.round == other.round and one.status["state"] == other.status["state"] == "paused")
        stood, state = one.round, one.state_at(one.round)
        await one.stop()
        [folder] = [each for each in one.folder.iterdir() if each.is_dir()]
        states = sorted(folder.glob("state-*"), key=lambda path: int(path.name.removeprefix("state-")))
        for path in states if damage == "all" else states[-1:]:
            path.write_bytes(b"nonsense")
        again = await all_of_them.start(0)
        await until(lambda: again.round == stood, lambda: again.status)  # the other has what is missing
        assert again.state_at(stood) == other.state_at(stood) == state
        for each in (again, other):
            await each.training.pause(is_paused=False)
        await all_of_them.rounds(stood + 2, again, other)


async def test_records_that_are_lost_leave_no_weights_of_rounds_that_nobody_knows(tmp_path: Path, model: Path) -> None:
    async with world(tmp_path, model) as all_of_them:
        one = await all_of_them.start(0)
        await one.begin()
        await all_of_them.rounds(4)
        await one.stop()
        [folder] = [each for each in one.folder.iterdir() if each.is_dir()]
        for path in folder.iterdir():
            if not path.name.startswith("state-"):
                path.unlink() if path.is_file() else shutil.rmtree(path)
        again = await all_of_them.start(0)
        await all_of_them.rounds(2, again)
        assert again.status["problem"] == ""
        assert sorted(path.name for path in folder.glob("state-*"))[:2] == ["state-0", "state-1"]


async def test_text_that_is_missing_or_empty_is_said_at_once(tmp_path: Path, model: Path) -> None:
    async with world(tmp_path, model) as all_of_them:
        one = await all_of_them.start(0)
        with pytest.raises(BadRequest, match=r"absent\.txt") as caught:
            await one.training.begin(Begin(name="tales", data=(str(tmp_path / "absent.txt"),)))
        assert caught.value.param == "data"
        (tmp_path / "empty").mkdir()
        with pytest.raises(BadRequest, match="empty"):
            await one.training.join(Join(run="tales", data=(str(tmp_path / "empty"),)))
        assert one.status["state"] == "idle"
        one.text.write_text("too short")
        await one.begin()
        await until(lambda: one.status["state"] == "stopped")
        assert "tokens, and" in one.status["problem"]
        assert "are needed" in one.status["problem"]
        write_text(one.text, 1)
        await one.begin()  # the operator's next word
        await all_of_them.rounds(1)
        assert one.status["problem"] == ""


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"codec": "int5"}, "the codec 'int5' came"),
        ({"rule": "best"}, "rule 'best' is none of"),
        ({"codec": "ef64.2b", "rule": "median"}, "means nothing"),
        ({"founders": ("12D3KooWnobody",)}, "one of its founders is no peer"),
        ({"rate": 0.9999999999}, "cannot be read"),
        ({"outer_rate": 1e-9}, "learns nothing"),
    ],
    ids=str,
)
async def test_a_run_that_cannot_be_is_refused_when_it_is_asked_for(
    tmp_path: Path, model: Path, asked: dict[str, Any], why: str
) -> None:
    async with world(tmp_path, model) as all_of_them:
        one = await all_of_them.start(0)
        with pytest.raises(BadRequest, match=f"such a run cannot be: .*{why}"):
            await one.begin(**asked)
        assert one.status["wanted"] is None


async def test_an_encoder_trains_nothing_and_says_so(tmp_path: Path) -> None:
    save_encoder(tmp_path / "encoder")
    async with world(tmp_path, tmp_path / "encoder") as all_of_them:
        one = await all_of_them.start(0)
        await one.begin()
        await until(lambda: one.status["state"] == "stopped")
        assert "it is an encoder" in one.status["problem"] or "is an encoder" in one.status["problem"]
        await one.training.leave()
        await until(lambda: one.status["state"] == "idle")
        assert one.status["problem"] == ""


async def test_one_run_at_a_time(tmp_path: Path, model: Path) -> None:
    async with world(tmp_path, model) as all_of_them:
        one = await all_of_them.start(0)
        await one.begin()
        with pytest.raises(BadRequest, match=r"in run tales already: .* train leave"):
            await one.begin("fables")
        with pytest.raises(BadRequest, match="in run tales already"):
            await one.join("fables")


async def test_a_wish_from_the_flags_goes_on_with_the_run_of_that_name(tmp_path: Path, model: Path) -> None:
    async with world(tmp_path, model) as all_of_them:
        one = await all_of_them.start(0)
        told = await one.begin()
        await all_of_them.rounds(2)
        seed = one.training._wish.seed if one.training._wish is not None else -1
        await one.stop()
        other_text = write_text(tmp_path / "other.txt", 9)
        again = await all_of_them.start(0, wish=first_wish("tales", (other_text,), None))
        await all_of_them.rounds(3, again)
        assert again.status["run"]["id"] == told["id"]
        assert again.status["wanted"]["data"] == [str(other_text)]
        assert again.training._wish is not None
        assert again.training._wish.seed == seed
        await again.stop()
        last = await all_of_them.start(
            0, wish=first_wish(told["id"][:7], (other_text,), None)
        )  # too few digits: a name
        await until(lambda: last.status["state"] == "seeking")


async def test_a_kept_plan_that_nobody_can_read_ends_no_node(tmp_path: Path, model: Path) -> None:
    async with world(tmp_path, model) as all_of_them:
        folder = tmp_path / "node-0" / "training"
        folder.mkdir(parents=True)
        text = write_text(tmp_path / "text.txt", 1)
        Wished(folder / "wish.state").write(Wish(run="tales", data=(str(text),), seed=1, plan=b"of a later version"))
        one = await all_of_them.start(0)
        await until(lambda: one.status["state"] == "stopped")
        assert "cannot be gone on with" in one.status["problem"]
        await one.stop()
        again = await all_of_them.start(0, wish=first_wish("tales", (text,), None))
        await until(lambda: again.status["state"] == "seeking")


@pytest.mark.parametrize("word", ["join", "resume"])
async def test_a_disk_that_takes_no_weights_ends_training_and_not_the_node(
    tmp_path: Path, model: Path, word: str
) -> None:
    async with world(tmp_path, model) as all_of_them:
        one = await all_of_them.start(0)
        await one.begin()
        await all_of_them.rounds(1)
        one.session.weights._write = full  # type: ignore[method-assign]
        await until(lambda: one.status["state"] == "stopped")
        assert "the weights cannot be kept in" in one.status["problem"]
        assert "No space left" in one.status["problem"]
        got = await ask(one.node, work("Once upon a time", 3))
        assert got.error is None
        if word == "join":  # the operator's next word: it goes on from the disk
            await one.join()
        else:
            await one.training.pause(is_paused=False)
        await until(lambda: one.round >= 2, lambda: one.status)


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


async def test_private_training_counts_what_it_spends_tells_no_losses_and_ends_at_its_budget(
    tmp_path: Path, model: Path
) -> None:
    pytest.importorskip("opacus", reason="pip install -e '.[private]'")
    (tmp_path / "node-0").mkdir()
    write_text(tmp_path / "node-0" / "text.txt", 0, words=700)  # few rows: each step spends much
    async with world(tmp_path, model) as all_of_them:
        one = await all_of_them.start(0)
        await one.begin(privacy=Privacy(epsilon=3.0, delta=1e-4, noise=0.6))
        await until(lambda: bool(one.status["problem"]), lambda: one.status)
        assert "epsilon" in one.status["problem"]
        assert one.status["state"] == "stopped"
        [ledger] = one.folder.glob("privacy-*.state")
        assert ledger.stat().st_size > 0
        await one.stop()
        again = await all_of_them.start(0)  # a restart does not give the budget back
        await until(lambda: bool(again.status["problem"]), lambda: again.status)
        assert "epsilon" in again.status["problem"]
        assert again.steps == 0


async def test_private_training_tells_no_score_and_no_loss(tmp_path: Path, model: Path) -> None:
    pytest.importorskip("opacus", reason="pip install -e '.[private]'")
    async with world(tmp_path, model) as all_of_them:
        trainees = [await all_of_them.start(number) for number in range(2)]
        private = Privacy(epsilon=500.0, delta=1e-4, noise=1.0)
        await trainees[0].begin(founders=all_of_them.peers(1), absent_max=50, privacy=private)
        await trainees[1].join()
        await all_of_them.rounds(3)
        assert trainees[0].status["loss"] is None
        assert trainees[0].status["held_out_loss"] is None
        assert all(each["held_out_loss"] is None for each in trainees[0].status["rounds"])
        assert trainees[1].status["loss"] is not None


async def test_a_damaged_ledger_means_no_training(tmp_path: Path, model: Path) -> None:
    pytest.importorskip("opacus", reason="pip install -e '.[private]'")
    async with world(tmp_path, model) as all_of_them:
        one = await all_of_them.start(0)
        private = Privacy(epsilon=500.0, delta=1e-4, noise=1.0)
        await one.begin(privacy=private)
        await all_of_them.rounds(1)
        await one.stop()
        [ledger] = one.folder.glob("privacy-*.state")
        ledger.write_bytes(b"rust")
        again = await all_of_them.start(0)
        await until(lambda: bool(again.status["problem"]), lambda: again.status)
        assert "what was spent on this text cannot be known" in again.status["problem"]
