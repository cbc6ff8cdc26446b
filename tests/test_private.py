"""Private training: rows clipped one by one, noise that nobody can guess, rows drawn each by itself."""

from __future__ import annotations

import copy
import inspect
import math
import random
import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.grad_sample import GradSampleModule

from model.batches import Batches
from model.data import text_of
from model.errors import (
    Diverged,
)
from model.private import NOISE_BLOCK, PrivateTrainer, add_noise, gaussian, poisson
from model.train import Trainer, next_token_loss
from tests.private_training import (
    CONFIG,
    CONTEXT,
    OPEN,
    PRIVATE,
    SILENT,
    Forced,
    adapted,
    budget,
    first_gradient,
    private,
    some,
    step,
    tied,
    tiny,
    weights,
)
from tests.toy_training import Toy

# without noise and clipping it is the plain trainer


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "gemma", "mamba", "adapters"])
def test_without_noise_and_clipping_the_delta_is_the_plain_trainers(kind: str) -> None:
    make: dict[str, Callable[[], Any]] = {"tied": tied, "adapters": adapted}
    model = make.get(kind, lambda: tiny(kind))()
    # all rows in each step: Poisson sampling at rate 1 draws what an epoch of the permuted order has
    config = replace(CONFIG, accumulation=19, rate=0.001)
    plain = Trainer(copy.deepcopy(model), some(64, rows=1), config)
    secret = private(model, some(64, rows=1), OPEN, config)
    assert secret.rate == 1.0
    for _ in range(2):
        before, after = step(plain)[-1], step(secret)[-1]
        assert after.grad_norm == pytest.approx(before.grad_norm, rel=1e-4)
    assert secret.layout == plain.layout
    # Adam's first steps are signs: where a gradient is near 0 its sign is rounding
    differ = (secret.delta() - plain.delta()).abs()
    assert float((differ > 1e-5).float().mean()) < 0.005
    assert float(differ.max()) <= 2 * 2 * config.rate
    assert secret.spent() == math.inf


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(rows=st.sampled_from([1, 2, 19, 38]), steps=st.integers(1, 4), seed=st.integers(0, 9))
def test_the_same_for_any_number_of_steps(rows: int, steps: int, seed: int) -> None:
    config = replace(CONFIG, accumulation=38 // rows, seed=seed, clip_norm=0.1)
    plain = Trainer(Toy(seed), some(rows=rows, found=40), config)
    secret = private(Toy(seed), some(rows=rows, found=40), OPEN, config)
    for _ in range(steps):
        step(plain)
        step(secret)
    assert secret.step == plain.step == steps
    torch.testing.assert_close(secret.delta(), plain.delta(), rtol=1e-3, atol=1e-5)


# clipping


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("kind", ["llama", "tied", "gemma", "adapters"])
def test_the_clipped_sum_is_that_of_opacus_own_gradients(kind: str) -> None:
    make: dict[str, Callable[[], Any]] = {
        # without a padding token: opacus gives its embedding a gradient, and torch none
        "llama": lambda: tiny("llama", pad_token_id=None),
        "tied": lambda: tiny("llama", pad_token_id=None, tie_word_embeddings=True),
        "adapters": adapted,
        "gemma": lambda: tiny("gemma"),
    }
    model = make[kind]()
    if kind == "gemma":
        model.model.embed_tokens.requires_grad_(False)  # opacus takes no trained layer with a buffer
    text = some(64, rows=19)
    trainer = private(copy.deepcopy(model), text, replace(SILENT, clip_norm=0.5))
    step(trainer)
    other = GradSampleModule(model.train(), loss_reduction="mean")
    torch.autograd.backward(next_token_loss(other, text.training(range(19))))
    grads = {name.removeprefix("_module."): p.grad_sample for name, p in other.named_parameters() if p.requires_grad}
    norm_B = torch.stack([grad.flatten(1).norm(dim=1) for grad in grads.values()]).norm(dim=0)
    assert float(norm_B.max()) > 0.5  # some are clipped
    factor_B = (0.5 / norm_B).clamp(max=1.0)
    wanted = {name: torch.einsum("b,b...->...", factor_B, grad) / 19 for name, grad in grads.items()}
    torch.testing.assert_close(first_gradient(trainer), trainer.layout.flatten(wanted), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("size", [1.0, 1e6, 1e30])
def test_one_row_moves_the_sum_by_clip_norm_at_most(size: float) -> None:
    """The row's gradient is made huge; then the row is taken out, and the sums are compared."""

    def total(*, is_out: bool) -> torch.Tensor:
        model = Toy()
        if is_out:
            model.sick = {7}
        trainer = private(model, some(rows=19), replace(SILENT, clip_norm=0.25))
        trainer.named["head"].register_hook(lambda grad: grad * size if model.passes == 8 else grad)
        step(trainer)
        return first_gradient(trainer).double() * 19

    moved = float((total(is_out=False) - total(is_out=True)).norm())
    assert 0.249 < moved <= 0.25 * (1 + 1e-5)


def test_a_small_gradient_is_left_as_it_is() -> None:
    text = some(rows=19)
    clipped, not_clipped = (private(Toy(), text, replace(SILENT, clip_norm=norm)) for norm in (1e4, math.inf))
    step(clipped)
    step(not_clipped)
    assert torch.equal(weights(clipped), weights(not_clipped))


def test_a_row_whose_numbers_are_not_finite_adds_nothing_and_stops_nothing() -> None:
    sick, overflowing = Toy(), Toy()
    sick.sick = {0, 4}
    first, second = (private(model, some(rows=19), SILENT) for model in (sick, overflowing))
    second.named["head"].register_hook(lambda grad: grad * math.inf if overflowing.passes in (1, 5) else grad)
    for trainer in (first, second):
        (one,) = step(trainer)
        assert one.stepped
        assert math.isfinite(one.loss)
        assert trainer.unusable_rows == 2
    assert torch.equal(weights(first), weights(second))


def test_an_infinite_loss_adds_nothing_though_its_gradient_is_finite() -> None:
    model = Toy()
    model.sure = {0}
    trainer = private(model, some(rows=19), SILENT)
    (one,) = step(trainer)
    assert trainer.unusable_rows == 1
    assert math.isfinite(one.loss)


def test_weights_that_are_not_finite_end_training_and_cost_nothing() -> None:
    trainer = private(Toy(), some(rows=19))
    step(trainer)
    spent = trainer.spent()
    trainer.rebase(torch.full((trainer.layout.size,), math.nan))
    with pytest.raises(Diverged, match="the weights are not finite"):
        trainer.micro_step()
    assert trainer.spent() == spent


# noise


def test_the_noise_of_a_step_has_the_right_deviation() -> None:
    privacy = replace(PRIVATE, noise_multiplier=3.0, clip_norm=0.5)
    noised, silent = (private(tied(), some(64, rows=19), p) for p in (privacy, replace(privacy, noise_multiplier=0.0)))
    step(noised)
    step(silent)
    noise_N = (first_gradient(noised) - first_gradient(silent)).double() * 19
    assert len(noise_N) > 15_000
    assert float(noise_N.std()) == pytest.approx(1.5, rel=0.03)
    assert abs(float(noise_N.mean())) < 0.06
    for part in noised.layout.views(noise_N.float()).values():  # each tensor has it, norms and tied ones too
        assert float(part.std()) == pytest.approx(1.5, rel=0.5)


def test_the_numbers_are_normal_and_independent() -> None:
    drawn_N = gaussian(400_001, random.Random(1).randbytes)
    assert len(drawn_N) == 400_001
    assert float(drawn_N.mean()) == pytest.approx(0.0, abs=0.01)
    for power, moment in ((2, 1.0), (4, 3.0), (6, 15.0)):
        assert float((drawn_N**power).mean()) == pytest.approx(moment, rel=0.05)
    for bound, share in ((1.0, 0.3173), (2.0, 0.0455), (3.0, 0.0027)):
        assert float((np.abs(drawn_N) > bound).mean()) == pytest.approx(share, rel=0.1)
    half = len(drawn_N) // 2
    pairs = np.corrcoef(drawn_N[:half], drawn_N[half + 1 :])[0, 1]  # both of one pair
    neighbours = np.corrcoef(drawn_N[:-1], drawn_N[1:])[0, 1]
    assert max(abs(pairs), abs(neighbours)) < 0.01


@pytest.mark.parametrize("byte", [0, 255])
def test_the_ends_of_the_range_are_finite(byte: int) -> None:
    drawn_N = gaussian(2, lambda count: bytes((byte,)) * count)
    assert np.isfinite(drawn_N).all()
    assert np.abs(drawn_N).max() < 9.0


def test_noise_goes_on_from_block_to_block() -> None:
    total = torch.ones(2, NOISE_BLOCK // 2 + 5)
    add_noise(total, 2.0, random.Random(1).randbytes)
    noise_N = total.flatten() - 1
    assert float(noise_N[-10:].abs().min()) > 0.0
    assert float(noise_N[-10:].std()) > 0.2
    assert not torch.equal(noise_N[:10], noise_N[-10:])
    assert float(noise_N.std()) == pytest.approx(2.0, rel=0.01)


def test_no_seed_gives_the_noise_away_and_no_restart_repeats_it() -> None:
    """Equal in all that is saved or known, and different in what they draw; equal chance gives equal noise."""

    def trainer() -> PrivateTrainer:
        return PrivateTrainer(Toy(), some(rows=19), CONFIG, budget())

    one, other = trainer(), trainer()
    assert inspect.signature(PrivateTrainer).parameters["chance"].default is secrets.token_bytes
    step(one)
    step(other)
    assert not torch.equal(one.delta(), other.delta())
    saved, counted = one.state(), budget(ledger=one._budget.ledger())
    again = PrivateTrainer(Toy(), some(rows=19), CONFIG, counted)
    again.restore(saved)
    step(one)
    step(again)
    assert not torch.equal(one.delta(), again.delta())
    same = [private(Toy(), some(rows=19)) for _ in range(2)]
    for made in same:
        step(made)
    assert torch.equal(same[0].delta(), same[1].delta())


def test_torchs_generator_would_have_taken_half_of_its_seed() -> None:
    """Why noise does not come from it: of 64 bits the generator on a CPU takes 32."""
    streams = [torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in (7, 7 + (1 << 32))]
    assert torch.equal(*streams)


# draws


def test_rows_are_drawn_each_by_itself() -> None:
    chance, count, rate, turns = random.Random(2).randbytes, 50, 0.3, 4_000
    times, sizes, together = np.zeros(count), [], 0
    for _ in range(turns):
        drawn = poisson(count, rate, chance)
        assert drawn == sorted(set(drawn))
        times[drawn] += 1
        sizes.append(len(drawn))
        together += {3, 4} <= set(drawn)
    assert np.abs(times / turns - rate).max() < 0.035
    assert np.mean(sizes) == pytest.approx(count * rate, rel=0.02)
    assert np.var(sizes) == pytest.approx(count * rate * (1 - rate), rel=0.1)  # a batch of one size would have 0
    assert together / turns == pytest.approx(rate**2, abs=0.02)


def test_at_rate_one_all_are_drawn() -> None:
    assert poisson(5, 1.0, random.Random(1).randbytes) == [0, 1, 2, 3, 4]
    assert poisson(5, 1.0 - 2**-53, lambda count: b"\xfe" * count) == [0, 1, 2, 3, 4]


def test_a_draw_without_rows_is_a_step_of_noise_alone() -> None:
    model = Toy()
    trainer = PrivateTrainer(model, some(rows=2), CONFIG, budget(), chance=Forced(255))
    (one,) = step(trainer)
    assert model.passes == 0
    assert (one.stepped, one.tokens) == (True, 2 * CONTEXT)
    assert math.isnan(one.loss)
    assert float((first_gradient(trainer) * 2).std()) == pytest.approx(1.0, rel=0.25)
    assert trainer.spent() > 0.0


def test_a_large_draw_takes_more_micro_batches_is_divided_by_the_expected_rows_and_tells_no_size() -> None:
    model = Toy()
    trainer = PrivateTrainer(model, some(rows=2), CONFIG, budget(OPEN), chance=Forced(0))
    done = step(trainer)
    assert (len(done), model.passes) == (10, 19)
    assert [one.stepped for one in done] == [False] * 9 + [True]
    assert [one.tokens for one in done] == [0] * 9 + [2 * CONTEXT]
    whole = private(Toy(), some(rows=19), OPEN)
    step(whole)
    torch.testing.assert_close(first_gradient(trainer) * 2, first_gradient(whole) * 19, rtol=1e-4, atol=1e-5)


def test_held_out_rows_are_never_drawn() -> None:
    ids_N = torch.arange(40 * (CONTEXT + 1), dtype=torch.int32)
    text = Batches(text_of(ids_N, text_bytes=1, documents=1), context=CONTEXT, rows=19)
    assert text.training_rows == 38
    drawn, held_out = (rows.flatten().tolist() for rows in (text.training(range(38)), text.held_out(2)))
    assert sorted(drawn + held_out) == ids_N.tolist()
    with pytest.raises(AssertionError, match="no such training rows"):
        text.training([38])
    assert text.training([]).shape == (0, CONTEXT + 1)
