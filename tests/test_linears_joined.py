"""Joined layers: what each gave alone, found without names, and left alone where joining would be wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from model.errors import BadModel
from model.linears import kinds_here, pack
from model.linears_joined import Joined, Share, join, siblings
from tests.tiny_models import causal_config

IDS = torch.tensor([[1, 5, 2, 9, 4]])


def tiny(kind: str) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(causal_config(kind, 320)).eval().requires_grad_(False)


def passing(model: Any) -> Callable[[], Any]:
    return lambda: model(input_ids=IDS, use_cache=False, return_dict=True)


def names_of(model: Any) -> list[list[str]]:
    names = {module: name for name, module in model.named_modules()}
    with torch.inference_mode():
        return [[names[layer].rsplit(".", 1)[1] for layer in group] for group in siblings(model, passing(model))]


@pytest.mark.parametrize(
    ("kind", "groups"),
    [
        ("llama", [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]),
        ("qwen3", [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]),
        ("phi", [["q_proj", "k_proj", "v_proj"]]),
        ("gpt2", []),
    ],
)
def test_what_reads_one_tensor_is_found(kind: str, groups: list[list[str]]) -> None:
    assert names_of(tiny(kind)) == groups * 2  # layers


@pytest.mark.parametrize("kind", ["plain", *(k for k in ("fp32", "bf16", "int8") if k in kinds_here())])
@pytest.mark.parametrize("architecture", ["llama", "phi", "gemma2"])
def test_a_joined_model_gives_the_same(architecture: str, kind: str) -> None:
    model, other = tiny(architecture), tiny(architecture)
    with torch.inference_mode():
        join(other, passing(other))
        if kind != "plain":
            pack(model, kind)
            pack(other, kind)
        own, joined = passing(model)().logits, passing(other)().logits
    if kind == "plain":
        torch.testing.assert_close(joined, own)
    else:
        assert torch.equal(joined, own)
    assert any(isinstance(module, Joined) for module in other.modules())


def test_names_lead_from_plain_values_to_joined_ones() -> None:
    model, other = tiny("phi"), tiny("phi")
    plain = {name: value + 1.0 for name, value in model.named_parameters()}
    with torch.inference_mode():
        names = join(other, passing(other))
    assert names.shapes == {name: tuple(value.shape) for name, value in plain.items()}
    own = dict(other.named_parameters())
    values = dict(names.each(plain))
    assert values.keys() == own.keys()
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)
        for name, value in model.named_parameters():
            value.copy_(plain[name])
    with torch.inference_mode():
        torch.testing.assert_close(passing(other)().logits, passing(model)().logits)
    one = next(iter(names.parts.values()))[0]
    with pytest.raises(BadModel, match="computed as one"):
        list(names.each({one: plain[one]}))


class Odd(nn.Module):
    """Layers that must not be joined: one called twice, one with a shared weight, one without a bias, one elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.tied, self.bare, self.one, self.two = (nn.Linear(4, 3, bias=b) for b in (1, 1, 0, 1, 1))
        self.other = nn.Linear(4, 3)
        self.other.weight = self.tied.weight
        self.inner = nn.Sequential(nn.Linear(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers = (self.twice, self.twice, self.tied, self.bare, self.one, self.two, self.inner)
        return torch.cat([layer(x) for layer in layers] + [self.other(x + 1)], -1)


def test_only_what_can_be_joined_is() -> None:
    model, x = Odd().requires_grad_(False), torch.randn(2, 4)
    before = model(x)
    assert siblings(model, lambda: model(x)) == [[model.one, model.two]]
    join(model, lambda: model(x))
    torch.testing.assert_close(model(x), before)
    assert isinstance(model.one, Share)


def test_another_tensor_is_computed_anew() -> None:
    layers = [nn.Linear(4, 3).requires_grad_(False) for _ in range(2)]
    joined = Joined(layers)
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    for index, given in ((0, x), (1, y), (0, x), (0, x), (1, x), (1, x), (0, y)):
        torch.testing.assert_close(joined.part(index, given), layers[index](given))
    joined.part(0, x)
    joined.part(1, x)
    assert joined._made.input is None, "what all have taken is let go"
