"""model/blocks.py: no block lost, none shared wrongly, private is private, and forgotten is forgotten."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from model.blocks import BlockManager, Digest, chained
from tests.toy_kv import Reader, ToyKV

SIZE = 4


def colliding(parent: bytes, tokens: Sequence[int]) -> bytes:
    """A hash that is nearly none: all blocks of equal sum collide."""
    return bytes([sum(tokens) % 2])


class Histories(RuleBasedStateMachine):
    """Sequences come, are computed in pieces, grow and go, over a few texts that share their beginnings."""

    digest: Digest = staticmethod(chained)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(9, SIZE, digest=type(self).digest)
        self.kv = ToyKV(self.blocks)
        self.readers: list[Reader] = []
        self.count = self.revision = 0

    @rule(
        choices=st.lists(st.integers(0, 1), min_size=1, max_size=5),
        tail=st.integers(0, SIZE),
        shared=st.sampled_from([None, None, 0, 3, 4, 9]),
        spare=st.sampled_from([0, 0, 2]),
    )
    def allocate(self, choices: list[int], tail: int, shared: int | None, spare: int) -> None:
        tokens = [token for choice in choices for token in ([1, 2, 3, 4], [2, 1, 4, 3])[choice]] + [9] * tail
        self.count += 1
        name = f"s{self.count}"
        before = self.blocks.available
        computed = self.blocks.allocate(name, tokens, shared, spare)
        if computed is None:
            assert before == self.blocks.available
            assert before < self.blocks.blocks_for(len(tokens)) + spare
            return
        assert self.blocks.available >= spare
        assert computed < len(tokens)
        assert shared is None or computed <= shared
        self.readers.append(Reader(name=name, tokens=tokens, shared=shared, revision=self.revision, computed=computed))

    @precondition(lambda self: self.readers)
    @rule(choice=st.integers(0, 99), count=st.integers(1, 9), takes_over=st.booleans())
    def compute(self, choice: int, count: int, takes_over: bool) -> None:
        reader = self.readers[choice % len(self.readers)]
        if takes_over:
            computed = self.blocks.reuse(reader.name, reader.tokens, reader.computed)
            assert reader.computed <= computed < max(len(reader.tokens), reader.computed + 1)
            reader.computed = computed
        end = min(len(reader.tokens), reader.computed + count)
        self.kv.write(reader, end, self.readers)
        reader.computed = end
        self.blocks.computed(reader.name, reader.tokens, end)

    @precondition(lambda self: any(r.computed == len(r.tokens) for r in self.readers))
    @rule(choice=st.integers(0, 99), token=st.integers(1, 2))
    def append(self, choice: int, token: int) -> None:
        ready = [reader for reader in self.readers if reader.computed == len(reader.tokens)]
        reader = ready[choice % len(ready)]
        table, available = self.blocks.table(reader.name), self.blocks.available
        needs = len(reader.tokens) == len(table) * SIZE
        if self.blocks.append(reader.name, len(reader.tokens) + 1):
            reader.tokens.append(token)
            assert self.blocks.table(reader.name)[: len(table)] == table
            assert len(self.blocks.table(reader.name)) == len(table) + needs
        else:
            assert needs
            assert available == 0

    @precondition(lambda self: self.readers)
    @rule(choice=st.integers(0, 99))
    def free(self, choice: int) -> None:
        reader = self.readers.pop(choice % len(self.readers))
        self.blocks.free(reader.name)

    @rule()
    def forget(self) -> None:
        self.revision += 1
        self.blocks.forget(b"%d" % self.revision)
        assert self.blocks.statistics().cached == 0

    @invariant()
    def nothing_is_lost_or_mixed_up(self) -> None:
        self.kv.check(self.readers)

    def teardown(self) -> None:
        for reader in self.readers:
            self.blocks.free(reader.name)
        self.kv.check([])
        assert self.blocks.available == self.blocks.blocks


class CollidingHistories(Histories):
    """The same with hashes that collide all the time."""

    digest = staticmethod(colliding)


TestHistories = pytest.mark.slow(Histories.TestCase)
TestHistories.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestCollidingHistories = pytest.mark.slow(CollidingHistories.TestCase)
TestCollidingHistories.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def filled(blocks: BlockManager, name: str, tokens: Sequence[int], shared: int | None = None) -> int | None:
    """Allocates and computes; how much was reused."""
    reused = blocks.allocate(name, tokens, shared)
    if reused is not None:
        blocks.computed(name, tokens, len(tokens))
    return reused


def test_a_shared_beginning_costs_its_blocks_once() -> None:
    blocks = BlockManager(16, SIZE)
    system = list(range(12))
    assert filled(blocks, "a", [*system, 50, 51]) == 0
    assert filled(blocks, "b", [*system, 60, 61]) == 12
    assert blocks.table("a")[:3] == blocks.table("b")[:3]
    figures = blocks.statistics()
    assert (figures.used, figures.hits, figures.misses) == (5, 3, 3)
    blocks.free("a")
    blocks.free("b")
    assert filled(blocks, "c", [*system, 70]) == 12
    assert (blocks.statistics().cached, blocks.statistics().used) == (0, 4)


def test_what_is_not_computed_is_not_shared() -> None:
    blocks = BlockManager(16, SIZE)
    tokens = list(range(10))
    assert blocks.allocate("a", tokens) == 0
    assert blocks.allocate("b", tokens) == 0
    blocks.computed("a", tokens, 7)  # one block and a half
    assert blocks.allocate("c", tokens) == 4
    assert blocks.reuse("b", tokens, 0) == 4
    assert blocks.table("b")[0] == blocks.table("a")[0] == blocks.table("c")[0]
    assert len({blocks.table(name)[1] for name in "abc"}) == 3
    assert blocks.statistics().used == 7


def test_the_last_token_is_always_computed() -> None:
    """Its forward pass gives the next one."""
    blocks = BlockManager(16, SIZE)
    assert filled(blocks, "a", list(range(8))) == 0
    assert filled(blocks, "b", list(range(8))) == 4
    assert filled(blocks, "c", list(range(9))) == 8


def test_private_neither_uses_nor_leaves() -> None:
    blocks = BlockManager(16, SIZE)
    tokens = list(range(9))
    assert filled(blocks, "private", tokens, shared=0) == 0
    assert filled(blocks, "open", tokens) == 0
    assert filled(blocks, "private too", tokens, shared=0) == 0
    blocks.free("private")
    blocks.free("private too")
    assert blocks.statistics().cached == 0
    assert blocks.statistics().hits == 0


def test_no_more_is_shared_than_may_be() -> None:
    blocks = BlockManager(16, SIZE)
    tokens = list(range(13))
    assert filled(blocks, "a", tokens, shared=11) == 0
    assert filled(blocks, "b", tokens) == 8
    assert filled(blocks, "c", tokens, shared=7) == 4
    assert filled(blocks, "d", tokens) == 12
    blocks.allocate("e", [7] * 13, shared=7)
    assert len(list(blocks.keys("e", [7] * 13, 13))) == 1


def test_the_oldest_goes_first_and_of_one_sequence_the_end() -> None:
    blocks = BlockManager(6, SIZE)
    old, new = [1] * 9, [2] * 9
    filled(blocks, "old", old)
    blocks.free("old")
    filled(blocks, "new", new)
    blocks.free("new")
    # 2 cached of each, 2 free: of four new blocks two push out what is cached
    blocks.allocate("x", [3] * 12, shared=0)
    blocks.free("x")
    assert blocks.statistics().cached == 3
    assert filled(blocks, "again", old) == 4  # the first block outlived the second
    blocks.free("again")
    assert filled(blocks, "new again", new) == 8


def test_what_was_used_again_is_young_again() -> None:
    blocks = BlockManager(5, SIZE)
    for name, token in (("a", 1), ("b", 2), ("a again", 1)):
        filled(blocks, name, [token] * 5)
        blocks.free(name)
    blocks.allocate("x", [3] * 16, shared=0)
    blocks.free("x")
    assert filled(blocks, "a at last", [1] * 5) == 4
    blocks.free("a at last")
    assert filled(blocks, "b at last", [2] * 5) == 0


def test_forgotten_is_not_used_again_nor_by_way_of_who_runs() -> None:
    blocks = BlockManager(16, SIZE, salt=b"one")
    tokens = list(range(12))
    filled(blocks, "gone", tokens)
    blocks.free("gone")
    blocks.allocate("runs", tokens)
    blocks.computed("runs", tokens, 4)
    blocks.forget(b"two")
    blocks.computed("runs", tokens, 12)
    assert blocks.reuse("runs", tokens, 12) == 12
    assert filled(blocks, "new", tokens) == 0
    assert filled(blocks, "newer", tokens) == 8


def test_equal_hashes_are_no_equal_texts() -> None:
    blocks = BlockManager(16, SIZE, digest=lambda parent, tokens: b"")
    assert filled(blocks, "a", [1, 2, 3, 4, 5]) == 0
    assert filled(blocks, "b", [4, 3, 2, 1, 5]) == 0
    assert filled(blocks, "c", [1, 2, 3, 4, 5]) == 4


def test_what_follows_a_text_is_not_found_after_another_of_equal_hash() -> None:
    blocks = BlockManager(16, SIZE, digest=lambda parent, tokens: bytes([len(parent), tokens[0] // 5]))
    assert filled(blocks, "a", [1, 2, 3, 4, 0]) == 0
    assert filled(blocks, "b", [4, 3, 2, 1, 7, 7, 7, 7, 0]) == 0
    assert filled(blocks, "c", [1, 2, 3, 4, 7, 7, 7, 7, 0]) == 4


def test_hashes_are_chained_and_the_same_everywhere() -> None:
    assert chained(b"a", [1, 2]) != chained(b"b", [1, 2])
    # printf '\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0' | sha256sum
    assert chained(b"", [1, 2]).hex().startswith("0c730b69905c5ef7")


def test_hashes_name_the_weights() -> None:
    """So that two nodes can compare them."""
    tokens = list(range(9))

    def keys(blocks: BlockManager) -> list[bytes]:
        blocks.allocate("a", tokens)
        found = list(blocks.keys("a", tokens, 9))
        blocks.free("a")
        return found

    blocks, other = BlockManager(4, SIZE, salt=b"one"), BlockManager(8, SIZE, salt=b"two")
    before = keys(blocks)
    assert len(before) == 2
    assert not set(before) & set(keys(other))
    blocks.forget(b"two")
    assert keys(blocks) == keys(other)


def test_a_full_pool_changes_nothing() -> None:
    blocks = BlockManager(3, SIZE)
    filled(blocks, "a", [1] * 12)
    assert blocks.allocate("b", [2]) is None
    assert not blocks.append("a", 13)
    assert len(blocks.table("a")) == 3
    blocks.free("a")
    assert blocks.allocate("b", [2] * 12, spare=1) is None
    assert blocks.allocate("b", [2] * 12) == 0


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0)])
def test_bad_sizes_are_said(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="wanted at least 1"):
        BlockManager(*sizes)
