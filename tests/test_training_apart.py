"""Members that lose each other: who is too few to end a round trains ahead, and nothing of it is lost. Real time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model.errors import BudgetSpent
from node.training_away import AHEAD_ROUNDS
from tests.node_swarm import ask, work
from tests.test_training import grown
from tests.tiny_models import save_causal
from tests.training_world import SMALL, Trainee, World, common_rounds, root_of, until, world

pytestmark = pytest.mark.slow
AHEAD_MAX = AHEAD_ROUNDS * SMALL["steps"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_causal(path)
    return path


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is away is away soon."""
    monkeypatch.setattr("node.training_away.AWAY_S_MIN", 0.3)
    monkeypatch.setattr("node.training_away.AWAY_ROUNDS", 0)


class Ledger:
    """What a member's feedback must be by all that it trained and sent, reckoned beside it; compared at each change."""

    def __init__(self, trainee: Trainee) -> None:
        self.participant = participant = trainee.session.weights.participant
        self.wanted_N = participant._feedback.unsent_N.clone()
        self.ahead: list[float] = []  # norms of what was trained ahead, as it was noted
        self.sent: list[float] = []  # norms of what was carried into updates
        self._settle, self._adopt, self._write = participant.settle, participant.adopt, participant.write
        participant.settle = self.settle  # type: ignore[method-assign]
        participant.adopt = self.adopt  # type: ignore[method-assign]
        participant.write = self.write  # type: ignore[method-assign]

    def settle(self, lines: Any, *, took_ours: bool) -> Any:
        self._note()
        sent, told = self.participant._sent, self._settle(lines, took_ours=took_ours)
        if took_ours and sent is not None and told.rule != "none":
            self.wanted_N -= sent.dense(0, sent.n)
        self._compare()
        return told

    def adopt(self, raw: bytes, *, took_ours: bool = False) -> None:
        self._note()
        sent = self.participant._sent
        self._adopt(raw, took_ours=took_ours)
        if took_ours and sent is not None:
            self.wanted_N -= sent.dense(0, sent.n)
        self._compare()

    def write(self, number: int, base: Any, *, steps: int, tokens: int) -> bytes:
        self.sent.append(float(self.wanted_N.norm()))
        self._note()
        raw = self._write(number, base, steps=steps, tokens=tokens)
        self._compare()
        return raw

    def _note(self) -> None:
        one = self.participant
        here_N = one.layout.flatten(one.trainer.named)
        if one._written_N is not None:
            self.ahead.append(float((one._written_N - here_N).norm()))
            self.wanted_N += one._written_N - here_N
        elif not torch.equal(here_N, one.trainer.start_vector_N) and not one.is_written:
            self.wanted_N = 0.95 * self.wanted_N + one.trainer.start_vector_N - here_N

    def _compare(self) -> None:
        """Raises AssertionError, which ends the node."""
        assert torch.allclose(self.participant._feedback.unsent_N, self.wanted_N, atol=1e-6)


async def kept(trainee: Trainee) -> Ledger:
    """From now on, between two changes."""
    async with trainee.session.weights.lock:
        return Ledger(trainee)


def cut(all_of_them: World, one: Trainee, *others: Trainee) -> None:
    """Each side is told at once."""
    for other in others:
        all_of_them.wire.partition(one.id, other.id)
        all_of_them.wire.break_connections(one.id, other.id)


async def heal(all_of_them: World, one: Trainee, *others: Trainee) -> None:
    all_of_them.wire.heal()
    for other in others:
        await one.node.network.transport.dial(other.node.address)


def ahead(*trainees: Trainee) -> list[int]:
    return [each.status["work"]["ahead"] for each in trainees]


async def test_two_that_lose_each_other_train_ahead_and_serve_and_lose_nothing_of_it(
    tmp_path: Path, model: Path
) -> None:
    async with world(tmp_path, model) as all_of_them:
        pair = await grown(all_of_them, 2, codec="fp32")
        await all_of_them.rounds(2)
        cut(all_of_them, *pair)
        ledgers = [await kept(each) for each in pair]
        await until(lambda: ahead(*pair) == [AHEAD_MAX] * 2, lambda: [each.status for each in pair])
        await until(lambda: all(each.status["state"] == "waiting" for each in pair))
        stood, steps, roots = pair[0].round, [each.steps for each in pair], [root_of(each) for each in pair]
        sent = [len(each.sent) for each in ledgers]
        await until(lambda: all(each.revision == each.status["revision"] for each in pair))
        got = await ask(pair[0].node, work("Once upon a time", 3))
        assert got.finished is not None
        assert {each.revision for each in got.started} == {pair[0].revision}
        assert pair[0].status["why"] == "until others are back: of 2 voters 1 can be reached, a round needs 2"
        assert [each.steps for each in pair] == steps  # no further
        assert [root_of(each) for each in pair] == roots  # nothing was committed
        assert not any(each.ahead for each in ledgers)  # it is noted when the round is over

        await heal(all_of_them, *pair)
        await until(lambda: all(len(each.sent) > before + 1 for each, before in zip(ledgers, sent, strict=True)))
        assert min(each.round for each in pair) > stood
        assert all(len(states) == 1 for states in common_rounds(*pair).values())
        for each, ledger, before in zip(pair, ledgers, sent, strict=True):
            assert ledger.ahead[0] > 0
            assert ledger.sent[before] > 0.5 * ledger.ahead[0]  # in the next update
            assert ledger.sent[before + 1] < 0.1 * ledger.ahead[0]  # and, by fp32, in no later one
            assert each.status["work"]["ahead"] == 0
            assert each.status["problem"] == ""


