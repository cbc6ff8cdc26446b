"""Held-out loss and scores: the same each time, right in sign, and nothing is left changed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from model.batches import Batches
from model.config import TrainConfig
from model.data import find_texts, finish, read_texts
from model.errors import BadText, Diverged
from model.evaluate import (
    LOSS_NATS_MAX,
    ROWS_MAX,
    SCORE_ROWS_MIN,
    Score,
    bytes_predicted,
    held_out_loss,
    score,
    scoring,
)
from model.tokens import Tokens
from model.train import Trainer
from tests.test_train import tiny
from tests.tiny_models import byte_tokenizer
from tests.toy_training import VOCABULARY, Toy, WholeDelta, batches

CONFIG = TrainConfig(seed=1, rate=0.01, warmup_steps=0, autocast="off")


@pytest.fixture
def trainer() -> Trainer:
    """Ten steps into its round."""
    made = Trainer(Toy(), batches(), CONFIG)
    for _ in range(10):
        made.micro_step()
    return made


@pytest.fixture
def rows() -> torch.Tensor:
    return batches().held_out(SCORE_ROWS_MIN)


def test_the_loss_is_the_mean_over_all_predicted_tokens(rows: torch.Tensor) -> None:
    model = Toy()
    logits = model(input_ids=rows[:, :-1], use_cache=False, return_dict=True).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    loss = finish(held_out_loss(model, rows))
    assert loss.nats_per_token == pytest.approx(expected.item(), rel=1e-6)
    assert loss.tokens == 16 * 8


def test_dropout_is_off_the_loss_repeats_and_the_mode_comes_back() -> None:
    model, ids_BT = tiny("gpt2").train(), batches(64).held_out(3)
    losses = {finish(held_out_loss(model, ids_BT)).nats_per_token for _ in range(2)}
    assert len(losses) == 1
    assert model.training
    reading = held_out_loss(model, ids_BT)
    next(reading)
    assert not model.training
    reading.close()
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_one_row_a_hop_and_a_bound_on_rows() -> None:
    model = Toy()
    assert len(list(held_out_loss(model, batches().held_out(5)))) == 5
    assert model.passes == 5
    with pytest.raises(AssertionError, match="wanted 1 to"):
        next(held_out_loss(model, torch.zeros(ROWS_MAX + 1, 4, dtype=torch.int64)))


def test_bits_a_byte_are_those_of_the_text(tmp_path: Path) -> None:
    tokens = Tokens(byte_tokenizer())
    (tmp_path / "a.txt").write_text("Once upon a time there was a king who had a daughter.\n" * 200)
    text = finish(read_texts(find_texts([tmp_path]), tokens))
    ids_BT = Batches(text, context=15, rows=1).held_out(4)
    expected = sum(len(tokens.decode(row[1:].tolist())) for row in ids_BT)  # ASCII: a letter is a byte
    assert bytes_predicted(ids_BT, tokens) == expected
    model = Toy()
    with torch.no_grad():
        model.head.zero_()  # knows nothing: each of 11 tokens is as likely
    loss = finish(held_out_loss(model, batches().held_out(4)))
    assert loss.bits_per_byte(32 * 3) == pytest.approx(math.log2(VOCABULARY) / 3)


def test_what_was_learnt_scores_above_its_opposite_and_weights_come_back(trainer: Trainer, rows: torch.Tensor) -> None:
    own = trainer.layout.flatten(trainer.named)
    learnt = WholeDelta(trainer.delta())
    good, bad = score(trainer, learnt, rows), score(trainer, WholeDelta(-learnt.vector_N), rows)
    assert good.fall_nats > 0 > bad.fall_nats
    assert good.before_nats == bad.before_nats
    assert torch.equal(trainer.layout.flatten(trainer.named), own)
    assert trainer.model.training
    assert trainer.micro_step().stepped


def test_a_score_applies_a_share_of_the_delta_to_the_start(trainer: Trainer, rows: torch.Tensor) -> None:
    delta = WholeDelta(trainer.delta())
    whole = score(trainer, delta, rows, share=1.0)
    end = finish(held_out_loss(trainer.model, rows)).nats_per_token
    assert whole.before_nats - whole.fall_nats == pytest.approx(end, rel=1e-5)
    fifth = WholeDelta(trainer.delta() * 0.2)
    assert score(trainer, delta, rows).fall_nats == pytest.approx(
        score(trainer, fifth, rows, share=1.0).fall_nats, rel=1e-4
    )
    assert score(trainer, delta, rows).share == 0.2
    trainer.rebase(trainer.start_vector_N)
    start = finish(held_out_loss(trainer.model, rows)).nats_per_token
    assert whole.before_nats == start


def test_what_is_longer_than_the_bound_is_scored_as_long_as_that(trainer: Trainer, rows: torch.Tensor) -> None:
    learnt_N = trainer.delta()
    tenfold, length = WholeDelta(-10 * learnt_N), float(learnt_N.norm())
    clipped = score(trainer, tenfold, rows, norm_max=length)
    assert clipped.share == pytest.approx(0.02, rel=1e-4)
    assert clipped.fall_nats == pytest.approx(score(trainer, WholeDelta(-learnt_N), rows).fall_nats, rel=1e-2)
    assert clipped.fall_nats > score(trainer, tenfold, rows).fall_nats
    assert score(trainer, WholeDelta(learnt_N), rows, norm_max=2 * length) == score(trainer, WholeDelta(learnt_N), rows)
    zero = score(trainer, WholeDelta(0 * learnt_N), rows, norm_max=length)
    assert (zero.fall_nats, zero.share) == (0.0, 0.2)


def test_many_deltas_are_judged_in_order_each_from_the_same_start(trainer: Trainer, rows: torch.Tensor) -> None:
    learnt = trainer.delta()
    deltas = [WholeDelta(learnt * factor) for factor in (1.0, -1.0, 0.0, 1.0)]
    seen = list(scoring(trainer, deltas, rows))
    found = [one for one in seen if one is not None]
    assert len(seen) == 5 * len(rows) + 4  # a hop for each row of the start and of each delta, and one that tells
    assert found == [score(trainer, delta, rows) for delta in deltas]
    assert found[2] == Score(fall_nats=0.0, before_nats=found[0].before_nats, share=0.2)
    assert found[0] == found[3]


@pytest.mark.parametrize("hops", [1, 17, 20, 33])
def test_a_scoring_that_is_given_up_leaves_nothing_behind(trainer: Trainer, rows: torch.Tensor, hops: int) -> None:
    own = trainer.layout.flatten(trainer.named)
    judging = scoring(trainer, [WholeDelta(trainer.delta())] * 2, rows)
    for _ in range(hops):
        next(judging)
    with pytest.raises(AssertionError, match="an evaluation is under way"):
        trainer.micro_step()
    judging.close()
    assert torch.equal(trainer.layout.flatten(trainer.named), own)
    assert trainer.micro_step().stepped


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_a_delta_that_ruins_the_model_scores_a_finite_loss(trainer: Trainer, rows: torch.Tensor, poison: float) -> None:
    own = trainer.layout.flatten(trainer.named)
    judged = score(trainer, WholeDelta(torch.full_like(trainer.delta(), poison)), rows)
    assert judged.fall_nats == judged.before_nats - LOSS_NATS_MAX
    assert torch.equal(trainer.layout.flatten(trainer.named), own)


def test_a_ruined_start_is_told(trainer: Trainer, rows: torch.Tensor) -> None:
    trainer.rebase(torch.full_like(trainer.start_vector_N, math.nan))
    with pytest.raises(Diverged, match="no finite held-out loss"):
        score(trainer, WholeDelta(trainer.delta()), rows)


def test_too_few_rows_are_no_judgement(trainer: Trainer, rows: torch.Tensor) -> None:
    with pytest.raises(BadText, match="a score needs 16 held-out rows and this text has 15: give 2 times as much"):
        score(trainer, WholeDelta(trainer.delta()), rows[:15])


def test_a_delta_is_decoded_slice_by_slice(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    from model import evaluate

    vector = torch.arange(trainer.layout.size, dtype=torch.float32)
    whole = evaluate._moved(trainer.start_vector_N, WholeDelta(vector), 0.5)
    monkeypatch.setattr(evaluate, "SLICE", 10)
    assert torch.equal(evaluate._moved(trainer.start_vector_N, WholeDelta(vector), 0.5), whole)
    assert torch.equal(whole, trainer.start_vector_N - vector * 0.5)
