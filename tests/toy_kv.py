"""KV memory that remembers what was written where, by whom and under which weights, for the tests of blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from model.blocks import BlockManager


class Cell(NamedTuple):
    """What one token's KV depends on: all tokens up to it, and the weights. owner: its sequence, if not shared."""

    text: int  # a number for all tokens up to this one: equal texts have equal ones
    revision: int
    owner: str | None


@dataclass(slots=True, kw_only=True)
class Reader:
    """A sequence that has a table. tokens is its owner's list, which grows; revision: when it got the table."""

    name: str
    tokens: list[int]
    shared: int | None  # its first tokens; None: all
    revision: int
    computed: int = 0
    texts: list[int] = field(default_factory=list)


class ToyKV:
    """The cells of all blocks of a pool."""

    def __init__(self, blocks: BlockManager) -> None:
        self.blocks = blocks
        self.cells: dict[tuple[int, int], Cell] = {}
        self._texts: dict[tuple[int, int], int] = {}  # (text, one token more) -> text

    def place(self, table: Sequence[int], position: int) -> tuple[int, int]:
        return table[position // self.blocks.block_tokens], position % self.blocks.block_tokens

    def cell(self, reader: Reader, position: int) -> Cell:
        """What must stand at this position."""
        for token in reader.tokens[len(reader.texts) : position + 1]:
            longer = reader.texts[-1] if reader.texts else 0, token
            reader.texts.append(self._texts.setdefault(longer, len(self._texts) + 1))
        return Cell(
            reader.texts[position],
            reader.revision,
            reader.name if reader.shared is not None and position >= reader.shared else None,
        )

    def write(self, reader: Reader, end: int, readers: Sequence[Reader]) -> None:
        """Computes [computed, end) into the reader's blocks, none of which may be another's or open to others."""
        users = Counter(block for other in readers for block in self.blocks.table(other.name))
        table = self.blocks.table(reader.name)
        for position in range(reader.computed, end):
            block, offset = self.place(table, position)
            assert users[block] == 1, f"block {block} is written and {users[block]} sequences hold it"
            assert self.blocks._entries[block] is None, f"block {block} is written and can be found by others"
            self.cells[block, offset] = self.cell(reader, position)

    def check_reads(self, reader: Reader) -> None:
        """Whatever is computed of a sequence is there, and is its own text."""
        table = self.blocks.table(reader.name)
        assert len(set(table)) == len(table), f"{reader.name} has a block twice"
        assert len(table) * self.blocks.block_tokens >= reader.computed
        for position in range(reader.computed):
            found = self.cells[self.place(table, position)]
            assert found == self.cell(reader, position), f"{reader.name} reads another's KV at {position}"

    def check(self, readers: Sequence[Reader]) -> None:
        """So it is for all of them; and no block is lost."""
        blocks = self.blocks
        for reader in readers:
            self.check_reads(reader)
        users = Counter(block for reader in readers for block in blocks.table(reader.name))
        assert blocks._users == [users[block] for block in range(blocks.blocks)], "a count is wrong"
        figures = blocks.statistics()
        assert figures.used == len(users)
        assert figures.free + figures.cached + figures.used == blocks.blocks, "a block is lost"
        assert sorted([*blocks._free, *blocks._cached, *users]) == list(range(blocks.blocks))
        self.check_tree()

    def check_tree(self) -> None:
        """Each block that says it is in the tree can be reached; free ones are not in it, cached ones are."""
        reached, going = set(), [*self.blocks._roots.values()]
        while going:
            entry = going.pop()
            for child in entry.children.values():
                assert child.parent is entry
                assert self.blocks._entries[child.block] is child
                reached.add(child.block)
                going.append(child)
        assert reached == {block for block, entry in enumerate(self.blocks._entries) if entry is not None}
        assert reached.isdisjoint(self.blocks._free)
        assert reached >= set(self.blocks._cached)
