"""Packed linear layers: near the plain ones, the same bits in any batch, and new weights as if packed anew."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from model import linears_int4, linears_x86
from model.errors import BadModel
from model.lengths import LENGTHS
from model.linears import (
    INPUTS_MAX,
    INVARIANT,
    KINDS,
    LAYERS,
    ROWS_MIN,
    TABLE_ROWS,
    Int8Linear,
    PackedLinear,
    kinds_here,
    layer_of,
    linear_shapes,
    pack,
    quantized,
)
from tests.tiny_models import causal_config

HERE = kinds_here()
NEAR = {"fp32": 2e-6, "bf16": 6e-3, "int8": 2e-2, "int8-dynamic": 4e-2, "int4": 0.12}  # of the products' norm
SHAPES = [(1, 64), (64, 1), (7, 5), (33, 65), (100, 3), (257, 511), (512, 128), (1376, 96), (4099, 33)]
every_kind = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in HERE])
invariant_kind = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in HERE and kind in INVARIANT])
WAYS: dict[str, Any] = {"torch": lambda kind, *given: LAYERS[kind](*given), "ours": layer_of}
every_way = pytest.mark.parametrize("way", list(WAYS))
pytestmark = pytest.mark.skipif(not HERE, reason="this processor has no kind of packed layers")


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def weights(inputs: int, outputs: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) / inputs**0.5


def rows(count: int, inputs: int) -> torch.Tensor:
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(count))


def tiny(kind: str = "llama", *, tied: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(seed)
    config = causal_config(kind, 320)
    config.tie_word_embeddings = tied
    with torch.inference_mode(mode=False):
        model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
    return model.requires_grad_(False)


def logits(model: Any) -> torch.Tensor:
    made: torch.Tensor = model(input_ids=torch.arange(3, 43).view(2, 20), use_cache=False).logits
    return made


def named_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_parameters()}


@every_way
@every_kind
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_near_the_plain_ones(way: str, kind: str, shape: tuple[int, int]) -> None:
    weight, bias, x = weights(*shape), rows(1, shape[1])[0], rows(6, shape[0]).view(2, 3, -1)
    for added in (None, bias):
        wanted = nn.functional.linear(x, weight, added)
        made = WAYS[way](kind, weight, added)(x)
        assert made.shape == wanted.shape
        assert made.dtype == x.dtype
        assert (made - wanted).norm() <= NEAR[kind] * wanted.norm()
    assert WAYS[way](kind, weight, bias)(x.bfloat16()).dtype is torch.bfloat16
    assert WAYS[way](kind, weight, bias)(x[:0]).shape == (0, 3, shape[1])
    turned = x[0].t().contiguous().t()
    assert torch.equal(WAYS[way](kind, weight, bias)(turned), WAYS[way](kind, weight, bias)(x[0]))


@every_way
@invariant_kind
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.slow
def test_a_row_has_the_same_bits_in_every_batch(way: str, kind: str, shape: tuple[int, int]) -> None:
    layer, x = WAYS[way](kind, weights(*shape), rows(1, shape[1])[0]), rows(64, shape[0])
    alone = torch.cat([layer(x[row : row + 1]) for row in range(64)])
    for count in range(1, 65):
        for begin in {0, (64 - count) // 2, 64 - count}:
            assert torch.equal(layer(x[begin : begin + count]), alone[begin : begin + count]), (count, begin)


class Seen(TorchDispatchMode):
    """Notes how many rows the products get."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: set[int] = set()

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(product in str(func) for product in ("_linear_pointwise", "_int_mm", "linear_with", "linear_dynamic")):
            self.rows.add(len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [kind for kind in HERE if kind != "int4"])
def test_few_numbers_of_rows_reach_the_compiler(kind: str) -> None:
    """oneDNN and FBGEMM compile anew for many, and keep the code; int4's products are compiled once."""
    layer = LAYERS[kind](weights(8, 8), None)
    with Seen() as seen:
        for count in (*range(1, 100), TABLE_ROWS - 1, TABLE_ROWS, 300):
            layer(rows(count, 8))
    least = ROWS_MIN if kind in ("fp32", "bf16") else 1
    assert seen.rows == {number for number in LENGTHS if least <= number <= 128 or 256 <= number <= 384}


