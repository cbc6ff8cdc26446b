"""model/norms.py: which norms of a model become one call, and that their bits stay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config, LlamaConfig, Qwen3Config

from model import native
from model.norms import RmsNorm, quicken

SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 100,
}  # fmt: skip


def model_of(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.copy_(torch.randn(parameter.shape))
    return model


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    made: torch.Tensor = model(input_ids=torch.tensor([[5, 1, 7, 7, 30]]), use_cache=False).logits
    return made


@pytest.mark.parametrize(("kind", "count"), [(LlamaConfig, 5), (Qwen3Config, 9)])
@pytest.mark.parametrize("way", ["ours", "torch"])
def test_norms_of_a_model_are_one_call_each(kind: Any, count: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's function has the same bits, our kernel nearly."""
    if way == "torch":
        monkeypatch.setattr(native, "is_able", lambda: False)
    model = model_of(kind(**SMALL))
    before, names = logits(model), [name for name, _ in model.named_parameters()]
    assert quicken(model) == count
    assert sum(isinstance(module, RmsNorm) for module in model.modules()) == count
    assert torch.equal(logits(model), before) or (way == "ours" and torch.allclose(logits(model), before, atol=1e-5))
    assert [name for name, _ in model.named_parameters()] == names
    with torch.no_grad():
        model.get_parameter(names[-1] if "norm" in names[-1] else "model.norm.weight").mul_(2.0)  # as a merge does
    assert not torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (GemmaConfig(**SMALL), torch.float32),
        (GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100), torch.float32),
        (LlamaConfig(**SMALL), torch.bfloat16),  # it rounds before the weight, torch after it
    ],
    ids=["gemma", "gpt2", "bf16"],
)
def test_norms_that_compute_otherwise_stay(config: Any, dtype: torch.dtype) -> None:
    model = model_of(config, dtype)
    before = logits(model)
    assert quicken(model) == 0
    assert torch.equal(logits(model), before)


class Off(nn.Module):
    """A norm that is off in one way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32))
        self.eps = 1e-2
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "mean":
            x = x - x.mean(-1, keepdim=True)
        eps = self.eps * (2 if self.how == "epsilon" else 1)
        weight = self.weight + (1e-6 if self.how == "weight" else 0)
        if self.how == "fails":
            raise TypeError("wants a gate")
        return nn.functional.rms_norm(x, (32,), weight, eps)


@torch.inference_mode()
def test_a_row_of_a_norm_has_the_same_bits_in_every_batch() -> None:
    norm = RmsNorm(nn.Parameter(torch.randn(96)), 1e-6)
    x = torch.randn(33, 96)
    whole = norm(x)
    for count in (1, 2, 7, 33):
        assert torch.equal(norm(x[:count]), whole[:count])
    assert torch.equal(norm(x.t().contiguous().t()), whole)  # however it lies in memory


@pytest.mark.parametrize("how", ["mean", "epsilon", "weight", "fails"])
def test_what_is_off_by_little_is_no_such_norm(how: str) -> None:
    model = nn.Sequential(Off(how), Off(""), nn.LayerNorm(32))
    assert quicken(model) == 1
    assert isinstance(model[0], Off)
    assert isinstance(model[1], RmsNorm)


def test_a_norm_that_stands_twice_stays_one() -> None:
    norm = Off("")
    model = nn.Sequential(norm, copy.deepcopy(norm), norm)
    assert quicken(model) == 2
    assert model[0] is model[2]
    assert model[0].weight is norm.weight
