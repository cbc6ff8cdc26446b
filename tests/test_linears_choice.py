"""Which packed layers serve a model: by CPU time, by what was wished for, and by what this processor has."""

from __future__ import annotations

import pytest
import torch

from model.errors import BadInput
from model.linears import INVARIANT, kinds_here
from model.linears_choice import ELEMENTS_MAX, MEASURED_MIN, ROWS, TURNS, WISHES, choose, sample_of

HERE = kinds_here()


class FakeClock:
    """What each turn of each kind takes, in the order in which kinds are measured."""

    def __init__(self, spent: list[float]) -> None:
        self.ticks = iter([tick for each in spent for _ in range(len(ROWS) * (TURNS + 1)) for tick in (0.0, each)])

    def __call__(self) -> float:
        return next(self.ticks)


@pytest.mark.skipif("int8" not in HERE, reason="no VNNI")
@pytest.mark.parametrize(
    ("wish", "spent", "kind"),
    [
        ("exact", [2.0, 1.0], "fp32"),
        ("exact", [1.0, 1.9], "fp32"),
        ("exact", [1.0, 2.1], "plain"),
        ("int8", [2.0, 1.0, 0.5], "int8"),
        ("int8", [2.0, 1.0, 1.5], "fp32"),
    ],
)
def test_the_cheapest_kind_is_chosen_and_the_figures_are_said(wish: str, spent: list[float], kind: str) -> None:
    choice = choose([(8, 4)], wish, torch.float32, clock=FakeClock(spent), measured_min=0)
    assert choice.kind == kind
    assert str(choice).startswith(f"{kind}; CPU-ms")
    assert f"plain {spent[0] * 1e3:.3g} / {spent[0] * 1e3:.3g}" in str(choice)
    assert choice.is_invariant == (kind in INVARIANT)


@pytest.mark.skipif("fp32" not in HERE, reason="no packed layers")
def test_choosing_measures() -> None:
    choice = choose([(64, 64), (64, 32)], "exact", torch.float32, measured_min=0)
    assert [cost.kind for cost in choice.costs] == ["plain", "fp32"]
    assert all(spent > 0 for cost in choice.costs for spent in cost.cpu_s.values())


@pytest.mark.parametrize(
    ("wish", "dtype", "here", "kind", "problem"),
    [
        ("exact", torch.float32, ("fp32", "int8"), "fp32", ""),
        ("exact", torch.bfloat16, ("fp32", "bf16"), "bf16", ""),
        ("exact", torch.bfloat16, ("fp32",), "plain", "no packed bf16 layers"),
        ("exact", torch.float32, (), "plain", "no packed fp32 layers"),
        ("int8", torch.bfloat16, ("fp32", "bf16", "int8"), "int8", ""),
        ("int8", torch.float32, ("fp32",), "fp32", "no packed int8 layers"),
        ("int8", torch.bfloat16, ("fp32",), "plain", "no packed int8 layers"),
        ("int4", torch.float32, ("fp32", "int4"), "int4", ""),
        ("int4", torch.float32, ("fp32", "int8"), "fp32", "no packed int4 layers"),
    ],
)
def test_a_small_model_is_not_measured_and_what_is_not_here_is_said(
    wish: str, dtype: torch.dtype, here: tuple[str, ...], kind: str, problem: str
) -> None:
    choice = choose([(512, MEASURED_MIN // 512 - 1)], wish, dtype, here=here, clock=FakeClock([]))
    assert choice.kind == kind
    assert choice.problem.startswith(f"there are {problem}" if problem else "")
    assert bool(choice.problem) == bool(problem)
    assert str(choice) == (f"{kind}: {choice.problem}" if problem else f"{kind}; not measured")


def test_int4_is_taken_unmeasured_by_a_model_of_any_size() -> None:
    choice = choose([(4096, 4096)] * 100, "int4", torch.float32, here=("fp32", "int4"), clock=FakeClock([]))
    assert choice.kind == "int4"


def test_a_sample_is_bounded_and_holds_each_shape() -> None:
    assert sample_of([(8, 4), (4, 8), (8, 4)]) == [(8, 4), (4, 8), (8, 4)]
    huge = [(8192, 8192)] * 320 + [(8192, 128_000)]
    sample = sample_of(huge)
    assert {inputs for inputs, _ in sample} == {8192}
    assert len(sample) >= 2
    assert 0.9 * ELEMENTS_MAX <= sum(inputs * outputs for inputs, outputs in sample) <= ELEMENTS_MAX


def test_wishes_that_mean_nothing_are_refused() -> None:
    with pytest.raises(BadInput, match="no wish"):
        choose([(2, 2)], "fast", torch.float32)
    with pytest.raises(BadInput, match="float16"):
        choose([(2, 2)], "exact", torch.float16)
    assert set(WISHES) == {"exact", "int8", "int8-dynamic", "int4"}