@pytest.mark.skipif(not linears_x86.is_here(), reason="no FBGEMM")
def test_packing_leaves_torchs_engine_as_it_was() -> None:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "onednn"
    LAYERS["int8"](weights(8, 8), None)
    assert torch.backends.quantized.engine == "onednn"
    torch.backends.quantized.engine = before


@every_way
@invariant_kind
@pytest.mark.slow
def test_a_row_has_the_same_bits_with_two_threads(way: str, kind: str) -> None:
    layers = [WAYS[way](kind, weights(*shape), None) for shape in ((1376, 512), (512, 1376))]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for layer in layers:
            x = rows(64, layer.in_features)
            whole = layer(x)
            for count in (1, 2, 3, 4, 5, 8, 16, 17, 33):
                assert torch.equal(layer(x[:count]), whole[:count]), count
    finally:
        torch.set_num_threads(before)


@every_way
@pytest.mark.skipif("int8" not in HERE, reason="no VNNI")
def test_a_loud_row_leaves_the_others_their_scale(way: str) -> None:
    layer, x = WAYS[way]("int8", weights(64, 32), None), rows(8, 64)
    before = layer(x)
    x[3] *= 1e4
    after = layer(x)
    assert torch.equal(before[:3], after[:3])
    assert torch.equal(before[4:], after[4:])


@pytest.mark.skipif("int8" not in HERE, reason="no VNNI")
@pytest.mark.parametrize("shape", SHAPES)
def test_our_int8_has_the_bits_of_torchs(shape: tuple[int, int]) -> None:
    weight, bias, x = weights(*shape), rows(1, shape[1])[0], rows(9, shape[0])
    weight[0], x[4] = 0.0, 0.0
    assert torch.equal(layer_of("int8", weight, bias)(x), Int8Linear(weight, bias)(x))


@pytest.mark.skipif(not linears_x86.is_here(), reason="no FBGEMM")
@pytest.mark.parametrize("shape", SHAPES)
def test_both_ways_of_int8_have_the_same_bits(shape: tuple[int, int]) -> None:
    weight, bias, x = weights(*shape), rows(1, shape[1])[0], rows(9, shape[0])
    one, other = (Int8Linear(weight, bias, by_x86=by_x86) for by_x86 in (True, False))
    assert torch.equal(one(x), other(x))


