"""A trainer's state as bytes: four vectors as safetensors, the numbers beside them as canonical msgpack.

Rules: nothing is unpickled. The numbers hold the digest of the vectors, so the halves of two states never pass as one;
what does not fit is BadState before anything is taken over. The file that they go to is the node's matter.
Legend: N elements of the flat vector.
Source: safetensors format, github.com/huggingface/safetensors README.md; crypto/canonical.py.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_safetensors
from safetensors.torch import save as write_safetensors

from crypto.canonical import convert, decode_canonical, encode_struct
from crypto.errors import BadEncoding
from model.errors import BadState

VERSION = 1
VECTORS = ("start", "weights", "first_moment", "second_moment")
HEADER_BYTES_MAX = 1_024  # of safetensors with four tensors; it has some 300
_Count = Annotated[int, msgspec.Meta(ge=0)]
_Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


class Course(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What decides which numbers a step sees: equal course, equal continuation. layout, text: digests.

    privacy: every step since the start was a private one (model/private.py).
    """

    layout: _Digest
    text: _Digest
    context: _Count
    rows: _Count
    accumulation: _Count
    seed: _Count
    privacy: bool = False


class Numbers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where on its course a trainer stands; vectors: SHA-256 of the other half."""

    course: Course
    step: _Count
    skipped: _Count
    skipped_in_row: _Count
    vectors: bytes = b""
    version: int = VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """numbers: canonical msgpack, some 300 bytes. vectors: safetensors, 16 N bytes."""

    numbers: bytes
    vectors: bytes


def pack(numbers: Numbers, vectors_N: tuple[torch.Tensor, ...]) -> SavedState:
    """A state of numbers and of VECTORS, fp32 on the CPU."""
    vectors = write_safetensors(dict(zip(VECTORS, vectors_N, strict=True)))
    digest = hashlib.sha256(vectors).digest()
    return SavedState(numbers=encode_struct(msgspec.structs.replace(numbers, vectors=digest)), vectors=vectors)


def unpack(saved: SavedState, course: Course, size: int) -> tuple[Numbers, tuple[torch.Tensor, ...]]:
    """The numbers and VECTORS of `size` elements each, if they were saved on this course. Raises BadState."""
    try:
        numbers = convert(decode_canonical(saved.numbers), Numbers)
    except BadEncoding as exc:
        raise BadState(f"the numbers of the saved state are damaged ({exc}); start from the run's weights") from exc
    if numbers.version != VERSION:
        raise BadState(f"the saved state has version {numbers.version}, wanted {VERSION}; start from the run's weights")
    if numbers.course != course:
        wrong = [name for name in course.__struct_fields__ if getattr(numbers.course, name) != getattr(course, name)]
        raise BadState(f"the saved state is of another {' and '.join(wrong)}; start from the run's weights")
    if len(saved.vectors) > len(VECTORS) * 4 * size + HEADER_BYTES_MAX:
        raise BadState(f"the saved state has {len(saved.vectors):,} bytes, too many for {size:,} parameters")
    if hashlib.sha256(saved.vectors).digest() != numbers.vectors:
        raise BadState("the vectors of the saved state are not those of its numbers; start from the run's weights")
    try:
        held = read_safetensors(saved.vectors)
    except SafetensorError as exc:
        raise BadState(f"the vectors of the saved state are no safetensors ({exc})") from exc
    vectors_N = tuple(held.get(name) for name in VECTORS)
    found = [vector for vector in vectors_N if vector is not None]
    if len(found) != len(VECTORS) or any(v.dtype != torch.float32 or v.shape != (size,) for v in found):
        raise BadState(f"the saved state does not hold {', '.join(VECTORS)} of {size:,} fp32 numbers each")
    return numbers, tuple(found)
