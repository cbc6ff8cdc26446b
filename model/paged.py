"""Attention over keys and values kept in blocks, for many sequences in one pass, behind transformers' own interface.

Rules: what a token gets depends to the bit on itself, the keys before it and whether it is of a prompt or an answer:
not on the sequences that go with it, on how its prompt was cut into chunks, nor on where its blocks lie. So each
product is over one block, with as many rows as model/paged_plan.py says, a sequence's blocks are padded at the end only
and added up in its order, and a block holds a whole number of vector registers. A block is zeroed before its first
token: what an earlier user left must not be multiplied, not even by 0.
Legend: T tokens of the pass, H query heads, J key heads, G = H / J, D and E widths of a key and a value, S tokens of a
block, B sequences of a group, R tokens of each, N blocks of the longest, P pairs of a sequence and one of its blocks.
Source: PagedAttention (Kwon and others, arXiv 2309.06180); transformers `integrations/sdpa_paged.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

import torch
from transformers import AttentionInterface

from model import native_attention
from model.errors import BadModel
from model.load import kv_dtype
from model.paged_plan import Group, Pass

NAME: Final = "openagi_paged"
MASKED: Final = float("-inf")
KNOWN: Final = frozenset({"dropout", "scaling", "sliding_window", "softcap", "s_aux", "is_causal"})
_current: ContextVar[tuple[Pool, Pass] | None] = ContextVar("paged_pass", default=None)


class _Layer:
    """One layer's blocks: keys (blocks, J, S, D), values (blocks, J, S, E); and views of them."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, *, is_native: bool) -> None:
        """is_native: attention over them is computed by our own kernels."""
        self.keys, self.values = keys, values
        self.native = native_attention.held(keys, values) if is_native else None
        self.heads, self.size = keys.shape[1:3]
        self.keys_turned = keys.view(-1, *keys.shape[2:]).transpose(1, 2)  # (blocks * J, D, S)
        self.values_flat = values.view(-1, *values.shape[2:])  # (blocks * J, S, E)
        self._rows = keys.view(-1, keys.shape[-1]), values.view(-1, values.shape[-1])

    def write(self, key_TJD: torch.Tensor, value_TJE: torch.Tensor, work: Pass) -> None:
        """Puts the pass's keys and values in their places."""
        if work.fresh is not None:
            self.keys.index_fill_(0, work.fresh, 0.0)
            self.values.index_fill_(0, work.fresh, 0.0)
        if work.tokens == 1:
            block, row = work.first
            self.keys[block, :, row].copy_(key_TJD[0])
            self.values[block, :, row].copy_(value_TJE[0])
            return
        at = work.places(self.heads)
        for rows, new in zip(self._rows, (key_TJD, value_TJE), strict=True):
            real = new[: work.tokens] if len(new) > work.tokens else new
            rows.index_copy_(0, at, real.reshape(-1, real.shape[-1]).to(rows.dtype))


