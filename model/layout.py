"""The order in which a model's trainable tensors become one flat vector, and the digest that names that order.

Rules: core. Tensors stand sorted by name (code points), each in row-major order, one after the other. Two names of one
tensor (tied weights) stand once, under the name that sorts first. The vector is fp32 on the CPU whatever the model
computes in: peers agree on it to the bit. Adapters are laid out in the same way: a layout knows names, not models.
Legend: N elements of the vector.

Source: msgpack canonical form in crypto/canonical.py; TRAINING.md 2 ("layout: hash of names and shapes").
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import torch

from crypto.canonical import encode
from crypto.digest import Digest, digest
from model.delta import slices
from model.errors import BadModel

TENSORS_MAX: Final = 65_536  # a 400-layer model with adapters on every projection has fewer
NAME_CHARS_MAX: Final = 256
DIMENSIONS_MAX: Final = 8
SIZE_MAX: Final = 1 << 32  # elements; 16 GiB as fp32, twice with its momentum: over what a member of a run holds
_DOMAIN: Final = b"openagi:layout:1:"  # keeps this digest from being any other of ours

Named = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One trainable tensor: its name in the model and its shape. Raises BadModel."""

    name: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.name) <= NAME_CHARS_MAX or not self.name.isprintable():
            raise BadModel(f"a tensor is named {self.name[:80]!a}, wanted 1 to {NAME_CHARS_MAX} printable characters")
        if len(self.shape) > DIMENSIONS_MAX or any(side < 1 for side in self.shape):
            raise BadModel(
                f"{self.name} has the shape {list(self.shape)}, wanted at most {DIMENSIONS_MAX} sides of 1 or more: "
                "leave it out of what is trained"
            )

    @property
    def size(self) -> int:
        """Elements; a tensor without sides holds one."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """Which tensors make the flat vector, and where each stands. Raises BadModel when there are too many.

    size: N. digest: SHA-256 over names and shapes; equal digest, equal layout.
    """

    specs: tuple[TensorSpec, ...]
    size: int = field(init=False)
    digest: Digest = field(init=False)

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.specs]
        assert names == sorted(set(names)), "specs stand sorted by name, each name once: use layout_of"
        if not 0 < len(names) <= TENSORS_MAX:
            raise BadModel(f"{len(names)} trainable tensors came, wanted 1 to {TENSORS_MAX}")
        size = sum(spec.size for spec in self.specs)
        if size > SIZE_MAX:
            raise BadModel(
                f"the trainable tensors hold {size} elements, a run takes {SIZE_MAX}: train an adapter instead"
            )
        rows = [[spec.name, list(spec.shape)] for spec in self.specs]
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "digest", digest(_DOMAIN + encode(rows)))

    def flatten(self, named: Named) -> torch.Tensor:
        """A new vector_N (fp32, CPU, contiguous) of the tensors' values. Raises BadModel."""
        self._check(named)
        vector_N = torch.empty(self.size, dtype=torch.float32)
        with torch.no_grad():
            for spec, start in self._starts():
                vector_N[start : start + spec.size].view(spec.shape).copy_(named[spec.name])
        return vector_N

    def views(self, vector_N: torch.Tensor) -> dict[str, torch.Tensor]:
        """Name -> the tensor's part of the vector, in its shape and sharing its memory."""
        assert vector_N.shape == (self.size,), f"the vector is {list(vector_N.shape)}, the layout {self.size}"
        return {spec.name: vector_N[start : start + spec.size].view(spec.shape) for spec, start in self._starts()}

    def moved(self, start_N: torch.Tensor, named: Named) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(start, stop, delta_S) of start_N minus the tensors' values, fp32, in order; no whole vector is made. Raises
        BadModel."""
        self._check(named)
        for spec, place in self._starts():
            tensor_N = named[spec.name].detach().reshape(-1).to("cpu", torch.float32)
            for first, last in slices(spec.size):
                start_S = start_N[place + first : place + last]
                yield place + first, place + last, start_S - tensor_N[first:last]

    def load_into(self, named: Named, vector_N: torch.Tensor) -> None:
        """Write the vector into the tensors, cast to each one's dtype and device. Raises BadModel, and then no tensor
        has changed."""
        self._check(named)
        with torch.no_grad():
            for name, part in self.views(vector_N).items():
                named[name].copy_(part)

    def _starts(self) -> Iterator[tuple[TensorSpec, int]]:
        start = 0
        for spec in self.specs:
            yield spec, start
            start += spec.size

    def _check(self, named: Named) -> None:
        """The model may hold more (what is frozen, second names), never less or otherwise."""
        for spec in self.specs:
            tensor = named.get(spec.name)
            shape = None if tensor is None else tuple(tensor.shape)
            if shape != spec.shape:
                raise BadModel(
                    f"the run trains {spec.name} of shape {list(spec.shape)}, this model has "
                    f"{'none of that name' if shape is None else list(shape)}: load the run's model"
                )


def layout_of(named: Named | Iterable[tuple[str, torch.Tensor]]) -> Layout:
    """The layout of these trainable tensors; tied ones once. Raises BadModel when one cannot be trained here."""
    specs: list[TensorSpec] = []
    seen: set[tuple[object, ...]] = set()
    for name, tensor in sorted(dict(named).items()):
        if not tensor.is_floating_point() or tensor.is_meta:
            raise BadModel(f"{name} is {tensor.dtype} on {tensor.device}, wanted a floating tensor that has values")
        spec = TensorSpec(name, tuple(tensor.shape))
        memory = (tensor.device, tensor.data_ptr(), spec.shape, tensor.stride())
        if memory not in seen:
            seen.add(memory)
            specs.append(spec)
    return Layout(tuple(specs))
