"""Training: AdamW to the letter, restarts to the bit, steps that are skipped, and a model that serves meanwhile."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from msgspec import structs

from crypto.canonical import convert, decode_canonical, encode_struct
from model import train_memory
from model.batches import Batches
from model.config import TrainConfig
from model.data import text_of
from model.errors import BadInput, BadState, ComputeFailed, Diverged, OutOfMemory
from model.load import Found, Loaded, load
from model.train import BETAS, EPSILON, MicroStep, Trainer, next_token_loss
from model.train_memory import needed_bytes, training_copy
from model.train_state import Numbers, SavedState, pack
from tests.tiny_models import causal_config, save_causal, save_encoder
from tests.toy_training import Toy, batches

IMPORTED = (transformers.LlamaForCausalLM, transformers.GPT2LMHeadModel)  # takes seconds, once: not in a test's time
KINDS = ("llama", "qwen3", "gpt2", "mistral", "gemma", "gemma2", "phi", "mamba")
CONFIG = TrainConfig(seed=1, rate=0.01, warmup_steps=0, autocast="off")


def tiny(kind: str, **changes: Any) -> Any:
    """A random model in fp32; GPT-2's has dropout."""
    torch.manual_seed(0)
    config = causal_config(kind, 64)
    for name, value in {"initializer_range": 0.1, **changes}.items():
        setattr(config, name, value)
    return transformers.AutoModelForCausalLM.from_config(config)


def steps(trainer: Trainer, count: int) -> list[MicroStep]:
    return [replace(trainer.micro_step(), cpu_s=0.0) for _ in range(count)]


