"""Layout: one order of a model's trainable tensors, there and back, and the digest that names it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import layout as room
from model.errors import BadModel
from model.layout import Layout, TensorSpec, layout_of

SHAPES = st.lists(st.integers(1, 5), max_size=3).map(tuple)
NAMED_SHAPES = st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda s: s.isprintable()), SHAPES, min_size=1)


def tensors(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    made, start = {}, 0
    for name, shape in shapes.items():
        size = int(torch.Size(shape).numel())
        made[name] = torch.arange(start, start + size, dtype=dtype).view(shape)
        start += size
    return made


@given(shapes=NAMED_SHAPES)
@settings(max_examples=60, deadline=None)
def test_a_model_goes_into_one_vector_and_comes_back(shapes: dict[str, tuple[int, ...]]) -> None:
    named = tensors(shapes)
    layout = layout_of(named)
    vector = layout.flatten(named)
    assert vector.dtype is torch.float32
    assert vector.is_contiguous()
    assert vector.shape == (layout.size,)
    assert torch.equal(vector, torch.cat([named[name].reshape(-1) for name in sorted(named)]))
    blank = {name: torch.zeros_like(tensor) for name, tensor in named.items()}
    layout.load_into(blank, vector)
    for name, tensor in named.items():
        assert torch.equal(blank[name], tensor)
        assert torch.equal(layout.views(vector)[name], tensor)


def test_the_order_of_arrival_does_not_matter() -> None:
    named = tensors({"b": (2,), "a": (3, 1), "c": ()})
    backwards = dict(reversed(named.items()))
    assert layout_of(named) == layout_of(backwards.items())
    assert [spec.name for spec in layout_of(backwards).specs] == ["a", "b", "c"]


def test_the_digest_never_changes_and_tells_layouts_apart() -> None:
    """The first digest may never change: runs are signed over it."""
    digests = [
        layout_of(tensors(shapes)).digest
        for shapes in ({"a": (2, 3)}, {"a": (3, 2)}, {"a": (6,)}, {"b": (2, 3)}, {"a": (2, 3), "b": ()}, {"a": ()})
    ]
    assert digests[0].hex() == DIGEST
    assert len(set(digests)) == len(digests)


DIGEST = "64757dfb86830c4f0fd054e2b53e3138adb7c5fae892dc13b7053995a2630de2"


def test_a_view_shares_the_vectors_memory() -> None:
    layout = layout_of(tensors({"a": (2,), "b": (2, 2)}))
    vector = torch.zeros(6)
    layout.views(vector)["b"][1, 1] = 7
    assert vector.tolist() == [0, 0, 0, 0, 0, 7]


def test_tied_tensors_stand_once_under_the_first_name() -> None:
    shared = torch.ones(2, 3)
    layout = layout_of({"z": shared, "head": shared.detach(), "other": torch.zeros(2, 3)})
    assert [spec.name for spec in layout.specs] == ["head", "other"]
    assert layout.size == 12


def test_a_transposed_view_of_a_square_is_another_tensor() -> None:
    square = torch.ones(2, 2)
    assert layout_of({"a": square, "b": square.T}).size == 8


def test_dtypes_are_cast_both_ways() -> None:
    named = {"a": torch.tensor([1.0, 2.5], dtype=torch.bfloat16), "b": torch.tensor([3.0], dtype=torch.float64)}
    layout = layout_of(named)
    vector = layout.flatten(named)
    assert vector.tolist() == [1.0, 2.5, 3.0]
    layout.load_into(named, vector * 2)
    assert named["a"].dtype is torch.bfloat16
    assert named["a"].tolist() == [2.0, 5.0]
    assert named["b"].tolist() == [6.0]


def test_parameters_are_loaded_in_place() -> None:
    linear = torch.nn.Linear(2, 1)
    layout = layout_of(linear.named_parameters())
    before = linear.weight
    layout.load_into(dict(linear.named_parameters()), torch.tensor([5.0, 6.0, 7.0]))
    assert linear.weight is before
    assert linear.weight.requires_grad
    assert linear.weight.tolist() == [[6.0, 7.0]]
    assert linear.bias.tolist() == [5.0]


def test_another_model_is_refused_before_a_tensor_changes() -> None:
    layout = layout_of(tensors({"a": (2,), "b": (2,)}))
    for wrong in ({"a": torch.zeros(2)}, {"a": torch.zeros(2), "b": torch.zeros(3)}):
        with pytest.raises(BadModel, match="load the run's model"):
            layout.load_into(wrong, torch.ones(4))
        with pytest.raises(BadModel, match="load the run's model"):
            layout.flatten(wrong)
        assert wrong["a"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(2, dtype=torch.int64), "floating"),
        (torch.zeros(2, dtype=torch.complex64), "floating"),
        (torch.zeros(2, device="meta"), "has values"),
        (torch.zeros(0), "1 or more"),
        (torch.zeros((1,) * (room.DIMENSIONS_MAX + 1)), "at most 8 sides"),
    ],
)
def test_what_cannot_be_trained_is_refused(tensor: torch.Tensor, reason: str) -> None:
    with pytest.raises(BadModel, match=reason):
        layout_of({"a": tensor})


def test_bounds() -> None:
    with pytest.raises(BadModel, match="wanted 1 to 256"):
        TensorSpec("n" * (room.NAME_CHARS_MAX + 1), (1,))
    with pytest.raises(BadModel, match="wanted 1 to 256"):
        TensorSpec("", (1,))
    with pytest.raises(BadModel, match="printable"):
        TensorSpec("a\ud800", (1,))
    with pytest.raises(BadModel, match="train an adapter"):
        Layout((TensorSpec("a", (room.SIZE_MAX,)), TensorSpec("b", (1,))))
    assert Layout((TensorSpec("a", (room.SIZE_MAX,)),)).size == room.SIZE_MAX
    with pytest.raises(BadModel, match="0 trainable tensors"):
        layout_of({})
    many = tuple(TensorSpec(f"{number:06}", ()) for number in range(room.TENSORS_MAX + 1))
    with pytest.raises(BadModel, match="65537 trainable tensors"):
        Layout(many)
    assert Layout(many[1:]).size == room.TENSORS_MAX
    with pytest.raises(AssertionError):
        Layout((TensorSpec("b", ()), TensorSpec("a", ())))
