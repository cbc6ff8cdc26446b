"""KV memory in blocks: which block holds which tokens of which sequence, and which prefixes can be used again.

Rules: core, no torch; a block is a number. A block may be shared once it is full and its KV was computed, so a shared
block is never written. What can be shared stands in a tree: a child is one more block of tokens after its parent's.
Children are found by a chained hash and their token ids compared, so that nobody gets another text's KV even where two
hashes are equal. Blocks that nobody uses stay cached, oldest first to go; a sequence's last blocks go before its first,
and a block that goes takes its descendants out of the tree with it. A sequence's blocks are neighbours where that can
be had: they are read at once then. A private sequence neither uses the tree nor enters
it: whoever shares can be told by how soon the first token comes.
Source: GeeeekExplorer/nano-vllm `nanovllm/engine/block_manager.py`; vLLM "Automatic Prefix Caching".
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

ROOT = -1  # the block of the tree's root, which is none
LOOK_MAX = 512  # blocks that are looked at for a place
NO_LIMIT = sys.maxsize  # of tokens that may be shared

Digest = Callable[[bytes, Sequence[int]], bytes]


def chained(parent: bytes, tokens: Sequence[int]) -> bytes:
    """SHA-256 over the parent's hash and the block's token ids, the same on every machine."""
    return sha256(parent + struct.pack(f"<{len(tokens)}q", *tokens)).digest()


@dataclass(slots=True, eq=False)
class _Entry:
    """A full block whose KV was computed, in the tree of prefixes."""

    digest: bytes
    tokens: tuple[int, ...]
    block: int
    parent: _Entry | None
    children: dict[bytes, _Entry] = field(default_factory=dict)


@dataclass(slots=True)
class _Table:
    """blocks: those of a sequence, in order. entry: where the first `entered` of them end in the tree; None: it has
    nothing to do with the tree, for ever. shared: how many of its first tokens may be in the tree."""

    blocks: list[int]
    entry: _Entry | None
    entered: int
    shared: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockStatistics:
    """Blocks: free hold nothing, cached hold a prefix that nobody uses now, used belong to a sequence or more.
    hits, misses: prompt blocks that could have been shared, and were or were not."""

    free: int
    cached: int
    used: int
    hits: int
    misses: int


class BlockManager:
    """A fixed pool of blocks, and a table of them for each sequence."""

    def __init__(self, blocks: int, block_tokens: int, salt: bytes = b"", digest: Digest = chained) -> None:
        """salt: names the weights. Raises ValueError for a size below 1."""
        if min(blocks, block_tokens) < 1:
            raise ValueError(f"blocks = {blocks}, block_tokens = {block_tokens} came, wanted at least 1 of each")
        self.blocks, self.block_tokens = blocks, block_tokens
        self._digest = digest
        self._salt = salt
        self._roots: dict[int, _Entry] = {}  # by circle
        self._users = [0] * blocks  # how many tables hold the block
        self._entries: list[_Entry | None] = [None] * blocks
        self._free = set(range(blocks))
        self._next = 0  # where the next sequence is looked for a place
        self._cached: dict[int, None] = {}  # in the tree, in no table; the oldest first
        self._tables: dict[str, _Table] = {}
        self._hits = self._misses = 0

    @property
    def available(self) -> int:
        """Blocks that can be had now, cached ones included."""
        return len(self._free) + len(self._cached)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks so many tokens need, with nothing shared."""
        return -(-tokens // self.block_tokens)

    def table(self, sequence: str) -> tuple[int, ...]:
        """The blocks of a sequence, in the order of its tokens."""
        return tuple(self._tables[sequence].blocks)

    def statistics(self) -> BlockStatistics:
        """The pool in numbers."""
        return BlockStatistics(
            free=len(self._free),
            cached=len(self._cached),
            used=self.blocks - self.available,
            hits=self._hits,
            misses=self._misses,
        )

    def allocate(
        self, sequence: str, tokens: Sequence[int], shared: int | None = None, spare: int = 0, circle: int = 0
    ) -> int | None:
        """A table for all these tokens; how many of the first have their KV already. At least the last has not: its
        forward pass gives the next token. shared: no more than its first so many are shared; None: all may be.
        circle: among those of this one only.

        None, and nothing has changed, unless `spare` blocks would still be available after.
        """
        assert tokens
        assert sequence not in self._tables, sequence
        limit = NO_LIMIT if shared is None else shared
        root = self._roots.setdefault(circle, _root(self._salt))
        found = list(self._found(root, tokens, 0, limit))
        fresh = self.blocks_for(len(tokens)) - len(found)
        idle = sum(self._users[entry.block] == 0 for entry in found)
        if fresh + idle + spare > self.available:
            return None
        self._hits += len(found)
        self._misses += self._shareable(tokens, limit) - len(found)
        blocks = [self._use(entry.block) for entry in found]
        while len(self._free) < fresh:
            self._drop_oldest()
        after = blocks[-1] if blocks and fresh and blocks[-1] + 1 in self._free else self._before_gap(fresh)
        for _ in range(fresh):
            after = self._use(self._take(after))
            blocks.append(after)
        entry = None if shared == 0 else (found[-1] if found else root)
        self._tables[sequence] = _Table(blocks, entry, len(found), limit)
        return len(found) * self.block_tokens

    def append(self, sequence: str, length: int) -> bool:
        """Makes the table hold `length` tokens, at most a block more than before; False: no block is available."""
        blocks = self._tables[sequence].blocks
        if length <= len(blocks) * self.block_tokens:
            return True
        if not self.available:
            return False
        blocks.append(self._use(self._take(blocks[-1])))
        return True

    def computed(self, sequence: str, tokens: Sequence[int], count: int) -> None:
        """The KV of tokens[:count] is in the table's blocks: the full ones can be shared from now on."""
        table, size = self._tables[sequence], self.block_tokens
        count = min(count, table.shared)
        while (entry := self._living(table)) is not None and (table.entered + 1) * size <= count:
            begin = table.entered * size
            part = tuple(tokens[begin : begin + size])
            key = self._digest(entry.digest, part)
            if (child := entry.children.get(key)) is None:
                block = table.blocks[table.entered]
                child = entry.children[key] = self._entries[block] = _Entry(key, part, block, entry)
            table.entry = child if child.tokens == part else None
            table.entered += 1

    def reuse(self, sequence: str, tokens: Sequence[int], computed: int) -> int:
        """Takes over what others have computed since this sequence, with so many tokens computed, got its table: its
        own blocks, not full yet, are given back. How many tokens have their KV now."""
        table = self._tables[sequence]
        if (entry := self._living(table)) is None:
            return computed
        for found in self._found(entry, tokens, table.entered, table.shared):
            own = table.blocks[table.entered]
            table.blocks[table.entered] = self._use(found.block)
            self._release(own)
            table.entry = found
            table.entered += 1
            self._hits, self._misses = self._hits + 1, self._misses - 1
        return max(computed, table.entered * self.block_tokens)

    def keys(self, sequence: str, tokens: Sequence[int], end: int) -> Iterator[bytes]:
        """Hashes of the sequence's next full blocks up to `end`: those that are to be computed, or that it could take
        over from others. None of a sequence that does not share."""
        table, size = self._tables[sequence], self.block_tokens
        entry = self._living(table)
        if entry is None:
            return
        digest = entry.digest
        for begin in range(table.entered * size, min(end, table.shared) - size + 1, size):
            digest = self._digest(digest, tokens[begin : begin + size])
            yield digest

    def free(self, sequence: str) -> None:
        """Gives the table back; what is in the tree stays cached."""
        for block in reversed(self._tables.pop(sequence).blocks):
            self._release(block)

    def forget(self, salt: bytes) -> None:
        """The weights have changed: nothing computed so far, nor later by a sequence that has a table now, is used by
        another."""
        for root in self._roots.values():
            for entry in list(root.children.values()):
                self._drop(entry)
        for table in self._tables.values():
            table.entry = None
        self._salt = salt
        self._roots.clear()

    def _shareable(self, tokens: Sequence[int], limit: int) -> int:
        """Blocks of these that can be used from the tree: full, and without the last token."""
        return min(len(tokens) - 1, limit) // self.block_tokens

    def _found(self, entry: _Entry, tokens: Sequence[int], at: int, limit: int) -> Iterator[_Entry]:
        """What is in the tree below `entry` of these tokens, from their block number `at` on."""
        size = self.block_tokens
        for begin in range(at * size, self._shareable(tokens, limit) * size, size):
            part = tuple(tokens[begin : begin + size])
            child = entry.children.get(self._digest(entry.digest, part))
            if child is None or child.tokens != part:
                return
            yield child
            entry = child

    def _living(self, table: _Table) -> _Entry | None:
        """Where the table stands in the tree; None if it never shares, or its place was dropped."""
        entry = table.entry
        if entry is not None and entry.block != ROOT and self._entries[entry.block] is not entry:
            table.entry = entry = None
        return entry

    def _use(self, block: int) -> int:
        self._cached.pop(block, None)
        self._users[block] += 1
        return block

    def _take(self, after: int) -> int:
        """A block for new content: the one after `after` if it is free, else another free one, else what was cached
        first."""
        if not self._free:
            self._drop_oldest()
        block = after + 1
        if block not in self._free:
            block = self._before_gap(1) + 1
        if block not in self._free:
            block = next(iter(self._free))
        self._free.remove(block)
        return block

    def _before_gap(self, size: int) -> int:
        """The block before so many free ones in a row; of those that are looked at, if there are."""
        start, length = self._next % self.blocks, 0
        for block in range(start, min(start + LOOK_MAX, self.blocks)):
            length = length + 1 if block in self._free else 0
            if length == size:
                self._next = block + 1
                return block - size
        self._next = 0 if start + LOOK_MAX >= self.blocks else start + LOOK_MAX
        return start - 1

    def _drop_oldest(self) -> None:
        entry = self._entries[next(iter(self._cached))]
        assert entry is not None
        self._drop(entry)

    def _release(self, block: int) -> None:
        self._users[block] -= 1
        if self._users[block] == 0:
            if self._entries[block] is None:
                self._free.add(block)
            else:
                self._cached[block] = None

    def _drop(self, entry: _Entry) -> None:
        """Takes an entry and its descendants out of the tree; those that nobody uses are free."""
        assert entry.parent is not None
        del entry.parent.children[entry.digest]
        going = [entry]
        while going:
            entry = going.pop()
            going += entry.children.values()
            entry.parent = None
            entry.children.clear()
            self._entries[entry.block] = None
            if entry.block in self._cached:
                del self._cached[entry.block]
                self._free.add(entry.block)


def _root(salt: bytes) -> _Entry:
    return _Entry(sha256(salt).digest(), (), ROOT, None)