class Pool:
    """The blocks of all layers. Memory is taken as blocks are first used."""

    def __init__(self, blocks: int, block_tokens: int, device: torch.device, *, is_rounded: bool = False) -> None:
        """is_rounded: the model computes in no more than bf16 somewhere, and blocks may hold that."""
        self.blocks, self.block_tokens, self.is_rounded = blocks, block_tokens, is_rounded
        self._device = device
        self._layers: dict[int, _Layer] = {}
        self.rows_fewest = 1 << 30  # query heads to a key head, over all layers that torch computes
        self.seen: dict[int, dict[str, Any]] = {}  # by layer, what its module asked for: for who checks a model

    @property
    def token_bytes(self) -> int:
        """What one token takes, in all the layers that there are so far."""
        each = [store[0, :, 0].numel() * store.element_size() for layer in self._layers.values()
                for store in (layer.keys, layer.values)]  # fmt: skip
        return sum(each)

    def like(self, blocks: int, block_tokens: int) -> Pool:
        """Another, with layers of the same shapes."""
        pool = Pool(blocks, block_tokens, self._device, is_rounded=self.is_rounded)
        pool.rows_fewest = self.rows_fewest
        for index, layer in self._layers.items():
            pool.layer(
                index, layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1), is_plain=layer.native is not None
            )
        return pool

    @contextmanager
    def serving(self, work: Pass) -> Iterator[None]:
        """Model calls in this block, with the attention NAME, are this pass."""
        token = _current.set((self, work))
        try:
            yield
        finally:
            _current.reset(token)

    def layer(self, index: int, key_TJD: torch.Tensor, value_TJE: torch.Tensor, *, is_plain: bool) -> _Layer:
        """A layer's blocks, made at its first pass. is_plain: it asks for nothing that our kernels do not do."""
        if (layer := self._layers.get(index)) is None:
            widths = key_TJD.shape[-1], value_TJE.shape[-1]
            dtype, is_native = kv_dtype(self._device, key_TJD.dtype, is_rounded=self.is_rounded), False
            if self._device.type == "cpu":
                native = native_attention.Shape(*widths, self.block_tokens, dtype)
                is_native = is_plain and native_attention.is_here(native)
                dtype = dtype if is_native else torch.float32
            shape = self.blocks, key_TJD.shape[1], self.block_tokens
            keys, values = (torch.empty(*shape, width, dtype=dtype, device=self._device) for width in widths)
            layer = self._layers[index] = _Layer(keys, values, is_native=is_native)
        return layer


def attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _mask: Any, **asked: Any
) -> tuple[torch.Tensor, None]:
    """query (1, H, T, D), key (1, J, T, D), value (1, J, T, E) of the current pass -> (1, T, H, E).

    Raises BadModel for a model that asks for what is not done here.
    """
    current = _current.get()
    if current is None:
        raise BadModel("the paged attention was called outside a pass; this is a bug")
    pool, work = current
    query_THD, key_TJD, value_TJE = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    tokens, heads, shared = len(query_THD), query.shape[1], query.shape[1] // key.shape[1]
    pool.seen[module.layer_idx] = asked
    wish = _Wish(asked.get("sliding_window"), asked.get("softcap"), asked.get("s_aux"), {})
    is_plain = wish.softcap is None and wish.sinks is None
    layer = pool.layer(module.layer_idx, key_TJD, value_TJE, is_plain=is_plain)
    scale = asked.get("scaling") or query.shape[-1] ** -0.5
    if layer.native is not None:
        assert is_plain, "a layer that asked for nothing special does so now"
        rows = work.rows(shared, wish.window)
        native_attention.write(layer.native, key_TJD, value_TJE, rows)
        made_THE = native_attention.attend(layer.native, query_THD, rows, scale)
        return (made_THE if made_THE.dtype is query.dtype else made_THE.to(query.dtype))[None], None
    pool.rows_fewest = min(pool.rows_fewest, shared)
    layer.write(key_TJD, value_TJE, work)
    query_THD = query_THD.to(layer.keys.dtype) * scale
    groups = work.groups(shared, heads)
    if len(groups) == 1 and groups[0].is_whole(tokens):
        return _attend(query_THD, layer, groups[0], wish)[None].to(query.dtype), None
    made_THE = query_THD.new_zeros(tokens, heads, layer.values.shape[-1])
    for group in groups:
        made_THE.index_copy_(0, group.rows, _attend(query_THD, layer, group, wish))
    return made_THE[None].to(query.dtype), None


AttentionInterface.register(NAME, attention)


class _Wish(NamedTuple):
    """How a layer attends: to keys no older than `window` tokens, with scores bounded by `softcap`, and a sink for each
    head (H)."""

    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None
    pieces: dict[int, torch.Tensor]  # keys of whole sequences, by their list of blocks


