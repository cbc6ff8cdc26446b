"""Linear layers whose weights are packed once for the CPU's products, put in place of a model's own for serving.

Rules: for inference only. A row's bits do not depend on how many rows go with it, nor on which, in the kinds fp32,
bf16, int8 and int4; `int8-dynamic` has one activation scale for a batch and does not keep this. oneDNN has another
kernel for one row than for more, so at least ROWS_MIN go through it. It and FBGEMM compile for numbers of rows, so
these come from model/lengths.py, and rows of zeros fill up. A layer takes and gives the number type of what comes in.
What is packed has no weights to save: embeddings, norms and whatever shares a weight with a packed layer keep theirs.
A product for one row takes microseconds, and so does each step of Python on the way: what need not be done is not, and
hooks are not called.
Legend: O outputs, K inputs, M rows, S outputs of a slice.
Source: SERVING.md, "Linear layers", "Batch invariance"; pytorch aten/src/ATen/native/mkldnn/Linear.cpp.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from model import linears_int4, linears_x86, native_linears
from model.errors import BadModel, NotFound
from model.lengths import at_least
from model.linears_joined import Names
from model.quantized import LARGEST, SCALE_MIN, quantized

EXACT: Final = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # the kind that keeps a model's number type
KINDS: Final = ("fp32", "bf16", "int8", "int8-dynamic", "int4")
INVARIANT: Final = frozenset({"fp32", "bf16", "int8", "int4"})
HEAD: Final = {"int4": "int8"}  # of the layer that makes the logits, where it is here: half of what int4 loses is there
ROWS_MIN: Final = 4  # oneDNN adds up one row of over a thousand inputs in another order; 4 cost no more than 1
INPUTS_MAX: Final = 65_536  # 255 * 127 * K has to stay within 31 bits
TABLE_ROWS: Final = 257  # numbers of rows of which it is known beforehand how many fill up
_LEAST: Final = torch.full((1, 1), SCALE_MIN)


class PackedLinear(nn.Module):
    """A linear layer with a packed weight, and its bias. dtype: of the weights that it was made of."""

    kind: str
    fills = True  # numbers of rows come from model/lengths.py
    spares = tuple(at_least(rows or 1) - rows for rows in range(TABLE_ROWS))  # rows that fill up, by those that come

    def __init__(self, weight_OK: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OK.shape
        self.dtype = weight_OK.dtype
        self.take(self.packed_of(weight_OK))
        self.take_bias(bias_O)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., K) to (..., O), of x's number type."""
        shape = x.shape
        assert shape[-1] == self.in_features, f"{shape[-1]} inputs, wanted {self.in_features}"
        is_flat = len(shape) == 2
        x_MK = x if is_flat else x.reshape(-1, self.in_features)
        rows = x_MK.shape[0]
        if not rows:
            return x.new_zeros(*shape[:-1], self.out_features)
        spare = self.spares[rows] if rows < TABLE_ROWS else self._spare(rows)
        made = self._products(torch.constant_pad_nd(x_MK, (0, 0, 0, spare)) if spare else x_MK)
        if spare:
            made = made[:rows]
        if made.dtype is not x.dtype:
            made = made.to(x.dtype)
        return made if is_flat else made.reshape(*shape[:-1], self.out_features)

    __call__ = forward

    def packed_of(self, weight_OK: torch.Tensor) -> Any:
        """What `take` takes; rounded first to the number type that the layer was made of. Changes nothing."""
        return self._pack(weight_OK.detach().to(self.dtype))

    def take(self, packed: Any) -> None:
        """Compute with this from now on."""
        self._packed = packed

    def take_bias(self, bias_O: torch.Tensor | None) -> None:
        """Add this from now on."""
        self._bias_O = None if bias_O is None else bias_O.detach().to(self.dtype).to(self._bias_dtype(), copy=True)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"

    def _spare(self, rows: int) -> int:
        """As `spares`, for many rows."""
        return at_least(rows) - rows if self.fills else 0

    def _bias_dtype(self) -> torch.dtype:
        return torch.float32

    def _pack(self, weight_OK: torch.Tensor) -> Any:
        raise NotImplementedError

    def _products(self, x_MK: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _save_to_state_dict(self, *_args: Any, **_named: Any) -> None:
        raise BadModel("a packed layer has no weights to save; save the model before it is packed, or load it anew")


class NativeLinear(PackedLinear):
    """fp32, bf16 or int8 by machine code of our own, where that is here: sums in fp32, of int8 in whole numbers."""

    fills, spares = False, (0,) * TABLE_ROWS

    def __init__(self, kind: str, weight_OK: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        nn.Module.__init__(self)  # before anything is put into it
        self.kind = kind
        super().__init__(weight_OK, bias_O)

    def _pack(self, weight_OK: torch.Tensor) -> native_linears.Laid:
        return native_linears.lay(self.kind, weight_OK)

    def _products(self, x_MK: torch.Tensor) -> torch.Tensor:
        return native_linears.products(x_MK, self._packed, self._bias_O)


class OneDnnLinear(PackedLinear):
    """fp32 or bf16 in oneDNN's own layout."""

    number_type: torch.dtype
    spares = tuple(at_least(max(rows, ROWS_MIN)) - rows for rows in range(TABLE_ROWS))

    def _bias_dtype(self) -> torch.dtype:
        return self.number_type

    def _pack(self, weight_OK: torch.Tensor) -> Any:
        plain_OK = weight_OK.to(self.number_type).contiguous()
        return torch.ops.mkldnn._reorder_linear_weight(plain_OK, 16)  # of several rows: one layout serves all

    def _products(self, x_MK: torch.Tensor) -> torch.Tensor:
        if x_MK.dtype is not self.number_type:
            x_MK = x_MK.to(self.number_type)
        made: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_MK, self._packed, self._bias_O, "none", [], "")
        return made


class Fp32Linear(OneDnnLinear):
    """fp32 throughout."""

    kind, number_type = "fp32", torch.float32


class Bf16Linear(OneDnnLinear):
    """bf16 in and out, sums in fp32."""

    kind, number_type = "bf16", torch.bfloat16


class Int8Linear(PackedLinear):
    """int8 weights with a scale for each output, int8 activations with a scale for each row, sums in whole numbers."""

    kind = "int8"

    def __init__(self, weight_OK: torch.Tensor, bias_O: torch.Tensor | None, *, by_x86: bool | None = None) -> None:
        self._by_x86 = linears_x86.is_here() if by_x86 is None else by_x86
        super().__init__(weight_OK, bias_O)

    def _pack(self, weight_OK: torch.Tensor) -> tuple[Any, torch.Tensor]:
        whole_OK, scale_O = quantized(weight_OK)
        if self._by_x86:
            return linears_x86.pack_x86(whole_OK, scale_O), scale_O
        return self._two_columns(whole_OK).t().contiguous(), scale_O

    def _products(self, x_MK: torch.Tensor) -> torch.Tensor:
        packed, scale_O = self._packed
        if x_MK.dtype is not torch.float32:
            x_MK = x_MK.float()
        scale_M1 = torch.add(_LEAST, x_MK.abs().amax(1, keepdim=True), alpha=1 / LARGEST)
        whole_MK = torch.div(x_MK, scale_M1).round_()
        if self._by_x86:
            made = linears_x86.by_row(whole_MK, packed)
        else:
            made = torch._int_mm(self._two_columns(whole_MK.to(torch.int8)), packed).float().mul_(scale_O)
        made.mul_(scale_M1)
        return made if self._bias_O is None else made.add_(self._bias_O)

    def _two_columns(self, whole: torch.Tensor) -> torch.Tensor:
        """torch 2.13's _int_mm reads a single column wrongly: another, of zeros, beside it."""
        return whole if self.in_features > 1 else nn.functional.pad(whole, (0, 1))


class DynamicLinear(PackedLinear):
    """int8 weights, int8 activations with one scale for the whole batch: the fastest, and not batch-invariant."""

    kind = "int8-dynamic"

    def _pack(self, weight_OK: torch.Tensor) -> Any:
        return linears_x86.pack_x86(*quantized(weight_OK))

    def _products(self, x_MK: torch.Tensor) -> torch.Tensor:
        x_MK = x_MK.float()
        made = linears_x86.by_batch(x_MK, self._packed)
        made.add_(x_MK.sum(1, keepdim=True).mul_(0.0))  # what is not finite would come out as some number
        return made if self._bias_O is None else made.add_(self._bias_O)


class Int4Linear(PackedLinear):
    """int4 weights with a scale and a zero for each group of inputs, bf16 activations."""

    kind = "int4"
    fills, spares = False, (0,) * TABLE_ROWS

    def _pack(self, weight_OK: torch.Tensor) -> Any:
        return linears_int4.pack_int4(weight_OK)

    def _products(self, x_MK: torch.Tensor) -> torch.Tensor:
        made = linears_int4.by_group(x_MK, self._packed)
        if made.shape[1] != self.out_features:
            made = made[:, : self.out_features]
        return made if self._bias_O is None else made.float().add_(self._bias_O)


LAYERS: Final[Mapping[str, type[PackedLinear]]] = {
    layer.kind: layer for layer in (Fp32Linear, Bf16Linear, Int8Linear, DynamicLinear, Int4Linear)
}


def layer_of(kind: str, weight_OK: torch.Tensor, bias_O: torch.Tensor | None) -> PackedLinear:
    """The best layer of a kind on this machine: our own products, else torch's."""
    if native_linears.is_here(kind):
        return NativeLinear(kind, weight_OK, bias_O)
    return LAYERS[kind](weight_OK, bias_O)


def kinds_here() -> tuple[str, ...]:
    """The kinds that this machine computes in by its own instructions."""
    has_onednn = torch._C._has_mkldnn
    here = {
        "fp32": has_onednn,
        "bf16": has_onednn and torch.cpu._is_avx512_bf16_supported(),
        "int8": has_onednn and torch.cpu._is_vnni_supported(),
        "int8-dynamic": has_onednn and linears_x86.is_here(),
        "int4": has_onednn and linears_int4.is_here(),
    }
    return tuple(kind for kind in KINDS if here[kind] or native_linears.is_here(kind))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a value by a name of the plain model belongs in a packed one. turned: as Conv1D has it, (K, O)."""

    layer: PackedLinear
    is_bias: bool
    turned: bool


@dataclass(frozen=True, slots=True)
class Ready:
    """Other weights of a packed model, packed, and waiting to be put in place."""

    named: Mapping[str, torch.Tensor]
    packed: list[tuple[PackedLinear, Any]]
    biases: list[tuple[PackedLinear, torch.Tensor]]


class PackedModel:
    """A model that serves with packed layers, and the door for new weights. shapes: of the plain model's parameters."""

    def __init__(self, model: Any, kind: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.model, self.kind, self.shapes = model, kind, shapes
        self._names: Names | None = None
        self._places: dict[str, list[_Place]] = {}

    @property
    def is_invariant(self) -> bool:
        """Whether a row's bits in the packed layers are its own, whatever else is in the batch."""
        return self.kind in INVARIANT

    @property
    def layers(self) -> int:
        """How many are packed."""
        return sum(isinstance(module, PackedLinear) for module in self.model.modules())

    def adopt(self, named: Mapping[str, torch.Tensor]) -> None:
        """`preparing` and `put`, at once."""
        preparing = self.preparing(named)
        while True:
            try:
                next(preparing)
            except StopIteration as end:
                return self.put(end.value)

    def preparing(self, named: Mapping[str, torch.Tensor]) -> Generator[None, None, Ready]:
        """Pack these weights, by the names of the plain model, for `put`: then the model is, to the bit, what packing
        it with them gives.

        Yields after each layer, so that serving under the old weights can go in between; until `put` both are in
        memory, and the values must not change. Raises BadModel, at the first step.
        """
        for name, value in named.items():
            if self.shapes.get(name) != tuple(value.shape):
                raise BadModel(
                    f"the model that serves has no {name} of shape {list(value.shape)}; adopt weights by the names of "
                    "the model that was packed, a shared one by its first name"
                )
        ready = Ready(named, [], [])
        for name, value in named.items() if self._names is None else self._names.each(named):
            for place in self._places.get(name, ()):
                if place.is_bias:
                    ready.biases.append((place.layer, value))
                else:
                    packed = place.layer.packed_of(value.t() if place.turned else value)
                    ready.packed.append((place.layer, packed))
                    yield
        return ready

    def put(self, ready: Ready) -> None:
        """Go on with what `preparing` made: all is changed at once."""
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name in ready.named.keys() & own.keys():
                own[name].copy_(ready.named[name])
        for layer, value in ready.biases:
            layer.take_bias(value)
        for layer, packed in ready.packed:
            layer.take(packed)

    def called(self, names: Names) -> PackedModel:
        """Itself, going by the names of the model that was joined before it was packed."""
        self._names, self.shapes = names, names.shapes
        return self

    def _put(self, name: str, place: _Place) -> None:
        self._places.setdefault(name, []).append(place)


def pack(model: Any, kind: str) -> PackedModel:
    """Put packed layers into a model in place of its nn.Linear and Conv1D; their weights are let go one by one.

    A layer that shares its weight with an embedding gets a packed copy; the embedding keeps the weight, and `adopt`
    gives both the new one. Classes derived from nn.Linear compute otherwise, and stay. Raises NotFound (this machine
    cannot), BadModel (this model cannot), before anything is changed.
    """
    _check(model, kind)
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    packed = PackedModel(model, kind, shapes)
    made: dict[nn.Module, PackedLinear] = {}
    own_kind = dict.fromkeys(_heads(model), HEAD[kind]) if HEAD.get(kind) in kinds_here() else {}
    with torch.no_grad():
        for parent, key, plain in list(_linears(model)):
            if plain not in made:
                turned = isinstance(plain, Conv1D)
                weight, bias = plain.weight, plain.bias
                layer = layer_of(own_kind.get(plain, kind), weight.t() if turned else weight, bias)
                packed._put(first[id(weight)], _Place(layer, False, turned))
                layer.train(plain.training)
                if bias is not None:
                    packed._put(first[id(bias)], _Place(layer, True, turned))
                made[plain] = layer
            setattr(parent, key, made[plain])
    return packed


def linear_shapes(model: Any) -> list[tuple[int, int]]:
    """(K, O) of each layer that `pack` would pack."""
    plain = {layer: None for _, _, layer in _linears(model)}
    return [
        tuple(layer.weight.shape) if isinstance(layer, Conv1D) else tuple(layer.weight.shape[::-1]) for layer in plain
    ]


def _linears(model: Any) -> Iterator[tuple[nn.Module, str, Any]]:
    """(parent, its name there, layer) of each layer that computes x W + b and nothing else, wherever it stands."""
    for parent in model.modules():
        for key, child in parent._modules.items():  # named_children would give a shared one once
            if type(child) in (nn.Linear, Conv1D):
                yield parent, key, child


def _heads(model: Any) -> list[nn.Module]:
    """The layer that makes the logits, if there is one."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [head] if type(head) is nn.Linear and head.in_features <= INPUTS_MAX else []


def _check(model: Any, kind: str) -> None:
    if kind not in KINDS:
        raise BadModel(f"there are no packed layers of kind {kind!r}; choose one of {', '.join(KINDS)}")
    if kind not in (here := kinds_here()):
        raise NotFound(
            f"this machine does not compute in {kind} by its own instructions; it has {', '.join(here) or 'none'}"
        )
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise BadModel("the model's layers are packed already; load it anew, or adopt new weights")
    shapes = linear_shapes(model)
    if not shapes:
        raise BadModel("the model has no linear layers to pack; serve it as it is")
    for _, _, layer in _linears(model):
        weight = layer.weight
        if weight.device.type != "cpu" or weight.dtype not in EXACT:
            raise BadModel(f"a layer is {weight.dtype} on {weight.device}; only fp32 and bf16 on a CPU are packed")
    if kind.startswith("int8") and (inputs := max(inputs for inputs, _ in shapes)) > INPUTS_MAX:
        raise BadModel(f"a layer has {inputs:,} inputs, int8 sums hold {INPUTS_MAX:,}; choose bf16 or fp32")
