"""Linear layers that read the same input, as one layer: queries, keys and values; gate and up.

Rules: for inference only. Which layers read the same input is seen in a pass, not known by name. The first that is
called computes for all of them; each of the others, called with the very same tensor, takes its part. A model that
changes that tensor in between would get another answer: so a pass after joining is compared with one before it, as for
packed layers (model/packing.py). Bits: each output has its own weights, so a joined one is what it was alone.
Legend: O outputs, K inputs.
Source: fused qkv and gate-up projections of vLLM and nano-vllm (`nanovllm/layers/linear.py`), done without names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from model.errors import BadModel


@dataclass(slots=True)
class _Made:
    """What the joined layer gave for an input, and how many parts of it wait for the layer that takes them."""

    input: torch.Tensor | None = None
    parts: list[torch.Tensor | None] = field(default_factory=list)
    left: int = 0


class Joined(nn.Module):
    """Several linear layers as one. sizes: outputs of each."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        self.sizes = [layer.out_features for layer in layers]
        with torch.device("meta"):
            self.linear: nn.Module = nn.Linear(layers[0].in_features, sum(self.sizes), bias=layers[0].bias is not None)
        self.linear.weight = _joined([layer.weight for layer in layers])
        if layers[0].bias is not None:
            self.linear.bias = _joined([layer.bias for layer in layers])
        self._made = _Made()  # of its own: to set an attribute of a module takes torch longer than all the rest

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """What the layer of this number gives for x."""
        made = self._made
        if made.input is x and (part := made.parts[index]) is not None:
            made.parts[index] = None
            made.left -= 1
            if not made.left:
                made.input = None
            return part
        parts: list[torch.Tensor | None] = list(self.linear(x).split(self.sizes, -1))
        part, parts[index] = parts[index], None
        made.input, made.parts, made.left = x, parts, len(parts) - 1
        assert part is not None
        return part


class Share(nn.Module):
    """A layer's place in the model, and its part of what is joined."""

    def __init__(self, joined: Joined, index: int) -> None:
        super().__init__()
        self.joined, self.index = joined, index
        self.in_features, self.out_features = joined.linear.in_features, joined.sizes[index]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., K) to (..., O)."""
        return self.joined.part(self.index, x)

    __call__ = forward  # without torch's search for hooks


@dataclass(frozen=True, slots=True)
class Names:
    """How a plain model's parameters are called in the joined one. parts: of each joined parameter, the plain ones in
    their order. shapes: of the plain ones."""

    parts: Mapping[str, tuple[str, ...]]
    shapes: Mapping[str, tuple[int, ...]]

    def each(self, named: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Values by the joined model's names, one made after the other. Raises BadModel if one comes in part."""
        taken = set[str]()
        for name, parts in self.parts.items():
            given = [part for part in parts if part in named]
            if given and len(given) < len(parts):
                raise BadModel(
                    f"{given[0]} came without {', '.join(set(parts) - set(given))}; they are computed as one"
                )
            if given:
                yield name, torch.cat([named[part] for part in parts])
            taken.update(parts)
        yield from ((name, value) for name, value in named.items() if name not in taken)


def join(model: Any, run: Callable[[], object]) -> Names:
    """Joins what can be joined in a model on a CPU; run: a pass of it. The layers' own weights are let go."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    parts: dict[str, tuple[str, ...]] = {}
    places = {module: (name, parent, key) for name, parent, key, module in _places(model)}
    for layers in siblings(model, run):
        first = places[layers[0]][0]
        joined = Joined(layers)
        for index, layer in enumerate(layers):
            _, parent, key = places[layer]
            setattr(parent, key, Share(joined, index))
        for what in ("weight", "bias") if layers[0].bias is not None else ("weight",):
            parts[f"{first}.joined.linear.{what}"] = tuple(f"{places[layer][0]}.{what}" for layer in layers)
    return Names(parts, shapes)


def siblings(model: Any, run: Callable[[], object]) -> list[list[nn.Linear]]:
    """Layers of one parent that read the same tensor in a pass, once each, and share their weights with no other."""
    read: dict[int, list[nn.Linear]] = {}
    kept: list[torch.Tensor] = []  # so that no two tensors of the pass have one id
    calls: dict[nn.Module, int] = {}

    def note(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        kept.append(inputs[0])
        calls[layer] = calls.get(layer, 0) + 1
        read.setdefault(id(inputs[0]), []).append(layer)

    parents = {layer: parent for _, parent, _, layer in _places(model)}
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    hooks = [layer.register_forward_pre_hook(note) for layer in parents]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for layers in read.values():
        alike: dict[tuple[Any, ...], list[nn.Linear]] = {}
        for layer in layers:
            if calls[layer] == 1 and users[id(layer.weight)] == 1:
                key = (id(parents[layer]), layer.bias is None, layer.weight.dtype, layer.weight.device)
                alike.setdefault(key, []).append(layer)
        found += [group for group in alike.values() if len(group) > 1]
    return found


def _places(model: Any) -> list[tuple[str, nn.Module, str, nn.Linear]]:
    """(full name, parent, name there, layer) of each layer that computes x W + b and stands in one place."""
    made = [
        (f"{name}.{key}".lstrip("."), parent, key, layer)
        for name, parent in model.named_modules()
        for key, layer in parent._modules.items()
        if type(layer) is nn.Linear
    ]
    count: dict[nn.Module, int] = {}
    for *_, layer in made:
        count[layer] = count.get(layer, 0) + 1
    return [place for place in made if count[place[-1]] == 1]


def _joined(parameters: list[torch.Tensor]) -> nn.Parameter:
    with torch.inference_mode(False):  # else it could never be given new values
        return nn.Parameter(torch.cat([parameter.detach() for parameter in parameters]), requires_grad=False)
