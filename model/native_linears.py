"""Products of linear layers in fp32, bf16 and int8 by machine code of our own, over weights laid out for it.

Rules: an output is one sum, over its inputs in their order, whatever rows go with its row and however many threads: so
a row's bits are its own. Weights stand as (units, BLOCKS, Q, lanes) words of 32 bits, a word being one fp32, two bf16
or four int8 inputs of one output, so that a vector of weights meets one word of a row; outputs and inputs are filled up
with zeros. int8: activations and weights have a scale for each row and each output, sums are whole numbers. bf16: sums
in fp32. The kernels are in model/native_products.py.
Legend: M rows, K inputs, O outputs, Q words of a row, U units of BLOCKS * lanes outputs, S outputs of a slice.
Source: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Final

import torch

from model import native
from model.quantized import SLICE

BLOCKS: Final = 4  # vectors of outputs that are summed up together
NEEDS: Final[dict[str, tuple[set[str], ...]]] = {  # instructions, by kind: any of these sets
    "fp32": (set(),),
    "int8": ({"avx512vnni", "avx512vl"}, {"avxvnni"}),
    "bf16": ({"avx512bf16", "avx512vl"},),
}
OFF_MAX: Final = {"fp32": 1e-5, "bf16": 0.01, "int8": 0.03}  # of a trial's products
LINEAR: Final = {"bf16": "bf16_linear", "int8": "int8_linear"}  # kernels that take rows in fp32
INPUTS_A_WORD: Final = {"fp32": 1, "int8": 4, "bf16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Laid:
    """A layer's weights, laid out. words: int32 (U, BLOCKS, Q, lanes). scales, starts: of each output of int8."""

    kind: str
    inputs: int
    outputs: int
    words: torch.Tensor
    scales: torch.Tensor
    starts: torch.Tensor
    units: int
    width: int  # Q


@cache
def _tried(kind: str) -> bool:
    return native.tried(f"{kind} products", lambda: _trial(kind))


def is_here(kind: str) -> bool:
    """Whether this kind's products can be computed here, with the threads that torch has now."""
    return native.is_able() and _has(kind) and _tried(kind)


def lay(kind: str, weight_OK: torch.Tensor) -> Laid:
    """fp32 or bf16 weights -> laid out; of int8 rounded as model.linears.quantized does, to the bit."""
    outputs, inputs = weight_OK.shape
    lanes, words = native.lanes(), -(-inputs // INPUTS_A_WORD[kind])
    units = -(-outputs // (BLOCKS * lanes))
    rows = units * BLOCKS * lanes
    laid = torch.empty(units, BLOCKS, words, lanes, dtype=torch.int32)
    scale_O, start_O = torch.zeros(rows if kind == "int8" else 0), torch.zeros(rows, dtype=torch.int32)
    step = max(1, SLICE // (lanes * max(1, inputs))) * lanes
    room_SQ = torch.zeros(min(step, rows), words, dtype=torch.int32)
    code = code_here()
    for begin in range(0, rows, step):
        part_SK = weight_OK[begin : begin + step].float().contiguous()
        count, blocks = len(part_SK), min(step, rows - begin) // lanes
        if kind == "int8":
            scale_S, start_S = scale_O[begin:], start_O[begin:]
            code["int8_weights"](
                part_SK.data_ptr(), room_SQ.data_ptr(), scale_S.data_ptr(), start_S.data_ptr(), inputs, words, count, 1
            )  # fmt: skip
        elif kind == "bf16":
            code["bf16_rows"](part_SK.data_ptr(), room_SQ.data_ptr(), inputs, words, count, 1)
        else:
            room_SQ = part_SK.view(torch.int32)
        to = laid.view(-1, words, lanes)[begin // lanes :]
        code["interleave"](room_SQ.data_ptr(), to.data_ptr(), count, words, blocks, 1)
    return Laid(
        kind=kind, inputs=inputs, outputs=outputs, words=laid, scales=scale_O, starts=start_O, units=units, width=words
    )  # fmt: skip


def products(x_MK: torch.Tensor, laid: Laid, bias_O: torch.Tensor | None) -> torch.Tensor:
    """fp32 (M, O) of fp32 or bf16 rows; bias: fp32."""
    rows, kind, words, outputs = x_MK.shape[0], laid.kind, laid.width, laid.outputs
    x_MK = (x_MK if x_MK.dtype is torch.float32 else x_MK.float()).contiguous()
    threads = native.threads_for(rows * laid.inputs * outputs)
    made = torch.empty(rows, outputs)
    bias = 0 if bias_O is None else bias_O.data_ptr()
    weights = laid.words.data_ptr()
    if kind == "fp32":
        code_here()["fp32_sums"](
            x_MK.data_ptr(), weights, bias, made.data_ptr(), rows, words, outputs, laid.units, threads
        )  # fmt: skip
        return made
    room = torch.empty(rows * (words + 1), dtype=torch.int32)  # the rows, then of int8 their scales
    more = (laid.scales.data_ptr(), laid.starts.data_ptr()) if kind == "int8" else ()
    code_here()[LINEAR[kind]](
        x_MK.data_ptr(), room.data_ptr(), weights, bias, made.data_ptr(), *more, rows, laid.inputs, words, outputs,
        laid.units, threads,
    )  # fmt: skip
    return made


def _trial(kind: str) -> bool:
    """A few odd shapes against torch."""
    draw = torch.Generator().manual_seed(0)
    for rows, inputs, outputs in ((1, 3, 1), (5, 70, 33), (13, 130, 200)):
        weight, x = torch.randn(outputs, inputs, generator=draw), torch.randn(rows, inputs, generator=draw)
        made, wanted = products(x, lay(kind, weight), None), x.double() @ weight.double().t()
        off = float((made - wanted).norm() / wanted.norm())
        if not off < OFF_MAX[kind]:
            return False
    return True


@cache
def code_here() -> dict[str, native.Function]:
    """The kernels of model/native_products.py, compiled."""
    from model import native_products  # llvmlite's builder

    return native.compiled(partial(native_products.build, kinds=tuple(kind for kind in NEEDS if _has(kind))))


def _has(kind: str) -> bool:
    """Whether the processor has the instructions."""
    return any(needed <= native.features() for needed in NEEDS.get(kind, ()))
