"""model/packing.py: a loaded model is served by packed layers that were tried, or as it is, and it is said why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from crypto.digest import Digest
from model.adapters import AdapterConfig, add_adapters, merged, trainable
from model.config import QUANTIZATIONS, RuntimeConfig
from model.errors import BadInput, BadModel
from model.linears import PackedLinear, kinds_here, pack
from model.linears_choice import Choice
from model.load import Found, Loaded, as_in_files, load
from model.packing import packed, trial
from model.requests import GenerationRequest, SamplingParameters
from model.runtime import Runtime
from tests.fake_runtime import facts
from tests.tiny_models import save_causal, save_encoder

HERE = kinds_here()
pytestmark = pytest.mark.skipif("fp32" not in HERE, reason="this processor has no kind of packed layers")
quantized = pytest.mark.parametrize("quantize", [kind for kind in ("int8", "int4") if kind in HERE])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_causal(path)
    return path


def loaded(path: Path, dtype: str = "float32") -> Loaded:
    return load(Found(path.name, path, path), device="cpu", dtype=dtype)


def chosen(kind: str) -> Any:
    return lambda *_: Choice(kind=kind, wish="exact")


def kinds_of(model: nn.Module) -> list[str]:
    return [module.kind for module in model.modules() if isinstance(module, PackedLinear)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_served_by_layers_of_its_own_numbers(path: Path, dtype: str) -> None:
    kind = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    plain = loaded(path, dtype)
    made = packed(loaded(path, dtype), "none")
    if kind not in HERE:
        assert (made.packed, made.linears.kind) == (None, "plain")
        assert f"no packed {kind} layers" in made.linears.problem
        return
    assert made.packed is not None
    assert set(kinds_of(made.model)) == {kind}
    assert made.facts == plain.facts
    assert (made.linears.kind, made.linears.problem) == (kind, "")
    assert (trial(made) - trial(plain)).norm() < 0.05 * trial(plain).norm()


@quantized
def test_quantized_weights_are_another_revision(path: Path, quantize: str) -> None:
    plain, made = loaded(path), packed(loaded(path), quantize)
    assert made.facts.revision == f"{plain.facts.revision}-{quantize}"
    assert made.facts.weights_revision == plain.facts.revision
    assert (made.facts.numbers, made.facts.dtype) == (quantize, "float32")
    head = made.model.get_output_embeddings()
    assert head.kind == ("int8" if "int8" in HERE else quantize)
    assert set(kinds_of(made.model.base_model)) == {quantize}


@given(revision=st.text(min_size=1), quantization=st.sampled_from(QUANTIZATIONS), later=st.text(min_size=1))
def test_revisions_of_quantized_weights(revision: str, quantization: str, later: str) -> None:
    made = facts(revision=revision).quantized(quantization)
    assert made.weights_revision == revision
    assert (made.revision == revision) == (quantization == "none")
    assert made.at(later) == facts(revision=later).quantized(quantization)
    assert made.quantized("none") == facts(revision=revision)


def test_an_encoder_is_packed_and_not_quantized(tmp_path: Path) -> None:
    save_encoder(tmp_path / "encoder")
    made = packed(loaded(tmp_path / "encoder"), "int8")
    assert set(kinds_of(made.model)) == {"fp32"}
    assert "encoders are not quantized" in made.linears.problem
    assert made.facts == loaded(tmp_path / "encoder").facts


def test_a_model_that_reads_its_layers_weights_is_served_as_it_is(tmp_path: Path) -> None:
    save_causal(tmp_path / "mamba", "mamba")
    plain, made = loaded(tmp_path / "mamba"), packed(loaded(tmp_path / "mamba"), "none")
    assert made.packed is None
    assert kinds_of(made.model) == []
    assert made.linears.kind == "plain"
    assert "no attribute 'weight'" in made.linears.problem
    assert torch.equal(trial(made), trial(plain))


class Wrong(nn.Module):
    """Gives something else once its layer is packed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        states = self.layer(nn.functional.one_hot(input_ids % 8, 8).float())
        factor = 1.0 if isinstance(self.layer, nn.Linear) else self.factor
        return type("Out", (), {"logits": states * factor})()


