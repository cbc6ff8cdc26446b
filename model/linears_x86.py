"""The door to torch's x86 int8 products (FBGEMM): weights packed once, activations by the row or by the batch.

Rules: this file alone uses torch's quantized tensors, which torch calls deprecated; `is_here` says whether they still
work, and model/linears.py does without them. The row scale is taken out beforehand, so that the scale that FBGEMM is
given is 1 for every row: all sums are whole numbers, and a row's bits do not depend on the rows beside it. A weight of
many outputs is packed in parts: FBGEMM goes down its columns, and where they have more than about OUTPUTS_MAX numbers
these do not stay in the cache, which made packing twice as slow. Each part costs 40 us a product, so there are few.
Legend: O outputs, K inputs, M rows.
Source: pytorch aten/src/ATen/native/quantized/cpu/qlinear.cpp, qlinear_dynamic.cpp; pytorch#184982 (deprecation).
"""

from __future__ import annotations

import warnings
from typing import Any, Final

import torch

from model.errors import FOREIGN

ENGINE: Final = "fbgemm"
OUTPUTS_MAX: Final = 1 << 14  # of a part
ZERO: Final = 128  # of the unsigned numbers that FBGEMM takes: -127..127 becomes 1..255


def is_here() -> bool:
    """Whether this torch and this processor have it, without sums that overflow on the way."""
    if ENGINE not in torch.backends.quantized.supported_engines or not torch.cpu._is_vnni_supported():
        return False  # without VNNI FBGEMM adds pairs of products in 16 bits, which saturate
    try:
        packed = pack_x86(torch.ones(1, 1, dtype=torch.int8), torch.ones(1))
        return bool(by_row(torch.full((1, 1), 127.0), packed).item() == 127.0)
    except FOREIGN:
        return False


def pack_x86(weight_OK: torch.Tensor, scale_O: torch.Tensor) -> tuple[Any, ...]:
    """int8 weights, packed for `by_row` and `by_batch`."""
    outputs = len(weight_OK)
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = ENGINE
    try:
        with warnings.catch_warnings(), torch.inference_mode():  # which halves what each output's scale costs
            warnings.simplefilter("ignore")
            parts = []
            for part in (slice(begin, begin + OUTPUTS_MAX) for begin in range(0, outputs, OUTPUTS_MAX)):
                scale = scale_O[part].double()
                zero = torch.zeros(len(scale), dtype=torch.long)
                whole = torch._make_per_channel_quantized_tensor(weight_OK[part], scale, zero, 0)
                parts.append(torch.ops.quantized.linear_prepack(whole, None))
            return tuple(parts)
    finally:
        torch.backends.quantized.engine = before


def by_row(whole_MK: torch.Tensor, packed: tuple[Any, ...]) -> torch.Tensor:
    """Products in fp32 of rows of whole numbers from -127 to 127."""
    product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    if len(packed) == 1:
        return product(whole_MK, 1.0, ZERO, packed[0])  # type: ignore[no-any-return]  # torch.ops has no types
    return torch.cat([product(whole_MK, 1.0, ZERO, part) for part in packed], 1)


def by_batch(x_MK: torch.Tensor, packed: tuple[Any, ...]) -> torch.Tensor:
    """Products in fp32 with one activation scale for all rows: what a row gets depends on the others."""
    made = [torch.ops.quantized.linear_dynamic(x_MK, part) for part in packed]
    return torch.cat(made, 1) if len(made) > 1 else made[0]