def weights(trainer: Trainer) -> torch.Tensor:
    return trainer.layout.flatten(trainer.named)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A model that serves, in bf16."""
    path = tmp_path_factory.mktemp("llama")
    save_causal(path)
    return load(Found("tiny", path, path), device="cpu", dtype="bfloat16")


# what a step does


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_trains(kind: str) -> None:
    model = tiny(kind)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    trainer = Trainer(model, batches(64), CONFIG)
    before = trainer.start_vector_N.clone()
    first, second = steps(trainer, 2)
    assert (first.step, second.step, first.tokens) == (0, 1, 16)
    assert first.stepped
    assert math.isfinite(first.loss + second.loss)
    moved = trainer.layout.views(trainer.delta())
    still = [name for name, change in moved.items() if not change.any()]
    assert still == []
    assert torch.equal(trainer.start_vector_N, before)
    assert torch.equal(trainer.delta(), before - weights(trainer))
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_tied_embeddings_are_one_tensor() -> None:
    model = tiny("llama", tie_word_embeddings=True)
    trainer = Trainer(model, batches(64), CONFIG)
    assert trainer.layout.size == sum(parameter.numel() for parameter in model.parameters())
    steps(trainer, 1)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_needs_no_gradient_is_neither_trained_nor_in_the_vector() -> None:
    model = tiny("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    frozen = model.model.embed_tokens.weight.clone()
    trainer = Trainer(model, batches(64), CONFIG)
    steps(trainer, 2)
    assert torch.equal(model.model.embed_tokens.weight, frozen)
    assert trainer.layout.size == sum(p.numel() for p in model.parameters()) - frozen.numel()


def test_a_step_is_adamw_to_the_letter() -> None:
    config = replace(CONFIG, warmup_steps=4, weight_decay=0.3, clip_norm=0.5)
    trainer, other = Trainer(Toy(), batches(), config), Toy()
    steps(trainer, 3)
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in other.named_parameters()}
    for step in range(3):
        other.zero_grad()
        torch.autograd.backward(next_token_loss(other, batches().batch(config.seed, step)))
        norm = torch.cat([p.grad.flatten() for p in other.parameters() if p.grad is not None]).norm()
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                assert parameter.grad is not None
                gradient = parameter.grad * min(1.0, 0.5 / float(norm))
                first, second = moments[name]
                first.mul_(BETAS[0]).add_(gradient * (1 - BETAS[0]))
                second.mul_(BETAS[1]).add_(gradient.square() * (1 - BETAS[1]))
                rate = config.rate * (step + 1) / 4
                parameter.mul_(1 - rate * (config.weight_decay if parameter.ndim > 1 else 0.0))
                right = (second / (1 - BETAS[1] ** (step + 1))).sqrt() + EPSILON
                parameter.sub_(rate * first / (1 - BETAS[0] ** (step + 1)) / right)
    torch.testing.assert_close(weights(trainer), trainer.layout.flatten(dict(other.named_parameters())))


def test_accumulated_micro_batches_are_one_large_batch() -> None:
    config = replace(CONFIG, accumulation=3)
    whole, parts = Trainer(Toy(), batches(rows=6), CONFIG), Trainer(Toy(), batches(rows=2), config)
    (large,), small = steps(whole, 1), steps(parts, 3)
    assert [one.stepped for one in small] == [False, False, True]
    assert [one.grad_norm is None for one in small] == [True, True, False]
    assert small[2].grad_norm == pytest.approx(large.grad_norm, rel=1e-5)
    assert sum(one.loss for one in small) / 3 == pytest.approx(large.loss, rel=1e-6)
    torch.testing.assert_close(weights(parts), weights(whole))


def test_checkpointing_changes_nothing_but_memory() -> None:
    (plain,) = steps(Trainer(tiny("gpt2"), batches(64), CONFIG), 1)
    (saved,) = steps(Trainer(tiny("gpt2"), batches(64), replace(CONFIG, checkpointing=True)), 1)
    assert saved.loss == plain.loss
    assert saved.grad_norm == pytest.approx(plain.grad_norm, rel=1e-5)
    with pytest.raises(BadInput, match="Toy has no gradient checkpointing"):
        Trainer(Toy(), batches(), replace(CONFIG, checkpointing=True))


def test_autocast_computes_in_bf16_and_keeps_fp32() -> None:
    (plain,) = steps(Trainer(tiny("llama"), batches(64), CONFIG), 1)
    trainer = Trainer(tiny("llama"), batches(64), replace(CONFIG, autocast="on"))
    (rounded,) = steps(trainer, 1)
    assert rounded.loss != plain.loss
    assert rounded.loss == pytest.approx(plain.loss, rel=0.02)
    assert {parameter.dtype for parameter in trainer.named.values()} == {torch.float32}


def test_chance_is_drawn_by_step_and_given_back() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    (first,) = steps(Trainer(tiny("gpt2"), batches(64), CONFIG), 1)
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), before)
    trainer = Trainer(tiny("gpt2"), batches(64), CONFIG)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    (again,) = steps(trainer, 1)
    assert torch.equal(torch.get_rng_state(), before)  # a request that samples meanwhile sees no training
    assert again == first  # dropout does not depend on what else drew


@pytest.mark.slow
def test_a_model_learns() -> None:
    trainer = Trainer(tiny("llama"), batches(11, rows=8, context=16), replace(CONFIG, rate=0.01))
    losses = [one.loss for one in steps(trainer, 30)]
    assert losses[0] > 3.5  # of 64 tokens it knows nothing: log 64 is 4.2
    assert sum(losses[-5:]) / 5 < 1.5


# steps that are skipped


def test_a_loss_that_is_no_number_changes_nothing_and_is_counted() -> None:
    model = Toy()
    model.sick = {1, 2, 4}
    trainer = Trainer(model, batches(), CONFIG)
    steps(trainer, 1)
    kept, moments = weights(trainer), trainer.state()
    bad = steps(trainer, 2)
    assert [(one.stepped, one.skipped) for one in bad] == [(False, True), (False, True)]
    assert math.isnan(bad[0].loss)
    assert torch.equal(weights(trainer), kept)
    assert trainer.state().vectors == moments.vectors  # the optimiser's moments too
    good, worse, last = steps(trainer, 3)
    assert good.stepped
    assert worse.skipped
    assert last.stepped  # the count begins anew after a good step
    assert (trainer.step, trainer.skipped) == (6, 3)
    assert torch.isfinite(weights(trainer)).all()


def test_one_bad_micro_batch_spoils_its_step_alone() -> None:
    model = Toy()
    model.sick = {2}
    trainer = Trainer(model, batches(), replace(CONFIG, accumulation=2))
    before = weights(trainer)
    steps(trainer, 2)
    kept = weights(trainer)
    assert not torch.equal(kept, before)
    assert [one.skipped for one in steps(trainer, 2)] == [False, True]
    assert torch.equal(weights(trainer), kept)
    assert steps(trainer, 2)[1].stepped


def test_a_gradient_that_is_no_number_is_skipped_like_a_loss() -> None:
    trainer = Trainer(Toy(), batches(), CONFIG)
    handle = trainer.named["head"].register_hook(lambda gradient: gradient * math.inf)
    (one,) = steps(trainer, 1)
    assert math.isfinite(one.loss)
    assert one.skipped
    assert not trainer.delta().any()
    handle.remove()
    assert steps(trainer, 1)[0].stepped


def test_an_infinite_loss_is_skipped_though_its_gradient_is_finite() -> None:
    model = Toy()
    model.sure = {0}
    trainer = Trainer(model, batches(), CONFIG)
    (one,) = steps(trainer, 1)
    assert one.loss == math.inf
    assert one.skipped
    assert not trainer.delta().any()


def test_three_in_a_row_end_training() -> None:
    model = Toy()
    model.sick = {5, 6, 7}
    trainer = Trainer(model, batches(), CONFIG)
    steps(trainer, 7)
    kept = weights(trainer)
    with pytest.raises(Diverged, match=r"training ends at step 7: .* choose a rate below 0\.01"):
        trainer.micro_step()
    assert torch.equal(weights(trainer), kept)


# restarts


def run_on(kind: str, micro_steps: int, saved: SavedState | None = None) -> tuple[Trainer, list[MicroStep]]:
    trainer = Trainer(tiny(kind), batches(64), replace(CONFIG, accumulation=2, warmup_steps=3))
    if saved is not None:
        trainer.restore(saved)
    return trainer, steps(trainer, micro_steps)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_restart_goes_on_to_the_bit(kind: str) -> None:
    whole, undisturbed = run_on(kind, 8)
    stopped, _ = run_on(kind, 5)  # in the middle of the third step
    assert stopped.step == 2
    torch.manual_seed(99)
    again, rest = run_on(kind, 4, stopped.state())
    assert rest == undisturbed[4:]
    assert torch.equal(weights(again), weights(whole))
    assert again.state() == whole.state()
    assert torch.equal(again.delta(), whole.delta())


def test_a_restart_in_a_later_round_after_a_skipped_step_goes_on_to_the_bit() -> None:
    models = [Toy() for _ in range(2)]
    whole, stopped = (Trainer(model, batches(), CONFIG) for model in models)
    for model, trainer in zip(models, (whole, stopped), strict=True):
        model.sick = {1, 2}
        steps(trainer, 2)
        trainer.rebase(trainer.start_vector_N * 0.9)
    steps(whole, 3)
    steps(stopped, 1)
    again = Trainer(Toy(), batches(), CONFIG)
    again.restore(stopped.state())
    assert (again.step, again.skipped) == (3, 2)
    steps(again, 2)
    assert again.state() == whole.state()
    assert torch.equal(again.delta(), whole.delta())


def test_a_rebased_trainer_goes_on_from_there_with_its_moments() -> None:
    trainer = Trainer(Toy(), batches(), replace(CONFIG, accumulation=2))
    steps(trainer, 5)
    committed = torch.arange(trainer.layout.size, dtype=torch.float32) / 100
    given = committed.clone()
    trainer.rebase(given)
    given.zero_()
    assert torch.equal(weights(trainer), committed)
    assert torch.equal(trainer.start_vector_N, committed)
    assert not trainer.delta().any()
    first, second = steps(trainer, 2)  # the step under way began anew: its first gradient was of other weights
    assert (first.step, first.stepped, second.stepped) == (2, False, True)
    fresh = Trainer(Toy(), batches(), replace(CONFIG, accumulation=2))
    fresh.rebase(committed)
    steps(fresh, 6)
    assert not torch.equal(fresh.delta(), trainer.delta())


@pytest.fixture
def saved() -> SavedState:
    trainer = Trainer(Toy(), batches(), CONFIG)
    steps(trainer, 2)
    return trainer.state()


@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        (lambda: Trainer(Toy(), batches(), replace(CONFIG, seed=2)), "another seed"),
        (lambda: Trainer(Toy(), batches(length=4_001), CONFIG), "another text"),
        (lambda: Trainer(Toy(), batches(context=9), CONFIG), "another context"),
        (lambda: Trainer(Toy(), batches(rows=3), replace(CONFIG, accumulation=2)), "another rows and accumulation"),
        (lambda: Trainer(tiny("llama"), batches(), CONFIG), "another layout"),
    ],
)
def test_a_state_of_another_course_is_refused(saved: SavedState, trainer: Any, words: str) -> None:
    with pytest.raises(BadState, match=words):
        trainer().restore(saved)


def test_a_damaged_state_is_refused_and_changes_nothing(saved: SavedState) -> None:
    trainer = Trainer(Toy(), batches(), CONFIG)
    other = trainer.state()
    before = trainer.state()
    spoilt = bytearray(saved.vectors)
    spoilt[-1] ^= 1
    cases = {
        "numbers of the saved state are damaged": replace(saved, numbers=saved.numbers[:-1]),
        "not a Numbers": replace(saved, numbers=b"\x80"),
        "version 2, wanted 1": replace(saved, numbers=saved.numbers.replace(b"version\x01", b"version\x02")),
        "too many for 92 parameters": replace(saved, vectors=saved.vectors + bytes(2_000)),
        "are not those of its numbers": replace(saved, vectors=bytes(spoilt)),
        "vectors of the saved state are not": replace(saved, vectors=other.vectors),
    }
    numbers = convert(decode_canonical(saved.numbers), Numbers)
    cases["does not hold start, weights, first_moment, second_moment of 92"] = pack(
        numbers, tuple(torch.zeros(5) for _ in range(4))
    )
    junk = structs.replace(numbers, vectors=hashlib.sha256(b"junk").digest())
    cases["are no safetensors"] = SavedState(numbers=encode_struct(junk), vectors=b"junk")
    for words, state in cases.items():
        with pytest.raises(BadState, match=words):
            trainer.restore(state)
    assert trainer.state() == before


# beside a model that serves


def test_the_copy_is_fp32_and_the_model_that_serves_is_not_touched(loaded: Loaded) -> None:
    served = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    vocabulary = loaded.facts.vocabulary
    trainer = Trainer(training_copy(loaded, batches(vocabulary), CONFIG), batches(vocabulary), CONFIG)
    assert torch.equal(weights(trainer), trainer.layout.flatten(served))
    steps(trainer, 2)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, served[name])
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}


def test_what_cannot_be_trained_is_refused_in_one_sentence(loaded: Loaded, tmp_path: Path) -> None:
    save_encoder(tmp_path)
    encoder = load(Found("bert", tmp_path, tmp_path), device="cpu")
    with pytest.raises(BadInput, match="bert is an encoder"):
        training_copy(encoder, batches(), CONFIG)
    with pytest.raises(BadInput, match="rows of 513 tokens are longer than the 512 of tiny"):
        training_copy(loaded, batches(context=513, rows=1, length=20_000), CONFIG)
    with pytest.raises(BadInput, match="the text has token id 319, and tiny knows 319"):
        training_copy(
            replace(loaded, facts=replace(loaded.facts, vocabulary=319)),
            Batches(text_of(torch.full((400,), 319, dtype=torch.int32), text_bytes=1, documents=1), context=8, rows=1),
            CONFIG,
        )


def test_too_little_memory_is_told_before_it_is_taken(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = needed_bytes(loaded.model, batches(), CONFIG)
    monkeypatch.setattr(train_memory, "device_free_bytes", lambda device: int(needed / 0.9) + 1)
    training_copy(loaded, batches(), CONFIG)
    monkeypatch.setattr(train_memory, "device_free_bytes", lambda device: int(needed / 0.9) - 1)
    with pytest.raises(OutOfMemory, match=r"training tiny needs 0\.0 GB beside .* choose fewer rows"):
        training_copy(loaded, batches(), CONFIG)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_the_estimate_covers_what_a_forward_pass_keeps(kind: str) -> None:
    layers = {} if kind == "gemma2" else {"num_hidden_layers": 6}  # its two have kinds of their own
    model, some = tiny(kind, **layers), batches(64, rows=4, context=64, length=8_000)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = next_token_loss(model.train(), some.batch(0, 0))
    torch.autograd.backward(loss)
    vectors = 5 * 4 * sum(parameter.numel() for parameter in model.parameters())
    estimate = needed_bytes(model, some, CONFIG) - vectors
    assert sum(kept.values()) < estimate < 3 * sum(kept.values())
    checkpointed = needed_bytes(model, some, replace(CONFIG, checkpointing=True)) - vectors
    assert checkpointed <= (estimate if kind == "gemma2" else estimate * 0.7)


def test_a_failure_of_torch_is_told_and_the_step_begins_anew() -> None:
    model = Toy()
    trainer = Trainer(model, batches(), replace(CONFIG, accumulation=2))
    undisturbed = Trainer(Toy(), batches(), replace(CONFIG, accumulation=2))
    steps(trainer, 1)
    for fault, kind in (
        (RuntimeError("shapes do not fit"), ComputeFailed),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), OutOfMemory),
        (MemoryError(), OutOfMemory),
    ):
        handle = model.register_forward_pre_hook(lambda *_, fault=fault: (_ for _ in ()).throw(fault))
        with pytest.raises(kind, match="step 0 of training"):
            trainer.micro_step()
        handle.remove()
    assert steps(trainer, 2) == steps(undisturbed, 2)
    assert torch.equal(weights(trainer), weights(undisturbed))


@pytest.mark.parametrize(
    "change",
    [{"seed": -1}, {"seed": 1 << 63}, {"rate": 0.0}, {"rate": math.nan}, {"clip_norm": 0.0}, {"accumulation": 0},
     {"warmup_steps": -1}, {"weight_decay": 1.0}, {"autocast": "yes"}],
)  # fmt: skip
def test_a_number_out_of_range_is_no_configuration(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not"):
        replace(CONFIG, **change)
