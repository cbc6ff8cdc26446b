"""How many requests may be here at a time, and how many bytes of memory their texts may take.

Rules: core. Of the places to wait and of the bytes peers may take three quarters and strangers half (QUEUE_SHARE), so
that a flood of theirs leaves room for the others; one requester half (REQUESTER_SHARE), but this machine's own clients,
who are one requester, all. What does not fit is refused before anything is computed for it.
"""

from __future__ import annotations

import math
import sys
from collections import Counter

from model.step import QUEUE_SHARE, Priority
from node.errors import NO_ROOM_RETRY_S, NoRoom, TooMany
from node.requester import OWN, Requester
from node.work import EmbedWork, GenerateWork, Message

REQUESTER_SHARE = 0.5
TOKEN_ID_BYTES = 40  # of a token id in a tuple, and its number
QUEUED_BYTES_MAX = 64 << 20


class Room:
    """One queue's bounds, and who takes how much of them."""

    def __init__(self, what: str, bytes_max: int = QUEUED_BYTES_MAX) -> None:
        """what: the requests' name in errors, in the plural."""
        self._what, self._bytes_max = what, bytes_max
        self._counts: Counter[Requester] = Counter()
        self._bytes: Counter[Requester] = Counter()

    @property
    def bytes(self) -> int:
        """That texts of requests take now."""
        return self._bytes.total()

    def __len__(self) -> int:
        return self._counts.total()

    def enter(self, requester: Requester, size: int, *, slots: int, queue_max: int) -> None:
        """One more, of so many bytes, where `slots` run and queue_max wait. Raises NoRoom, TooMany; then it is not."""
        count, total = self._counts[requester] + 1, self._bytes[requester] + size
        most, bytes_most = self._most(REQUESTER_SHARE, slots, queue_max)
        if requester != OWN and (count > most or total > bytes_most):
            raise TooMany(
                f"{count - 1} {self._what} of yours, of {total - size:,} bytes, are here and one requester may have "
                f"{most}, of {bytes_most:,} bytes: wait for one to end",
                retry_after_s=NO_ROOM_RETRY_S,
            )
        for priority in Priority:
            if priority > requester.priority:
                break
            count = 1 + sum(n for who, n in self._counts.items() if who.priority >= priority)
            total = size + sum(n for who, n in self._bytes.items() if who.priority >= priority)
            most, bytes_most = self._most(QUEUE_SHARE[priority], slots, queue_max)
            if count > most or total > bytes_most:
                raise NoRoom(
                    f"{count - 1} {self._what} of class {priority.name.lower()} or lower, of {total - size:,} bytes, "
                    f"are here and {most}, of {bytes_most:,} bytes, may be: try again later",
                    retry_after_s=NO_ROOM_RETRY_S,
                )
        self._counts[requester] += 1
        self._bytes[requester] += size

    def leave(self, requester: Requester, size: int) -> None:
        """One that entered with so many bytes has ended."""
        self._counts[requester] -= 1
        self._bytes[requester] -= size
        if not self._counts[requester]:
            del self._counts[requester], self._bytes[requester]

    def _most(self, share: float, slots: int, queue_max: int) -> tuple[int, int]:
        return slots + math.ceil(queue_max * share), int(self._bytes_max * share)


def held_bytes(work: GenerateWork | EmbedWork) -> int:
    """About what a request's texts and token ids take in memory."""
    if isinstance(work, EmbedWork):
        return sum(_bytes_of(text) for text in work.texts)
    messages = sum(_bytes_of(text) for message in work.messages or () for text in texts_of(message))
    texts = _bytes_of(work.text or "") + _bytes_of(work.delivered_text)
    for tool in () if work.tools is None else work.tools.tools:
        texts += _bytes_of(tool.name) + _bytes_of(tool.description or "") + _bytes_of(tool.parameters or "")
    return messages + texts + _bytes_of(work.tokens or ()) + _bytes_of(work.delivered)


def texts_of(message: Message) -> tuple[str, ...]:
    """What a message holds, its calls included."""
    return (message.content, *(text for call in message.tool_calls for text in (call.id, call.name, call.arguments)))


def _bytes_of(text: str | tuple[int, ...]) -> int:
    if not text:
        return 0
    return sys.getsizeof(text) if isinstance(text, str) else TOKEN_ID_BYTES * len(text)
