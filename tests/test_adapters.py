"""Adapters: alike for everybody, silent at first, and all that is trained, laid out and sent."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from crypto.digest import Digest, digest
from model.adapters import RANK_MAX, AdapterConfig, add_adapters, merged, start_of, trainable
from model.codecs import CODECS, decode
from model.errors import BadInput, BadModel
from model.feedback import Feedback
from model.layout import layout_of
from tests.tiny_models import save_causal

RUN = Digest(b"r" * 32)
IDS = torch.arange(12).view(1, 12)


def test_the_start_is_the_same_on_every_machine() -> None:
    """These digests may never change: members of a run start alike."""
    name = "model.layers.0.self_attn.q_proj.lora_A.run.weight"
    first = start_of(name, (8, 64), RUN)
    assert first.dtype is torch.float32
    assert digest(first.numpy().tobytes()).hex()[:16] == "240ae7c99f5d1f3a"
    assert not torch.equal(first, start_of(name, (8, 64), Digest(b"s" * 32)))
    assert not torch.equal(first, start_of(name.replace("q_proj", "k_proj"), (8, 64), RUN))
    assert not start_of(name.replace("lora_A", "lora_B"), (64, 8), RUN).any()


def test_the_start_is_uniform_within_the_bound_of_its_inputs() -> None:
    values = start_of("x.lora_A.run.weight", (256, 1024), RUN)
    assert float(values.abs().max()) <= 1 / 32
    assert float(values.mean()) == pytest.approx(0, abs=1e-4)
    assert float(values.std()) == pytest.approx(1 / 32 / 3**0.5, rel=0.01)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"rank": RANK_MAX + 1}, {"alpha": 0}])
def test_numbers_out_of_range(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="rank is 1 to 256"):
        AdapterConfig(**wrong)


def test_without_peft_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BadInput, match="pip install"):
        add_adapters(torch.nn.Linear(2, 2), AdapterConfig(), RUN)


# --- with peft ---


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small Llama in bf16."""
    pytest.importorskip("peft", reason="pip install -e '.[adapters]'")
    path: Path = tmp_path_factory.mktemp("base")
    return save_causal(path).to(torch.bfloat16).eval()


def with_adapters(base: Any, **config: Any) -> Any:
    model = copy.deepcopy(base)
    add_adapters(model, AdapterConfig(**config), RUN)
    return model


def test_a_model_with_new_adapters_answers_as_it_did(base: Any) -> None:
    model = with_adapters(base)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, base(IDS).logits)


def test_adapters_alone_are_trained_and_they_are_fp32(base: Any) -> None:
    model = with_adapters(base, rank=4, targets=("q_proj", "v_proj"))
    named = trainable(model)
    assert {name.split(".")[-4] for name in named} == {"q_proj", "v_proj"}
    assert {tensor.dtype for tensor in named.values()} == {torch.float32}
    assert {min(tensor.shape) for tensor in named.values()} == {4}
    others = [p for name, p in model.named_parameters() if name not in named]
    assert {p.dtype for p in others} == {torch.bfloat16}
    assert layout_of(named).size < sum(p.numel() for p in others) / 4


def test_two_members_have_one_layout_and_one_start(base: Any) -> None:
    torch.manual_seed(1)
    one = trainable(with_adapters(base))
    torch.manual_seed(2)
    two = trainable(with_adapters(base))
    assert layout_of(one) == layout_of(two)
    assert torch.equal(layout_of(one).flatten(one), layout_of(two).flatten(two))
    assert layout_of(one).digest != layout_of(trainable(with_adapters(base, rank=4))).digest


def test_what_one_member_trained_reaches_another(base: Any) -> None:
    """A round of one: the trained adapters, as a delta, bring another's to the same answers."""
    here, there = with_adapters(base), with_adapters(base)
    layout, codec = layout_of(trainable(here)), CODECS["fp32"]
    start_N = layout.flatten(trainable(here))
    optimizer = torch.optim.SGD(trainable(here).values(), lr=0.5)
    for _ in range(2):
        here(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    feedback = Feedback(layout.size)
    feedback.add(start_N - layout.flatten(trainable(here)))
    delta = decode(feedback.encode(codec), codec, layout.size)
    layout.load_into(trainable(there), start_N - delta.dense(0, layout.size))
    with torch.no_grad():
        assert torch.allclose(here(IDS).logits, there(IDS).logits, atol=1e-2)
        assert not torch.equal(there(IDS).logits, base(IDS).logits)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merged_weights_answer_as_the_model_with_adapters(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="pip install -e '.[adapters]'")
    plain = save_causal(tmp_path, kind).float().eval()
    model = with_adapters(plain, rank=4)
    rng = torch.Generator().manual_seed(3)
    for tensor in trainable(model).values():
        tensor.data = torch.randn(tensor.shape, generator=rng) * 0.3
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = merged(model, trainable(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    own = dict(plain.named_parameters())
    with torch.no_grad():
        assert not torch.allclose(model(IDS).logits, plain(IDS).logits, atol=1e-3)
        for name, value in weights.items():
            own[name].copy_(value)
        assert torch.allclose(model(IDS).logits, plain(IDS).logits, atol=1e-4)


def test_what_does_not_fit_is_refused(base: Any) -> None:
    with pytest.raises(BadModel, match="do not fit this model"):
        with_adapters(base, targets=("no_such_layer",))
    with pytest.raises(BadModel, match="has adapters already"):
        add_adapters(with_adapters(base), AdapterConfig(), RUN)
