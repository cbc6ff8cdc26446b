"""What was computed once and may be asked again: bounded in bytes and entries, the longest unused goes first.

Rules: core. An entry is found again by who asked for it, and by nobody else: that an answer comes at once tells that it
was asked before. The key says everything that the answer depends on: the model with its revision and number type, who
asks, the text and all parameters; it holds a digest of these, not the text. Own clients, peers and strangers have
shelves of their own (CACHE_SHARE of the bytes), so that nobody's flood puts out what is kept for those before them. One
entry takes at most ENTRY_SHARE of its shelf.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Generic, TypeVar

import msgspec

from model.config import ModelFacts
from model.step import Priority
from node.requester import Requester

CACHE_SHARE = {Priority.OWN: 0.5, Priority.PEER: 0.375, Priority.STRANGER: 0.125}
ENTRY_SHARE = 0.125
ENTRY_BYTES = 512  # what a key, and an entry's places in the tables, take beside what it holds
ENTRIES_MAX = 65_536  # of a shelf

T = TypeVar("T")
Key = tuple[ModelFacts, bytes]


def key_of(facts: ModelFacts, requester: Requester, *asked: object) -> Key:
    """What one requester's question to one model is found by. asked: text and parameters, as msgspec writes them."""
    return facts, sha256(msgspec.msgpack.encode((requester.name, asked))).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStatistics:
    """Counts since start, by kind of answer; what is kept now."""

    queries: dict[str, int]
    hits: dict[str, int]
    stored: dict[str, int]
    evicted: int
    forgotten: int  # since their model's weights are served no more
    entries: int
    bytes: int
    bytes_max: int


class Shelf(Generic[T]):
    """What is kept for one class of requesters, the longest unused first."""

    def __init__(self, bytes_max: int, entries_max: int) -> None:
        self.bytes_max, self.bytes = bytes_max, 0
        self._entries_max = entries_max
        self._entries: dict[Key, tuple[T, int]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: Key) -> T | None:
        """What is kept under the key, which is now the latest used."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return None
        self._entries[key] = entry
        return entry[0]

    def put(self, key: Key, value: T, size: int) -> int | None:
        """Keep a value of so many bytes; how many others went for it, None when it is too large and not kept."""
        self._drop(key)
        size += ENTRY_BYTES
        if size > self.bytes_max * ENTRY_SHARE:
            return None
        self._entries[key] = (value, size)
        self.bytes += size
        evicted = 0
        while self.bytes > self.bytes_max or len(self._entries) > self._entries_max:
            self._drop(next(iter(self._entries)))
            evicted += 1
        return evicted

    def forget(self, is_old: Callable[[ModelFacts], bool]) -> int:
        """Drop what was made by such models; how many entries."""
        old = [key for key in self._entries if is_old(key[0])]
        for key in old:
            self._drop(key)
        return len(old)

    def _drop(self, key: Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.bytes -= entry[1]


class Cache(Generic[T]):
    """The shelves of all classes. bytes_max 0: nothing is kept."""

    def __init__(self, bytes_max: int, *, entries_max: int = ENTRIES_MAX) -> None:
        self._bytes_max = bytes_max
        self._shelves = {
            priority: Shelf[T](int(bytes_max * share), entries_max) for priority, share in CACHE_SHARE.items()
        }
        self._queries, self._hits, self._stored = Counter[str](), Counter[str](), Counter[str]()
        self._evicted = self._forgotten = 0

    def entry_bytes_max(self, priority: Priority) -> int:
        """The most that one entry of this class may hold."""
        return int(self._shelves[priority].bytes_max * ENTRY_SHARE) - ENTRY_BYTES

    def find(self, kind: str, requester: Requester, key: Key) -> T | None:
        """What is kept for a question. kind: under which it is counted."""
        value = self._shelves[requester.priority].find(key)
        self._queries[kind] += 1
        self._hits[kind] += value is not None
        return value

    def put(self, kind: str, requester: Requester, key: Key, value: T, size: int) -> None:
        """Keep the answer to a question, if it is not too large."""
        evicted = self._shelves[requester.priority].put(key, value, size)
        self._stored[kind] += evicted is not None
        self._evicted += evicted or 0

    def forget(self, serves: tuple[ModelFacts, ...]) -> None:
        """Drop what was made by any model but these."""
        self._forgotten += sum(shelf.forget(lambda facts: facts not in serves) for shelf in self._shelves.values())

    def statistics(self) -> CacheStatistics:
        """A snapshot of the counters."""
        return CacheStatistics(
            queries=dict(self._queries),
            hits=dict(self._hits),
            stored=dict(self._stored),
            evicted=self._evicted,
            forgotten=self._forgotten,
            entries=sum(map(len, self._shelves.values())),
            bytes=sum(shelf.bytes for shelf in self._shelves.values()),
            bytes_max=self._bytes_max,
        )
