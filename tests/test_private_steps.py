"""Private steps: each charged before it is taken, over restarts; what a fault costs, and what stays of a Trainer."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest
import torch

from model.batches import Batches
from model.budget import Budget
from model.config import PrivacyConfig, TrainConfig
from model.errors import (
    BadInput,
    BadModel,
    BadState,
    BudgetSpent,
    BudgetUnsaved,
    ComputeFailed,
    OutOfMemory,
)
from model.private import PrivateTrainer
from model.train import Trainer
from model.train_memory import FP32_BYTES, needed_bytes
from tests.private_training import (
    CONFIG,
    CONTEXT,
    DRAW_BYTES,
    PRIVATE,
    SILENT,
    Forced,
    budget,
    first_gradient,
    private,
    some,
    step,
    tiny,
    weights,
)
from tests.toy_training import Toy, batches

# the budget


def test_a_step_is_charged_and_saved_before_it_is_taken() -> None:
    seen: list[tuple[bytes, torch.Tensor]] = []

    def save(content: bytes) -> bool:
        seen.append((content, weights(trainer)))
        return len(seen) != 3

    trainer = PrivateTrainer(Toy(), some(rows=2), CONFIG, Budget(PRIVATE, context=CONTEXT, save=save))
    for number in (1, 2):
        before = weights(trainer)
        step(trainer)
        ledger, at_that_time = seen[-1]
        assert torch.equal(at_that_time, before)
        assert not torch.equal(weights(trainer), before)
        assert budget(ledger=ledger).spent() == trainer.spent()
        assert len(seen) == number
    kept, state = weights(trainer), trainer.state()
    with pytest.raises(BudgetUnsaved):
        step(trainer)
    assert torch.equal(weights(trainer), kept)
    assert trainer.state() == state
    step(trainer)  # begun anew, once the disk is well
    assert (trainer.step, budget(ledger=seen[-1][0]).steps) == (3, 3)


def test_training_is_refused_before_the_step_that_would_go_past() -> None:
    counted = budget()
    for _ in range(3):
        counted.charge(2 / 19)
    model = Toy()
    limited = replace(PRIVATE, epsilon_max=counted.spent())
    trainer = PrivateTrainer(model, some(rows=2), CONFIG, budget(limited))
    for _ in range(3):
        step(trainer)
    kept, passes = weights(trainer), model.passes
    with pytest.raises(BudgetSpent, match=r"one more private step would bring epsilon to .* in 3 steps"):
        trainer.micro_step()
    assert torch.equal(weights(trainer), kept)
    assert model.passes == passes
    assert trainer.spent() == limited.epsilon_max
    trainer.rebase(trainer.start_vector_N * 0.5)  # a new round gives nothing back
    with pytest.raises(BudgetSpent):
        trainer.micro_step()


def test_a_restart_goes_on_counting_and_an_older_ledger_is_refused() -> None:
    ledgers: list[bytes] = []
    saving = Budget(PRIVATE, context=CONTEXT, save=lambda content: ledgers.append(content) is None)
    trainer = PrivateTrainer(Toy(), some(rows=2), CONFIG, saving)
    for _ in range(3):
        step(trainer)
    saved = trainer.state()
    again = PrivateTrainer(Toy(), some(rows=2), CONFIG, budget(ledger=ledgers[-1]))
    again.restore(saved)
    assert torch.equal(weights(again), weights(trainer))
    assert (again.step, again.spent()) == (3, trainer.spent())
    step(again)
    step(trainer)
    assert again.spent() == trainer.spent()
    late = PrivateTrainer(Toy(), some(rows=2), CONFIG, budget(ledger=ledgers[-1]))  # killed between charge and step
    late.restore(saved)
    assert late.spent() == trainer.spent()
    for older in (ledgers[1], None):
        refusing = PrivateTrainer(Toy(), some(rows=2), CONFIG, budget(ledger=older))
        before = refusing.state()
        with pytest.raises(BadState, match="lost or an older copy"):
            refusing.restore(saved)
        assert refusing.state() == before


def test_states_with_and_without_privacy_do_not_pass_as_each_other() -> None:
    plain, secret = Trainer(Toy(), some(rows=2), CONFIG), private(Toy(), some(rows=2))
    for trainer, other in ((plain, secret), (secret, plain)):
        with pytest.raises(BadState, match="another privacy"):
            trainer.restore(other.state())


@pytest.mark.parametrize(
    ("text", "config", "privacy", "words"),
    [
        (some(rows=2), replace(CONFIG, accumulation=10), PRIVATE, "draws 20 rows on average, and the text has 19"),
        (some(rows=2), CONFIG, replace(PRIVATE, delta=1 / 19), "giving away one whole row of 19"),
        (batches(context=9), CONFIG, PRIVATE, "budget is about rows of 8 tokens, and these have 9"),
    ],
)
def test_what_would_keep_no_promise_is_refused(
    text: Batches, config: TrainConfig, privacy: PrivacyConfig, words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        private(Toy(), text, privacy, config)


# faults, and what stays of a Trainer's conduct


def test_a_failure_in_a_step_costs_nothing_and_draws_anew() -> None:
    model = Toy()
    trainer = private(model, some(rows=2), SILENT)
    for fault, kind in ((RuntimeError("no"), ComputeFailed), (MemoryError(), OutOfMemory)):
        trainer._chance = Forced(0)  # all 19 rows
        assert not trainer.micro_step().stepped
        handle = model.register_forward_pre_hook(lambda *_, fault=fault: (_ for _ in ()).throw(fault))
        with pytest.raises(kind, match="step 0 of training"):
            trainer.micro_step()
        handle.remove()
    trainer._chance = Forced(0)
    assert not trainer.micro_step().stepped
    trainer._chance = Forced(255)
    trainer.rebase(trainer.start_vector_N * 0.5)
    assert trainer.spent() == 0.0
    step(trainer)  # no row is drawn: had any of the earlier ones stayed, their gradient would show
    assert not first_gradient(trainer).any()


def test_no_memory_for_noise_takes_no_step_and_the_next_draws_anew() -> None:
    asked: list[int] = []

    def short(count: int) -> bytes:
        asked.append(count)
        if count > DRAW_BYTES and len(asked) < 30:
            raise MemoryError
        return random.Random(len(asked)).randbytes(count)

    trainer = PrivateTrainer(Toy(), some(rows=2), CONFIG, budget(), chance=short)
    with pytest.raises(OutOfMemory, match="step 0"):
        step(trainer)
    assert not trainer.delta().any()
    assert trainer.spent() > 0.0  # on the safe side
    before = len(asked)
    asked += [0] * 30
    step(trainer)
    assert asked[before + 30] == DRAW_BYTES
    assert trainer.step == 1


def test_a_step_that_could_not_be_charged_is_drawn_anew() -> None:
    answers = [False, True]
    unsaved = Budget(SILENT, context=CONTEXT, save=lambda content: answers.pop(0))
    trainer = PrivateTrainer(Toy(), some(rows=2), CONFIG, unsaved, chance=Forced(0))
    with pytest.raises(BudgetUnsaved):
        step(trainer)
    trainer._chance = Forced(255)
    step(trainer)
    assert not first_gradient(trainer).any()  # nothing of the rows drawn first


def test_dropout_is_drawn_in_secret_and_the_chance_of_others_given_back() -> None:
    trainer = private(tiny("gpt2", resid_pdrop=0.3, embd_pdrop=0.3), some(64, rows=19), SILENT)
    other = PrivateTrainer(copy.deepcopy(trainer.model), some(64, rows=19), CONFIG, budget(SILENT))
    torch.manual_seed(4)
    before = torch.get_rng_state()
    step(trainer)
    step(other)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(trainer.delta(), other.delta())


def test_autocast_keeps_fp32() -> None:
    trainer = private(tiny("llama"), some(64, rows=19), SILENT, replace(CONFIG, autocast="on"))
    plain = private(tiny("llama"), some(64, rows=19), SILENT)
    (rounded,), (exact,) = step(trainer), step(plain)
    assert rounded.loss != exact.loss
    assert rounded.loss == pytest.approx(exact.loss, rel=0.02)
    assert {parameter.dtype for parameter in trainer.named.values()} == {torch.float32}


def test_a_layer_that_keeps_statistics_of_rows_is_refused() -> None:
    model = Toy()
    model.add_module("normal", torch.nn.BatchNorm1d(4))
    with pytest.raises(BadModel, match="BatchNorm1d keeps statistics of the rows"):
        private(model, some(rows=2))


def test_the_estimate_of_memory_is_of_one_row_and_a_vector_more() -> None:
    model, many, one = tiny("llama"), some(64, rows=19), some(64, rows=1)
    vector_bytes = FP32_BYTES * sum(parameter.numel() for parameter in model.parameters())
    assert needed_bytes(model, many, CONFIG, private=True) == needed_bytes(model, one, CONFIG) + vector_bytes
    assert needed_bytes(model, one, CONFIG) < needed_bytes(model, many, CONFIG)


@pytest.mark.slow
def test_a_private_model_learns_within_its_budget() -> None:
    text = batches(rows=40, context=CONTEXT, length=20_000)
    privacy = replace(PRIVATE, clip_norm=0.5, delta=1e-5, epsilon_max=1.5)
    trainer = private(Toy(), text, privacy, replace(CONFIG, rate=0.1))
    losses = [step(trainer)[0].loss for _ in range(20)]
    assert trainer.spent() < 1.5
    assert losses[0] > 2.5
    assert sum(losses[-5:]) / 5 < 1.9