async def test_one_of_four_alone_trains_ahead_and_adopts_what_the_three_committed(tmp_path: Path, model: Path) -> None:
    async with world(tmp_path, model) as all_of_them:
        four = await grown(all_of_them, 4, codec="fp32")
        await all_of_them.rounds(1)
        *three, alone = four
        cut(all_of_them, alone, *three)
        ledger = await kept(alone)
        await until(lambda: ahead(alone) == [AHEAD_MAX], lambda: alone.status)
        stood, revision, sent = alone.round, alone.status["revision"], len(ledger.sent)
        await all_of_them.rounds(stood + 5, *three)
        assert ahead(*three) == [0] * 3
        assert alone.round == stood
        await until(lambda: alone.revision == revision)

        await heal(all_of_them, alone, *three)
        begun = max(each.round for each in three)
        await until(
            lambda: any(
                alone.id in each["contributed"] and each["round"] >= begun for each in three[0].status["rounds"]
            ),
            lambda: [each.status for each in four],
        )
        assert ledger.ahead[0] > 0
        assert ledger.sent[sent] > 0.5 * ledger.ahead[0]
        assert all(len(states) == 1 for states in common_rounds(*four).values())
        assert alone.status["problem"] == ""


async def test_training_ahead_rests_when_it_is_to_and_ends_with_the_round(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.training_session.AHEAD_ROUNDS", 1_000_000)  # it never comes to its bound
    async with world(tmp_path, model) as all_of_them:
        one, other = await grown(all_of_them, 2)
        await all_of_them.rounds(1)
        cut(all_of_them, one, other)
        await until(lambda: min(ahead(one, other)) >= 3)
        stood = one.round
        assert one.status["state"] == "training"
        assert one.status["why"].startswith("ahead of the round until others are back: of 2 voters 1 can be reached")
        await one.training.pause(is_paused=True)
        await until(lambda: one.status["state"] == "waiting")
        rested = ahead(one)
        await until(lambda: ahead(other)[0] > rested[0] + 20)
        assert ahead(one) == rested
        await one.training.pause(is_paused=False)
        await until(lambda: ahead(one) > rested)
        assert one.round == other.round == stood
        got = await ask(one.node, work("Once upon a time", 12))  # a request comes between
        assert got.error is None
        await heal(all_of_them, one, other)
        await all_of_them.rounds(stood + 2)
        assert all(len(states) == 1 for states in common_rounds(one, other).values())


async def test_what_was_trained_ahead_outlives_a_restart(tmp_path: Path, model: Path) -> None:
    async with world(tmp_path, model) as all_of_them:
        one, other = await grown(all_of_them, 2, codec="fp32")
        await all_of_them.rounds(1)
        await other.stop()
        await until(lambda: ahead(one) == [AHEAD_MAX], lambda: one.status)
        stood, participant = one.round, one.session.weights.participant
        assert participant._written_N is not None
        way = participant._written_N - participant.layout.flatten(participant.trainer.named)
        await one.stop()
        again = await all_of_them.start(0)
        await until(lambda: again.round == stood, lambda: again.status)
        assert way.norm() > 0  # and all of the update counts as sent
        restored = again.session.weights.participant
        await until(lambda: torch.allclose(restored._feedback.unsent_N, way, atol=1e-7))
        back = await all_of_them.start(1)
        await all_of_them.rounds(stood + 2, again, back)
        assert all(len(states) == 1 for states in common_rounds(again, back).values())


async def test_a_budget_that_is_spent_ahead_ends_no_round_that_was_announced(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.training_session.AHEAD_ROUNDS", 1_000_000)  # so that it trains ahead when it is spent
    async with world(tmp_path, model) as all_of_them:
        one, other = await grown(all_of_them, 2)
        await all_of_them.rounds(1)
        cut(all_of_them, one, other)
        await until(lambda: min(ahead(one, other)) >= 1)
        stood, participant = one.round, one.session.weights.participant

        def spent() -> Any:
            raise BudgetSpent("private training of this text is over")

        participant.step = spent  # type: ignore[method-assign]
        await until(lambda: "training of this text is over" in one.status["why"], lambda: one.status)
        assert one.status["state"] == "waiting"
        assert one.status["problem"] == ""
        await heal(all_of_them, one, other)
        await all_of_them.rounds(stood + 1, other)  # with its vote
        await until(lambda: one.status["state"] == "stopped")
        assert one.status["problem"] == "private training of this text is over"


async def test_who_trains_ahead_may_leave(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.training_session.AHEAD_ROUNDS", 1_000_000)
    monkeypatch.setattr("node.training_session.LEAVE_S_MAX", 0.5)
    async with world(tmp_path, model) as all_of_them:
        one, other = await grown(all_of_them, 2)
        await all_of_them.rounds(1)
        await other.stop()
        await until(lambda: ahead(one)[0] >= 3)
        await one.training.leave()
        steps = one.steps
        await until(lambda: one.status["state"] == "idle", lambda: one.status)
        assert one.steps <= steps + 1
