"""The codecs by name, and the door to all of them: a vector to sections, sections to a delta.

Rules: core. The sizes of all three sections follow from codec and n, and are compared before anything is read.
Legend: N elements.
Source: TRAINING.md 1 (which codec when) and 2 (the wire).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch

from model.blockwise import INT4, INT8
from model.delta import MAGNITUDE_MAX, Codec, Delta, Sections
from model.errors import BadInput, BadUpdate, ComputeFailed
from model.plain import BF16, FP32
from model.sparse import SparseCodec

CODECS: Final[Mapping[str, Codec]] = {
    codec.name: codec for codec in (SparseCodec(64), SparseCodec(256), INT8, INT4, BF16, FP32)
}


def codec_named(name: str) -> Codec:
    """Raises BadInput for a name that is none of CODECS."""
    if name not in CODECS:
        raise BadInput(f"the codec {name[:40]!a} came, wanted one of {', '.join(CODECS)}")
    return CODECS[name]


def encode(vector_N: torch.Tensor, codec: Codec) -> Sections:
    """Write down a vector (fp32, CPU, contiguous). Raises ComputeFailed as `check_numbers` does."""
    assert vector_N.dtype is torch.float32
    assert vector_N.is_contiguous()
    check_numbers(vector_N)
    return codec.encode(vector_N.detach().numpy())


def check_numbers(vector_N: torch.Tensor) -> None:
    """Raises ComputeFailed for numbers that are not finite, or over MAGNITUDE_MAX: training has diverged."""
    low, high = map(float, vector_N.aminmax())
    if not (low >= -MAGNITUDE_MAX and high <= MAGNITUDE_MAX):  # NaN is neither
        raise ComputeFailed(f"the delta has numbers from {low:g} to {high:g}: training has diverged, lower its rate")


def decode(sections: Sections, codec: Codec, n: int) -> Delta:
    """A checked delta over these sections. Raises BadUpdate unless `encode` writes these very bytes for some vector."""
    sizes = len(sections.idx), len(sections.val), len(sections.scale)
    if sizes != codec.sizes(n):
        raise BadUpdate(
            f"idx, val and scale have {sizes} bytes, wanted {codec.sizes(n)} of {codec.name} for {n} elements"
        )
    return codec.decode(sections, n)
