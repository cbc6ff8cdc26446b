"""Attention over blocks of keys and values by machine code of our own: every token of a pass, one kernel call a layer.

Rules: what a token gets is computed from itself and the keys before it alone, by the same steps in the same order
whatever goes with it, how its prompt was cut, where its blocks lie and how many threads there are: so its bits are its
own. A key is met as a sum over vectors of the width and then over lanes; values are added up in the order of their
tokens. Tokens of a prompt that stand together go over each block in turn, so that it comes from memory once for all.
What lies in a block beyond a sequence's end is neither used nor cleared.
Legend: T tokens of the pass, H query heads, J key heads, G = H / J, D and E widths of a key and a value, S tokens of a
block.
Source: PagedAttention (Kwon and others, arXiv 2309.06180); Rabe and Staats, "Self-attention does not need O(n^2)
memory" (arXiv 2112.05682).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Final, NamedTuple

import torch

from model import native
from model.paged_plan import LINES, Part, Pass, Rows

LANES: Final = (16, 8, 4)
OFF_MAX: Final = {torch.float32: 1e-4, torch.bfloat16: 0.03}  # of a trial, by what blocks hold


class Held(NamedTuple):
    """A layer's blocks, (n, J, S, D) and (n, J, S, E), and the kernels for them."""

    keys: torch.Tensor
    values: torch.Tensor
    heads: int
    value_width: int
    write: native.Function
    attend: native.Function


class Shape(NamedTuple):
    """Of a layer's blocks: widths of a key and a value, tokens of a block, and fp32 or bf16."""

    width: int
    value_width: int
    block_tokens: int
    dtype: torch.dtype

    @property
    def lanes(self) -> int:
        """How wide the kernel's vectors are; 0: there is none for this shape."""
        held = 2 if self.dtype is torch.bfloat16 else 1
        for lanes in LANES:
            fits = not (self.width % (held * lanes) or self.value_width % (held * lanes) or self.block_tokens % lanes)
            if fits and lanes <= native.lanes():
                return lanes
        return 0


def shape_of(keys: torch.Tensor, values: torch.Tensor) -> Shape:
    """Of blocks (n, J, S, D) and (n, J, S, E)."""
    return Shape(keys.shape[-1], values.shape[-1], keys.shape[2], keys.dtype)


def is_here(shape: Shape) -> bool:
    """Whether attention over such blocks is computed here, with the threads that torch has now."""
    return shape.dtype in OFF_MAX and native.is_able() and shape.lanes > 0 and _tried(shape)


def held(keys: torch.Tensor, values: torch.Tensor) -> Held:
    """Blocks for which there are kernels (`is_here`)."""
    code = _code(shape_of(keys, values))
    return Held(keys, values, keys.shape[1], values.shape[-1], code["write"], code["attend"])


def write(held: Held, key_TJD: torch.Tensor, value_TJE: torch.Tensor, rows: Rows) -> None:
    """Put the pass's keys and values in their blocks."""
    key_TJD, value_TJE = _along(key_TJD), _along(value_TJE)
    (key_token, key_head, _), (value_token, value_head, _) = key_TJD.stride(), value_TJE.stride()
    held.write(
        key_TJD.data_ptr(), value_TJE.data_ptr(), held.keys.data_ptr(), held.values.data_ptr(), rows.slots.data_ptr(),
        held.heads, key_token, key_head, value_token, value_head, rows.tokens, 1,
    )  # fmt: skip


def attend(held: Held, query_THD: torch.Tensor, rows: Rows, scale: float) -> torch.Tensor:
    """fp32 (T, H, E): what each token gets; zeros for tokens of the query that are not of the pass."""
    query_THD = _along(query_THD)
    tokens, heads, width = query_THD.shape
    token, head, _ = query_THD.stride()
    made = torch.empty(tokens, heads, held.value_width)
    if tokens > rows.tokens:
        made[rows.tokens :] = 0.0
    threads = native.threads_for(rows.work * heads * (width + held.value_width))
    shared, groups = heads // held.heads, len(rows.groups)
    most = max(LINES, shared) * rows.longest
    room = torch.empty(threads * most)
    held.attend(
        query_THD.data_ptr(), held.keys.data_ptr(), held.values.data_ptr(), rows.tables.data_ptr(),
        rows.spans.data_ptr(), rows.groups.data_ptr(), made.data_ptr(), room.data_ptr(),
        _scale(scale).data_ptr(), token, head, shared, held.heads, groups, rows.longest, most, groups * held.heads,
        threads,
    )  # fmt: skip
    return made


@cache
def _scale(scale: float) -> torch.Tensor:
    return torch.tensor([scale])


def _along(x: torch.Tensor) -> torch.Tensor:
    """fp32, the numbers of a head side by side."""
    x = x if x.dtype is torch.float32 else x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


@cache
def _tried(shape: Shape) -> bool:
    return native.tried("attention", lambda: _trial(shape))


def _trial(shape: Shape) -> bool:
    """Two sequences in odd blocks, one of them a chunk of a prompt, against torch."""
    width, value_width, size, dtype = shape
    draw = torch.Generator().manual_seed(0)
    tokens, heads, shared = size + 3, 2, 3
    parts = [Part(table=(3, 0), begin=2, end=tokens, prompt=0), Part(table=(2,), begin=0, end=1, prompt=0)]
    keys, values = (torch.full((4, heads, size, each), float("nan"), dtype=dtype) for each in (width, value_width))
    blocks = held(keys, values)
    before = [Part(table=(3, 0), begin=0, end=2, prompt=0)]
    count = tokens - 2 + 1
    query = torch.randn(count, heads * shared, width, generator=draw)
    made = list[tuple[torch.Tensor, torch.Tensor]]()
    for some in (before, parts):
        each = sum(part.end - part.begin for part in some)
        key, value = (torch.randn(each, heads, wide, generator=draw) for wide in (width, value_width))
        rows = Pass(some, size, keys.device).rows(shared, None)
        write(blocks, key, value, rows)
        made.append((key, value))
    got = attend(blocks, query, rows, width**-0.5)
    (key_a, value_a), (key_b, value_b) = made
    for begin, end, key, value in (
        (0, count - 1, torch.cat([key_a, key_b[:-1]]), torch.cat([value_a, value_b[:-1]])),
        (count - 1, count, key_b[-1:], value_b[-1:]),
    ):
        key_HND, value_HNE = (each.repeat_interleave(shared, 1).transpose(0, 1).double() for each in (key, value))
        scores = query[begin:end].transpose(0, 1).double() @ key_HND.transpose(1, 2) * width**-0.5
        seen = torch.ones_like(scores).tril(scores.shape[2] - scores.shape[1]).bool()
        wanted = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1) @ value_HNE
        if not float((got[begin:end].transpose(0, 1) - wanted).abs().max()) < OFF_MAX[dtype]:
            return False
    return True


@cache
def _code(shape: Shape) -> dict[str, native.Function]:
    from model import native_attending  # llvmlite's builder

    width, value_width, size, dtype = shape
    sizes = native_attending.Sizes(width, value_width, size, shape.lanes, dtype is torch.bfloat16)
    build: Callable[..., dict[str, tuple[int, int]]] = native_attending.build
    return native.compiled(partial(build, sizes=sizes))
