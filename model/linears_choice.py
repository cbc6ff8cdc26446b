"""Which packed layers serve a model best on this machine: measured, not believed.

Rules: what is counted is CPU-seconds of the linear layers of one step, with one row (a lone user) and with sixteen. The
measurement takes weights of its own, as many as the model's up to ELEMENTS_MAX, so that they come from memory as in
serving. A kind that rounds more than the model's own number type is a candidate only if it is wished for. int4 is not
compared: who wishes for it wishes for its memory, and for many rows it is slower than int8. A small model is not
measured: a start would take longer, and which layers are best matters little there.
Legend: K inputs, O outputs.
Source: SERVING.md, "Linear layers" (the answer differs by CPU and by batch).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from model.errors import BadInput
from model.linears import EXACT, INVARIANT, kinds_here, layer_of

PLAIN: Final = "plain"  # the model's own layers
WISHES: Final = {"exact": (), "int8": ("int8",), "int8-dynamic": ("int8", "int8-dynamic"), "int4": ("int4",)}
ROWS: Final = (1, 16)
TURNS: Final = 5
ELEMENTS_MAX: Final = 48 << 20  # 192 MB in fp32, beyond any cache; half a second a kind
MEASURED_MIN: Final = 16 << 20  # elements of a model, from which on it is measured
GAIN_MIN: Final = 2.0  # plain layers are not batch-invariant: they have to be cheaper by this to be kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of all the model's linear layers in one step. cpu_s: by the number of rows."""

    kind: str
    cpu_s: dict[int, float]

    @property
    def mean_s(self) -> float:
        """Geometric mean over the numbers of rows."""
        return math.exp(statistics.fmean(math.log(max(spent, 1e-9)) for spent in self.cpu_s.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """kind: `plain` to leave the model as it is, else for `pack`. costs: what was measured, of each candidate. problem:
    why it is not what was wished for; "" if it is."""

    kind: str
    wish: str
    costs: tuple[Cost, ...] = ()
    problem: str = ""

    @property
    def is_invariant(self) -> bool:
        """As PackedModel.is_invariant."""
        return self.kind in INVARIANT

    def __str__(self) -> str:
        """One sentence for doctor and status."""
        if self.problem:
            return f"{self.kind}: {self.problem}"
        if not self.costs:
            return f"{self.kind}; not measured"
        each = ", ".join(
            f"{cost.kind} " + " / ".join(f"{spent * 1e3:.3g}" for spent in cost.cpu_s.values()) for cost in self.costs
        )
        return f"{self.kind}; CPU-ms of a step's linear layers with {' / '.join(map(str, ROWS))} rows: {each}"


def choose(
    shapes: Sequence[tuple[int, int]],
    wish: str,
    dtype: torch.dtype,
    *,
    here: Sequence[str] | None = None,
    measured_min: int = MEASURED_MIN,
    clock: Callable[[], float] = time.process_time,
) -> Choice:
    """Measure the candidates on layers of these (K, O), and choose. Takes seconds: call it in a worker thread, before
    serving begins. wish: of WISHES. dtype: the model's. here: kinds, None: `kinds_here()`. measured_min: elements,
    below which nothing is measured. Raises BadInput.
    """
    if wish not in WISHES:
        raise BadInput(f"there is no wish {wish!r} for linear layers; choose one of {', '.join(WISHES)}")
    if dtype not in EXACT or not shapes:
        raise BadInput(f"{len(shapes)} layers of {dtype}: only fp32 and bf16 are packed; serve the model as it is")
    here = kinds_here() if here is None else here
    kinds = [PLAIN, *(kind for kind in (EXACT[dtype], *WISHES[wish]) if kind in here)]
    problem = ""
    if (wish == "exact" and len(kinds) == 1) or (WISHES[wish] and not set(WISHES[wish]) & set(kinds)):
        lacks = wish if WISHES[wish] else EXACT[dtype]
        problem = f"there are no packed {lacks} layers for this processor"
    if "int4" in kinds or sum(inputs * outputs for inputs, outputs in shapes) < measured_min:
        return Choice(kind=kinds[-1], wish=wish, problem=problem)
    costs = tuple(cost_of(kind, shapes, dtype, clock=clock) for kind in kinds)
    best = min(costs, key=lambda cost: cost.mean_s * (GAIN_MIN if cost.kind == PLAIN else 1.0))
    return Choice(kind=best.kind, wish=wish, costs=costs, problem=problem)


def cost_of(
    kind: str,
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    *,
    rows: Sequence[int] = ROWS,
    clock: Callable[[], float] = time.process_time,
) -> Cost:
    """Medians of TURNS, after one that warms up."""
    sample = sample_of(shapes)
    share = sum(inputs * outputs for inputs, outputs in sample) / sum(inputs * outputs for inputs, outputs in shapes)
    layers = [_layer(kind, inputs, outputs, dtype) for inputs, outputs in sample]
    spent_s: dict[int, float] = {}
    with torch.inference_mode():
        for count in rows:
            given = {inputs: torch.ones(count, inputs, dtype=dtype) for inputs, _ in sample}
            turns: list[float] = []
            for _ in range(TURNS + 1):
                began = clock()
                for (inputs, _), layer in zip(sample, layers, strict=True):
                    layer(given[inputs])
                turns.append(clock() - began)
            spent_s[count] = statistics.median(turns[1:]) / share
    return Cost(kind=kind, cpu_s=spent_s)


def sample_of(shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Layers to measure: all, or one of each shape and then others in turn, within ELEMENTS_MAX. Large ones are cut."""
    order = [*dict.fromkeys(shapes)]
    left = list(shapes)
    for shape in order:
        left.remove(shape)
    sample, room = [], ELEMENTS_MAX
    for position, (inputs, outputs) in enumerate((*order, *left)):
        fair = room // (len(order) - position) if position < len(order) else room
        if (kept := min(outputs, fair // inputs)) > 0 and (kept == outputs or position < len(order)):
            sample.append((inputs, kept))
            room -= inputs * kept
    return sample


def _layer(kind: str, inputs: int, outputs: int, dtype: torch.dtype) -> nn.Module:
    weight_OK = torch.empty(outputs, inputs, dtype=dtype).uniform_(
        -1.0, 1.0, generator=torch.Generator().manual_seed(0)
    )
    if kind != PLAIN:
        return layer_of(kind, weight_OK, None)
    with torch.device("meta"):
        plain = nn.Linear(inputs, outputs, bias=False)
    plain.weight = nn.Parameter(weight_OK, requires_grad=False)
    return plain