@pytest.mark.parametrize("factor", [-1.0, 0.0, 1e30, float("nan")])
def test_layers_that_give_something_else_are_not_served(path: Path, factor: float) -> None:
    wrong = Wrong()
    wrong.factor = factor
    made = packed(replace(loaded(path), model=wrong), "none")
    assert made.packed is None
    assert torch.equal(trial(made), trial(loaded(path)))
    assert "was off by" in made.linears.problem
    assert made.linears.told == f"plain: {made.linears.problem}"


def test_what_cannot_be_packed_is_served_as_it_is(path: Path) -> None:
    twice = loaded(path)
    pack(twice.model, "fp32")
    assert "0 linear layers" in packed(twice, "none").linears.problem
    assert "float16" in packed(replace(loaded(path), facts=facts(dtype="float16")), "none").linears.problem
    assert packed(loaded(path), "none", choosing=chosen("plain")).packed is None
    unknown = packed(loaded(path), "none", choosing=chosen("int3"))
    assert "choose one of" in unknown.linears.problem
    assert torch.equal(trial(unknown), trial(loaded(path)))


def test_no_other_device_is_quantized(path: Path) -> None:
    elsewhere = replace(loaded(path), device=torch.device("cuda:0"))
    with pytest.raises(BadInput, match="choose --device cpu"):
        packed(elsewhere, "int8")
    assert packed(elsewhere, "none").packed is None


@quantized
def test_training_and_files_have_the_plain_weights(path: Path, quantize: str) -> None:
    wanted = dict(loaded(path).model.named_parameters())
    for quantization in ("none", quantize):
        again = as_in_files(packed(loaded(path), quantization))
        assert again.facts == loaded(path).facts
        named = dict(again.model.named_parameters())
        assert named.keys() == wanted.keys()
        assert all(torch.equal(named[name], value) for name, value in wanted.items())


def tokens(runtime: Runtime) -> tuple[int, ...]:
    sampling = SamplingParameters(temperature=0.0, max_tokens=12)
    runtime.add(GenerationRequest(request_id="r", prompt=(3, 4, 5) * 20, sampling=sampling))
    made: tuple[int, ...] = ()
    while runtime.has_work:
        for output in runtime.step():
            assert output.error is None
            made += output.tokens
    return made


def ready(runtime: Runtime, weights: object) -> object:
    preparing = runtime.preparing(weights)
    while True:
        try:
            next(preparing)
        except StopIteration as end:
            return end.value


@pytest.mark.parametrize("quantize", [kind for kind in QUANTIZATIONS if kind in ("none", *HERE)])
def test_a_runtime_goes_on_under_other_weights(tmp_path: Path, path: Path, quantize: str) -> None:
    save_causal(tmp_path / "other", seed=1)
    config = RuntimeConfig(device="cpu", dtype="float32", threads=1, quantize=quantize)
    one, other = Runtime.load(str(path), config), Runtime.load(str(tmp_path / "other"), config)
    assert one.linears.kind == ("fp32" if quantize == "none" else quantize)
    before = tokens(one), one.embed(["a text"]).vectors
    made = ready(one, dict(loaded(tmp_path / "other").model.named_parameters()))
    assert (tokens(one), one.embed(["a text"]).vectors) == before
    one.adopt(made, "tales-r1-0123456789ab")
    assert one.facts.revision == "tales-r1-0123456789ab" + ("" if quantize == "none" else f"-{quantize}")
    assert one.embed(["a text"]).facts.revision == one.facts.revision
    assert (tokens(one), one.embed(["a text"]).vectors) == (tokens(other), other.embed(["a text"]).vectors) != before
    with pytest.raises(BadModel, match="has no"):
        ready(one, {"nobody": torch.ones(1)})


def test_merged_adapters_of_some_layers_serve_where_these_are_joined_with_others(path: Path) -> None:
    pytest.importorskip("peft", reason="pip install -e '.[adapters]'")
    served, model = packed(loaded(path), "none"), loaded(path).model
    before = trial(served)
    add_adapters(model, AdapterConfig(rank=2, targets=("q_proj", "v_proj", "up_proj")), Digest(bytes(32)))
    for tensor in trainable(model).values():
        tensor.data = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) * 0.3
    assert served.packed is not None
    served.packed.adopt(merged(model, trainable(model)))
    wanted = trial(replace(loaded(path), model=model))
    assert not torch.allclose(trial(served), before, atol=1e-3)
    assert torch.allclose(trial(served), wanted, atol=1e-3)
