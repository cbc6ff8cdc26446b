"""Products with int4 weights in groups: each group of a row's inputs has a scale and a zero of its own.

Rules: plain rounding, least and greatest weight of a group exact: on the embedded model this loses less than a search
for better scales would win back. Activations and results are bf16, sums fp32 in the order of the inputs, one row like
any other: a row's bits do not depend on the rows beside it, and nothing is compiled for their number. Four rows at a
time go through the weights, so many rows cost as many turns.
Legend: O outputs, K inputs, G groups, S outputs of a slice, M rows; O and K filled up to whole blocks and groups.
Source: pytorch aten/src/ATen/native/cpu/int4mm_kernel.cpp (weight = (int4 - 8) * scale + zero).
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn

from model.errors import FOREIGN

GROUP: Final = 32
BLOCK: Final = 16  # outputs come in multiples of it
SLICE_OUTPUTS: Final = 64  # of a block of the packed layout, so that slices can be packed one by one
SLICE: Final = 1 << 17  # elements that are quantized at once: they stay in the cache
STEPS: Final = 15.0  # from the least to the greatest weight of a group
MIDDLE: Final = 8  # the number that stands for a group's zero
SCALE_MIN: Final = 1e-30  # of a group of one value

Packed = tuple[torch.Tensor, torch.Tensor]  # int4 pairs, and (G, O, 2) scales and zeros in bf16


def is_here() -> bool:
    """Whether this torch and this processor compute it by vectors; elsewhere it is a loop, number by number."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    try:
        packed = pack_int4(torch.ones(1, 1))
        return bool(by_group(torch.ones(1, 1), packed)[0, 0].item() == 1.0)
    except FOREIGN:
        return False


def pack_int4(weight_OK: torch.Tensor) -> Packed:
    """Weights, rounded and packed for `by_group`. What is not finite makes its group so."""
    outputs, inputs = weight_OK.shape
    whole_O, whole_K = -outputs % BLOCK + outputs, -inputs % GROUP + inputs
    packed_OK = torch.empty(whole_O, whole_K // 2, dtype=torch.uint8)
    scales_GO2 = torch.empty(whole_K // GROUP, whole_O, 2, dtype=torch.bfloat16)
    step = max(1, SLICE // whole_K // SLICE_OUTPUTS) * SLICE_OUTPUTS
    for begin in range(0, whole_O, step):
        part_SK = weight_OK[begin : begin + step].float()
        end = min(begin + step, whole_O)
        missing = (0, whole_K - inputs, 0, end - begin - len(part_SK))
        part_SGg = (nn.functional.pad(part_SK, missing) if any(missing) else part_SK).view(end - begin, -1, GROUP)
        least_SG = part_SGg.amin(2)
        scale_SG = part_SGg.amax(2).sub_(least_SG).div_(STEPS).clamp_(min=SCALE_MIN).bfloat16().float()
        zero_SG = least_SG.add_(scale_SG, alpha=MIDDLE).bfloat16().float()
        whole_SGg = (part_SGg - zero_SG[..., None]).div_(scale_SG[..., None]).round_().add_(MIDDLE)
        whole_SK = whole_SGg.clamp_(0, 2 * MIDDLE - 1).to(torch.int32).view(end - begin, whole_K)
        packed_OK[begin:end] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole_SK, 1)
        scales_GO2[:, begin:end, 0] = scale_SG.t()
        scales_GO2[:, begin:end, 1] = zero_SG.t()
    return packed_OK, scales_GO2


def by_group(x_MK: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Products in bf16, of as many outputs as were packed and those that fill up."""
    packed_OK, scales_GO2 = packed
    if missing := 2 * packed_OK.shape[1] - x_MK.shape[1]:
        x_MK = torch.constant_pad_nd(x_MK, (0, missing))
    if x_MK.dtype is not torch.bfloat16:
        x_MK = x_MK.bfloat16()
    made: Any = torch.ops.aten._weight_int4pack_mm_for_cpu(x_MK.contiguous(), packed_OK, GROUP, scales_GO2)
    return made  # type: ignore[no-any-return]  # torch.ops has no types
