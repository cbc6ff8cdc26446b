"""One forward pass over blocks, as index tensors: which token goes where, and which queries meet which blocks.

Rules: sequences that take one token each make groups by the size of their tables, so that a short one is not padded to
a long one's; each chunk of a prompt is cut into tiles whose scores stay in the cache. Where fewer than ROWS_MIN query
heads share a key head, tokens of an answer go one by one however many there are at once, since fewer rows are added up
in another order, and padding them would double what a decode costs. Everything is made once a pass and used by all
layers.
Legend: as in model/paged.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch

ROWS_MIN: Final = 4  # rows of queries to a product, so that it does not matter how many more there are
WHOLE_MIN: Final = 64  # rows for which a sequence's keys are worth being put in one piece
SCORES_MAX: Final = 1 << 20  # numbers in a tile: 4 MB in fp32
LINES: Final = (
    8  # of our own kernels: queries of a prompt that go over a block together; their scores stay in the cache
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One sequence's share of a pass: tokens [begin, end) of it, and the blocks that hold it from its start. prompt:
    how many of its tokens are its prompt."""

    table: Sequence[int]
    begin: int
    end: int
    prompt: int


@dataclass(slots=True, kw_only=True, eq=False)
class Group:
    """Queries that are answered together. rows: where in the pass the tokens are (B * R); read: the same, each
    sequence's last token repeated up to rows_padded. row_of_pair, place: of each pair, its sequence's rows, and its
    place of B * N; gather: the pair of each place, None where pairs and places are the same. runs: (first pair, end,
    first block)."""

    rows: torch.Tensor
    read: torch.Tensor
    positions: torch.Tensor  # (B, R padded)
    tokens_each: int
    rows_padded: int
    longest: int
    pairs: int
    row_of_pair: torch.Tensor
    place: torch.Tensor
    gather: torch.Tensor | None
    runs: list[tuple[int, int, int]]
    size: int
    whole: torch.Tensor | None  # of a tile of a chunk: the blocks of all the chunk
    _in_order: bool
    _begin: int
    _bias: dict[int | None, torch.Tensor] = field(default_factory=dict)

    @property
    def sequences(self) -> int:
        """B."""
        return len(self.positions)

    @property
    def seen_by_all(self) -> int:
        """So many keys, whole blocks of them, are before every query."""
        return self._begin // self.size * self.size

    def is_whole(self, tokens: int) -> bool:
        """Whether it is all of a pass of so many tokens, in order."""
        return self._in_order and len(self.rows) == tokens

    def bias(self, window: int | None) -> torch.Tensor:
        """(B, 1, 1, R, N * S): 0 where a key may be seen, minus infinity elsewhere."""
        if (bias := self._bias.get(window)) is None:
            positions = self.positions[:, :1] if self.tokens_each == 1 else self.positions
            key = torch.arange(self.longest * self.size, device=positions.device)
            seen = key <= positions[..., None]
            if window is not None:
                seen &= key > positions[..., None] - window
            bias = torch.zeros(seen.shape, device=positions.device).masked_fill_(~seen, float("-inf"))
            bias = self._bias[window] = bias[:, None, None]
        return bias


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A pass, as our own kernels have it (model/native_attention.py): int64. slots (T): where a token's key goes,
    counted in tokens of all blocks. spans (T, 2): first token that it sees, and the end. groups (n, 3): first row,
    rows, and where their table begins in `tables`. longest: of the ends, in whole blocks. work: keys met, by all
    queries of one head."""

    slots: torch.Tensor
    spans: torch.Tensor
    groups: torch.Tensor
    tables: torch.Tensor
    longest: int
    work: int
    tokens: int


class Pass:
    """What one forward pass does. tokens: T, without those that fill up. first: block and place of the first."""

    def __init__(self, parts: Sequence[Part], block_tokens: int, device: torch.device) -> None:
        self._parts, self._size, self._device = parts, block_tokens, device
        self._offsets: list[int] = []
        slots, fresh = list[int](), list[int]()
        self.positions: list[int] = []
        for part in parts:
            self._offsets.append(len(slots))
            for position in range(part.begin, part.end):
                block, at = part.table[position // block_tokens], position % block_tokens
                slots.append(block * block_tokens + at)
                if at == 0:
                    fresh.append(block)
            self.positions += range(part.begin, part.end)
        self.tokens = len(slots)
        self.first = divmod(slots[0], block_tokens) if slots else (0, 0)
        self.fresh = self._tensor(fresh) if fresh else None
        self._slots = self._tensor(slots)
        self._places: dict[int, torch.Tensor] = {}
        self._groups: dict[tuple[int, int], list[Group]] = {}
        self._rows: dict[tuple[int, int | None], Rows] = {}

    def places(self, heads: int) -> torch.Tensor:
        """(T * J): rows of a layer's blocks, seen as rows of one head and token."""
        if (places := self._places.get(heads)) is None:
            block, at = self._slots // self._size, self._slots % self._size
            head = torch.arange(heads, device=self._device)[:, None]
            places = self._places[heads] = ((block * heads + head) * self._size + at).T.reshape(-1)
        return places

    def rows(self, shared: int, window: int | None) -> Rows:
        """The pass for a layer with `shared` query heads to a key head, which sees `window` tokens at most."""
        if (rows := self._rows.get((shared, window))) is None:
            rows = self._rows[shared, window] = self._made_rows(max(1, LINES // shared), window)
        return rows

    def _made_rows(self, together: int, window: int | None) -> Rows:
        spans, groups, tables = list[tuple[int, int]](), list[tuple[int, int, int]](), list[int]()
        for part in self._parts:
            start = len(tables)
            tables += part.table[: self._blocks(part.end)]
            for position in range(part.begin, part.end):
                if (position - part.begin) % together == 0:
                    groups.append((len(spans), min(together, part.end - position), start))
                spans.append((0 if window is None else max(0, position + 1 - window), position + 1))
        return Rows(
            slots=self._slots,
            spans=torch.tensor(spans, dtype=torch.long, device=self._device),
            groups=torch.tensor(groups, dtype=torch.long, device=self._device),
            tables=self._tensor(tables),
            longest=self._blocks(max(end for _, end in spans)) * self._size,
            work=sum(end - first for first, end in spans),
            tokens=self.tokens,
        )

    def groups(self, shared: int, heads: int) -> list[Group]:
        """The pass's groups for a layer with `heads` query heads, `shared` to a key head."""
        if (groups := self._groups.get((shared, heads))) is None:
            groups = self._groups[shared, heads] = list(self._made(shared, heads))
        return groups

    def _made(self, shared: int, heads: int) -> Iterator[Group]:
        padded = -(-ROWS_MIN // shared)
        single: dict[tuple[int, int], list[tuple[int, int, int]]] = {}  # by rows to pad to, and size of the table
        for number, part in enumerate(self._parts):
            middle = part.end if padded == 1 else min(part.end, max(part.begin, part.prompt))
            begin, ones = part.begin, [(position, 1) for position in range(middle, part.end)]
            if middle - begin == 1:
                ones.append((begin, padded))
                begin = middle
            for position, rows in ones:
                alike = single.setdefault((rows, self._blocks(position + 1).bit_length()), [])
                alike.append((number, position, position + 1))
            whole = None
            if (middle - begin) * shared >= WHOLE_MIN:
                whole = self._tensor(list(part.table[: self._blocks(middle)]))
            while begin < middle:
                end = min(middle, begin + max(1, SCORES_MAX // (heads * self._size * self._blocks(middle))))
                yield self._group([(number, begin, end)], padded, whole)
                begin = end
        for (rows, _), spans in single.items():
            yield self._group(spans, rows, None)

    def _blocks(self, end: int) -> int:
        """How many blocks hold the tokens before `end`."""
        return -(-end // self._size)

    def _group(self, spans: list[tuple[int, int, int]], padded: int, whole: torch.Tensor | None) -> Group:
        """One group of spans (number of the part, begin, end), all of the same length."""
        each = spans[0][2] - spans[0][1]
        padded = max(each, padded)
        rows, read, positions = list[int](), list[int](), list[list[int]]()
        for number, begin, end in spans:
            first = self._offsets[number] + begin - self._parts[number].begin
            own = list(range(first, first + each))
            rows += own
            read += own + own[-1:] * (padded - each)
            positions.append([*range(begin, end), *[end - 1] * (padded - each)])
        longest = max(self._blocks(end) for _, _, end in spans)
        wanted = list[tuple[int, int, int, int]]()  # (which of its users, block, sequence, its place)
        users: Counter[int] = Counter()
        for owner, (number, _, end) in enumerate(spans):
            for at, block in enumerate(self._parts[number].table[: self._blocks(end)]):
                wanted.append((users[block], block, owner, owner * longest + at))
                users[block] += 1
        if len(spans) > 1:
            wanted.sort()  # so that neighbours make runs
        places = [place for *_, place in wanted]
        gather = None
        if places != list(range(len(spans) * longest)):
            pair_of = [0] * (len(spans) * longest)
            for pair, place in enumerate(places):
                pair_of[place] = pair
            gather = self._tensor(pair_of)
        return Group(
            rows=self._tensor(rows),
            read=self._tensor(read),
            positions=torch.tensor(positions, device=self._device),
            tokens_each=each,
            rows_padded=padded,
            longest=longest,
            pairs=len(wanted),
            row_of_pair=self._tensor([read[owner * padded + at] for _, _, owner, _ in wanted for at in range(padded)]),
            place=self._tensor(places),
            gather=gather,
            runs=_runs([block for _, block, _, _ in wanted]),
            size=self._size,
            whole=whole,
            _in_order=rows == list(range(len(rows))),
            _begin=min(begin for _, begin, _ in spans),
        )

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)


def _runs(blocks: list[int]) -> list[tuple[int, int, int]]:
    """Pairs whose blocks follow one another: (first pair, end, first block)."""
    runs, begin = list[tuple[int, int, int]](), 0
    for pair in range(1, len(blocks) + 1):
        if pair == len(blocks) or blocks[pair] != blocks[pair - 1] + 1:
            runs.append((begin, pair, blocks[begin]))
            begin = pair
    return runs
