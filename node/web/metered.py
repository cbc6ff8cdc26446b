"""The Front as the routes see it: every answer and vector is charged to its account's tokens, and settled at its end.

Rules: it stands where all routes ask, so that none can forget it. An account without a limit of tokens costs nothing
here. What is refused never reaches the node. An answer that is left early pays for its prompt and for what was made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from crypto.sealing import KIND_SALT, PAD_BYTES
from node.errors import RequestError, TooLarge
from node.front import Front, RouteHint
from node.sealed import SealedCall
from node.web.errors import Limited
from node.web.meter import Charge, Meter
from node.work import AnswerItem, Embedded, EmbedWork, Finished, GenerateWork, Piece, Started

CHARS_PER_TOKEN = 3  # prose has four or five, other scripts and code fewer; the estimate is settled at the end
MESSAGE_TOKENS = 4  # what a chat's template puts around each
# What a peer says that a prompt had is its word alone. More than this is not believed: a token for every byte, four a
# character, and what a template says of its own.
PROMPT_TIMES = 4 * CHARS_PER_TOKEN
TEMPLATE_TOKENS = 4_096


class MeteredFront:
    """See the module; all else is asked of the front itself."""

    def __init__(self, front: Front, meter: Meter, drops: Counter[str]) -> None:
        self._front = front
        self._meter = meter
        self._drops = drops

    def __getattr__(self, name: str) -> Any:
        return getattr(self._front, name)

    @asynccontextmanager
    async def answer(self, work: GenerateWork, route: RouteHint) -> AsyncIterator[AsyncIterator[AnswerItem]]:
        """See node.front.Front. Raises Limited and TooLarge besides."""
        prompt = prompt_tokens(work)
        charge = self._charge(route.account, prompt + work.sampling.max_tokens)
        if charge is None:
            async with self._front.answer(work, route) as items:
                yield items
            return
        told = _Told(prompt)
        try:
            async with self._front.answer(work, route) as items:
                yield told.of(items)
        finally:
            self._meter.settle(charge, told.used)

    async def embed(self, work: EmbedWork, route: RouteHint) -> Embedded:
        """See node.front.Front. Raises Limited and TooLarge besides."""
        charge = self._charge(route.account, sum(map(text_tokens, work.texts)))
        if charge is None:
            return await self._front.embed(work, route)
        used = charge.tokens  # when it is cancelled, nobody knows how much was done
        try:
            embedded = await self._front.embed(work, route)
            used = believed(embedded.prompt_tokens, charge.tokens)
        except RequestError:
            used = 0
            raise
        finally:
            self._meter.settle(charge, used)
        return embedded

    @asynccontextmanager
    async def sealed(self, call: SealedCall, peer: str, account: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """See node.front.Front. By size, for what is sealed cannot be counted. Raises Limited and TooLarge besides."""
        charge = self._charge(account, len(call.sealed) // CHARS_PER_TOKEN + 1)
        async with self._front.sealed(call, peer, account) as frames:
            if charge is None:
                yield frames
                return
            told = _Frames(frames)
            try:
                yield told
            finally:
                self._meter.settle(charge, charge.tokens + told.tokens)

    def _charge(self, account: str, tokens: int) -> Charge | None:
        try:
            return self._meter.charge(account, tokens, trio.current_time())
        except Limited as exc:
            self._drops[exc.counter] += 1
            raise
        except TooLarge:
            self._drops["tokens_over_limit"] += 1
            raise


class _Frames:
    """A sealed answer's frames, and about how many tokens are in them: one in the smallest, as a stream has them, and
    as many as text of that size in larger ones, as whole answers have them."""

    def __init__(self, frames: AsyncIterator[bytes]) -> None:
        self.tokens = 0
        self._frames = frames

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        frame = await anext(self._frames)
        if frame and frame[0] != KIND_SALT:
            self.tokens += 1 if len(frame) < 2 * PAD_BYTES else len(frame) // CHARS_PER_TOKEN
        return frame


class _Told:
    """An answer's items, and what they cost."""

    def __init__(self, prompt_estimate: int) -> None:
        self._estimate = prompt_estimate
        self._prompt = self._made = 0
        self._items: AsyncIterator[AnswerItem] | None = None

    @property
    def used(self) -> int:
        """Tokens so far."""
        return self._prompt + self._made

    def of(self, items: AsyncIterator[AnswerItem]) -> AsyncIterator[AnswerItem]:
        """The same items."""
        self._items = items
        return self

    def __aiter__(self) -> AsyncIterator[AnswerItem]:
        return self

    async def __anext__(self) -> AnswerItem:
        assert self._items is not None
        item = await anext(self._items)
        match item:
            case Started():
                self._prompt = believed(item.prompt_tokens, self._estimate) or self._estimate
            case Piece():
                self._made += len(item.tokens)
            case Finished():
                self._prompt, self._made = believed(item.prompt_tokens, self._estimate), item.completion_tokens
        return item


def believed(told: int, estimate: int) -> int:
    """How many tokens a prompt had, by who answered, if that may be."""
    return min(told, PROMPT_TIMES * estimate + TEMPLATE_TOKENS)


def prompt_tokens(work: GenerateWork) -> int:
    """About how many tokens a prompt has, functions and calls with it."""
    if work.messages is None:
        return text_tokens(work.tokens if work.tokens is not None else work.text or "")
    told = [call.arguments for message in work.messages for call in message.tool_calls]
    for tool in work.tools.tools if work.tools is not None else ():
        told += [tool.description or "", tool.parameters or ""]
    return sum(map(text_tokens, told)) + sum(MESSAGE_TOKENS + text_tokens(each.content) for each in work.messages)


def text_tokens(text: str | tuple[int, ...]) -> int:
    """About how many tokens a text has; of token ids, how many these are."""
    return len(text) // CHARS_PER_TOKEN + 1 if isinstance(text, str) else len(text)