def test_quantized_weights_are_within_half_a_scale() -> None:
    weight = weights(3000, 70)
    weight[5] = 0.0
    whole, scale = quantized(weight)
    assert whole.dtype == torch.int8
    assert bool(((whole * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all())
    assert whole.abs().amax(1).tolist() == [0 if row == 5 else 127 for row in range(70)]


@every_way
@every_kind
def test_numbers_that_are_not_finite_come_out_so(way: str, kind: str) -> None:
    x = rows(4, 64)
    x[1, 3] = float("nan")
    made = WAYS[way](kind, weights(64, 32), None)(x)
    assert not made[1].isfinite().any()
    if kind in INVARIANT:
        assert made[[0, 2, 3]].isfinite().all()
    broken = weights(64, 32)
    broken[7, 7] = float("nan")
    assert not WAYS[way](kind, broken, None)(rows(4, 64))[:, 7].isfinite().any()


@every_way
@every_kind
def test_a_row_or_a_weight_of_zeros_gives_zeros(way: str, kind: str) -> None:
    x, bias = rows(3, 64), rows(1, 32)[0]
    x[1] = 0.0
    assert torch.equal(WAYS[way](kind, weights(64, 32), None)(x)[1], torch.zeros(32))
    made = WAYS[way](kind, torch.zeros(32, 64), bias)(x)
    assert torch.allclose(made, bias.expand(3, -1), rtol=2**-8)


@every_kind
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "gemma"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_model_is_near_the_plain_one_and_adopts_weights(kind: str, name: str, tied: bool) -> None:
    plain, other = tiny(name, tied=tied), tiny(name, tied=tied, seed=1)
    wanted, named, shapes = logits(plain), named_of(other), linear_shapes(plain)
    packed = pack(plain, kind)
    assert packed.layers == len(shapes)
    assert not any(type(module) is nn.Linear for module in plain.modules())
    assert (logits(plain) - wanted).norm() <= min(20 * NEAR[kind], 0.5) * wanted.norm()
    assert not torch.equal(logits(plain), logits(pack(other, kind).model))
    packed.adopt(named)
    assert torch.equal(logits(plain), logits(other))


@every_kind
def test_a_bf16_model_adopts_fp32_weights_as_it_would_load_them(kind: str) -> None:
    model, other = tiny("gpt2", dtype=torch.bfloat16), tiny("gpt2", seed=1)
    packed, named = pack(model, kind), named_of(other)
    packed.adopt(named)
    assert torch.equal(logits(model), logits(pack(other.to(torch.bfloat16), kind).model))


def test_a_shared_weight_stays_with_the_embedding() -> None:
    model = tiny(tied=True)
    embedding = model.get_input_embeddings()
    before = embedding.weight.clone()
    packed = pack(model, HERE[0])
    assert isinstance(model.get_output_embeddings(), PackedLinear)
    assert torch.equal(embedding.weight, before)
    name = next(name for name, value in model.named_parameters() if value is embedding.weight)
    old = model.get_output_embeddings()(rows(4, 32))
    packed.adopt({name: before * 2})
    assert torch.equal(embedding.weight, before * 2)
    assert torch.allclose(model.get_output_embeddings()(rows(4, 32)), old * 2)


def test_a_layer_that_stands_in_two_places_is_packed_once() -> None:
    layer = nn.Linear(8, 8)
    model = nn.ModuleDict({"one": layer, "other": layer, "third": nn.Linear(8, 8, bias=False)})
    model["third"].weight = layer.weight
    packed = pack(model, HERE[0])
    assert model["one"] is model["other"]
    assert linear_shapes(nn.ModuleList([layer, layer])) == [(8, 8)]
    packed.adopt({"one.weight": torch.eye(8)})
    assert torch.allclose(model["third"](rows(4, 8)), rows(4, 8), rtol=1e-2)


@every_kind
def test_the_plain_weights_memory_is_let_go(kind: str) -> None:
    model = tiny()
    gone = [weakref.ref(layer.weight) for layer in model.modules() if type(layer) is nn.Linear]
    pack(model, kind)
    assert gone
    assert all(weight() is None for weight in gone)


def test_new_weights_are_packed_piece_by_piece_and_put_in_place_at_once() -> None:
    model = tiny()
    packed, before = pack(model, HERE[0]), logits(model)
    halfway, whole = (packed.preparing(named_of(tiny(seed=1))) for _ in range(2))
    for _ in range(5):
        next(halfway)
        assert torch.equal(logits(model), before)
    halfway.close()
    steps = 0
    while True:
        try:
            next(whole)
        except StopIteration as end:
            ready = end.value
            break
        steps += 1
        assert torch.equal(logits(model), before)
    assert steps == packed.layers
    packed.put(ready)
    assert torch.equal(logits(model), logits(pack(tiny(seed=1), HERE[0]).model))


@pytest.mark.parametrize(
    "bad", [{"nobody": torch.ones(1)}, {"model.layers.0.mlp.up_proj.weight": torch.ones(32, 64)}], ids=["name", "shape"]
)
def test_weights_of_another_model_are_refused_before_any_is_taken(bad: dict[str, torch.Tensor]) -> None:
    model = tiny()
    packed, before = pack(model, HERE[0]), logits(model)
    with pytest.raises(BadModel, match="has no"):
        packed.adopt({**named_of(tiny(seed=1)), **bad})
    assert torch.equal(logits(model), before)


def test_a_packed_model_is_not_saved_without_its_weights() -> None:
    with pytest.raises(BadModel, match="no weights to save"):
        pack(tiny(), HERE[0]).model.state_dict()


def test_models_that_cannot_be_packed_are_refused() -> None:
    model = tiny()
    with pytest.raises(BadModel, match="choose one of"):
        pack(model, "int3")
    with pytest.raises(BadModel, match="float64"):
        pack(tiny(dtype=torch.float64), HERE[0])
    with pytest.raises(BadModel, match="on meta"):
        pack(nn.ModuleList([nn.Linear(2, 2, device="meta")]), HERE[0])
    with pytest.raises(BadModel, match="no linear layers"):
        pack(nn.ModuleList([nn.LayerNorm(3)]), HERE[0])
    pack(model, HERE[0])
    with pytest.raises(BadModel, match="packed already"):
        pack(model, HERE[0])


@pytest.mark.skipif("int8" not in HERE, reason="no VNNI")
def test_int8_sums_that_could_overflow_are_refused() -> None:
    with pytest.raises(BadModel, match="int8 sums"):
        pack(nn.ModuleList([nn.Linear(INPUTS_MAX + 1, 1)]), "int8")
    weight, x = torch.ones(1, INPUTS_MAX), torch.ones(1, INPUTS_MAX)
    assert LAYERS["int8"](weight, None)(x).item() == pytest.approx(INPUTS_MAX)


def test_int4_is_here_where_torch_has_vectors() -> None:
    assert linears_int4.is_here() == (torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"))


@pytest.mark.skipif("int4" not in HERE, reason="no int4 by vectors")
def test_an_int4_group_keeps_its_ends_and_is_within_half_a_step() -> None:
    weight = weights(96, 70)
    weight[5] = 0.25
    weight[6, 32:64] = 0.0
    made = LAYERS["int4"](weight, None)(torch.eye(96)).t()
    groups, off = weight.view(70, 3, 32), (made - weight).view(70, 3, 32).abs()
    step = (groups.amax(2) - groups.amin(2)) / 15
    assert bool((off <= 0.52 * step[..., None] + 2**-7 * groups.abs().amax(2, keepdim=True)).all())
    assert torch.equal(made[5], weight[5])
    assert torch.equal(made[6, 32:64], weight[6, 32:64])


@pytest.mark.skipif("int4" not in HERE, reason="no int4 by vectors")
@pytest.mark.parametrize("outputs", [64, 320, 8192, 8208])
def test_int4_slices_are_packed_as_the_whole_is(outputs: int) -> None:
    weight, x = weights(64, outputs), rows(3, 64)
    whole = LAYERS["int4"](weight, None)(x)
    for begin in (0, outputs // 2 // 64 * 64):
        part = LAYERS["int4"](weight[begin : begin + 64], None)(x)
        assert torch.equal(whole[:, begin : begin + 64], part)


@pytest.mark.skipif("int8" not in HERE, reason="no VNNI")
def test_a_weight_of_many_outputs_is_packed_in_parts() -> None:
    weight = weights(8, linears_x86.OUTPUTS_MAX + 40)
    layer, x = LAYERS["int8"](weight, None), rows(3, 8)
    assert not linears_x86.is_here() or len(layer._packed[0]) == 2
    assert torch.equal(layer(x), Int8Linear(weight, None, by_x86=False)(x))


@pytest.mark.skipif("int4" not in HERE or "int8" not in HERE, reason="no int4 by vectors, or no VNNI")
def test_an_int4_models_logits_are_in_int8() -> None:
    for tied in (False, True):
        model = pack(tiny(tied=tied), "int4").model
        kinds = {name: module.kind for name, module in model.named_modules() if isinstance(module, PackedLinear)}
        assert kinds.pop("lm_head") == "int8"
        assert set(kinds.values()) == {"int4"}