def _attend(query_THD: torch.Tensor, layer: _Layer, group: Group, wish: _Wish) -> torch.Tensor:
    """(B * R, H, E): what each of the group's tokens gets."""
    heads, size = layer.heads, layer.size
    sequences, rows, longest, pairs = group.sequences, group.rows_padded, group.longest, group.pairs
    lines = query_THD.shape[1] // heads * rows
    scores = _scores(query_THD, layer, group, wish.pieces).view(sequences, heads, -1, rows, longest * size)
    if wish.softcap is not None:
        scores = torch.tanh(scores / wish.softcap) * wish.softcap
    first = 0 if wish.window is not None else group.seen_by_all
    bias = group.bias(wish.window)
    (scores[..., first:] if first else scores).add_(bias[..., first:] if first else bias)
    weights = _softmax(scores, size, wish.sinks)
    weights = weights.view(sequences, heads, lines, longest, size).permute(0, 3, 1, 2, 4)
    weights = weights.reshape(sequences * longest, heads, lines, size)
    if group.gather is not None:
        weights = weights.index_select(0, group.place)
    made = _products(weights.reshape(pairs * heads, lines, size), layer.values_flat, group, heads)
    made = made.view(pairs, heads, lines, -1)
    if group.gather is not None:
        made = made.new_zeros(sequences * longest, *made.shape[1:]).index_copy_(0, group.place, made)
    made = made.view(sequences, longest, heads, -1, rows, made.shape[-1])
    summed = made.sum(1) if longest > 1 else made[:, 0]
    if rows > group.tokens_each:
        summed = summed[:, :, :, : group.tokens_each]
    return summed.permute(0, 3, 1, 2, 4).reshape(len(group.rows), -1, made.shape[-1])


def _scores(query_THD: torch.Tensor, layer: _Layer, group: Group, pieces: dict[int, torch.Tensor]) -> torch.Tensor:
    """(B, J, G * R, N * S): each query times each key of its sequence. pieces: the layer's keys of whole sequences."""
    heads, size, width = layer.heads, layer.size, query_THD.shape[-1]
    if group.whole is not None:  # its keys in one piece, which serves all its tiles: one product for each head
        if id(group.whole) not in pieces:
            piece = layer.keys.index_select(0, group.whole).transpose(0, 1)
            pieces[id(group.whole)] = piece.reshape(heads, -1, width).transpose(1, 2)
        query = query_THD.index_select(0, group.read).view(group.rows_padded, heads, -1, width)
        query = query.permute(1, 2, 0, 3).reshape(heads, -1, width)
        return torch.bmm(query, pieces[id(group.whole)][:, :, : group.longest * size])
    query = query_THD.index_select(0, group.row_of_pair)
    if group.rows_padded > 1:
        query = query.view(group.pairs, group.rows_padded, heads, -1, width).permute(0, 2, 3, 1, 4)
    query = query.reshape(group.pairs * heads, -1, width)
    scores = _products(query, layer.keys_turned, group, heads).view(group.pairs, heads, -1, size)
    if group.gather is not None:
        scores = scores.index_select(0, group.gather)
    return (
        scores.view(group.sequences, group.longest, heads, -1, size)
        .permute(0, 2, 3, 1, 4)
        .reshape(group.sequences, heads, -1, group.longest * size)
    )


def _products(left: torch.Tensor, blocks: torch.Tensor, group: Group, heads: int) -> torch.Tensor:
    """left (P * J, ..., ...) times the blocks (blocks * J, ..., ...) of its pairs, run by run."""
    if len(group.runs) == 1:
        (_, _, block) = group.runs[0]
        return torch.bmm(left, blocks[block * heads : block * heads + len(left)])
    made = left.new_empty(*left.shape[:2], blocks.shape[2])
    for begin, end, block in group.runs:
        at = slice(begin * heads, end * heads)
        torch.bmm(left[at], blocks[block * heads : (block + end - begin) * heads], out=made[at])
    return made


def _softmax(scores: torch.Tensor, size: int, sinks_H: torch.Tensor | None) -> torch.Tensor:
    """Over the last axis; a sink takes its share and gives nothing. scores: (B, J, G, R, N * S)."""
    if sinks_H is None:
        return torch.softmax(scores, -1)
    sink = scores.new_full((*scores.shape[:-1], size), MASKED)  # a block of its own: lengths stay whole blocks
    sink[..., 0] = sinks_H.view(scores.shape[1], scores.shape[2], 1).to(scores.dtype)
    return torch.softmax(torch.cat((sink, scores), -1), -1)[..., size:].contiguous()
