"""Opens what is sealed to this peer, has it answered here as any request is, and seals the answer.

Rules: shell. It is answered by this node alone, never routed on: whoever seals has chosen who may read. For a peer that
relays it is that peer's request, in its class and on its account, and its tokens are counted here, where they can be
seen. Errors of a request that was opened are sealed too, for they quote it. A handler that is cancelled (the relay or
the client left) frees the slot within one engine step.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import trio

from crypto.errors import BadSeal, Replayed, UnknownSealingKey
from crypto.identity import Identity, PeerId
from crypto.sealing import CONTENT_BYTES_MAX, SALT_BYTES, AnswerSealer, Context
from crypto.sealing_keys import SealingKeys
from node.errors import NO_ROOM_RETRY_S, NotReady
from node.front import Route, RouteHint
from node.sealed import BAD_SEAL, KEEP_ALIVE_S, REPLAYED, KeyStatement, SealedCall, SealedHead
from node.work import from_wire, to_wire
from p2p.calls import Handler, Incoming
from p2p.errors import RemoteError, RemoteProtocolError

OVERTIME_S = 5.0  # the request's own deadline error comes first and says more

_REASONS = {UnknownSealingKey: "other_key", Replayed: REPLAYED, BadSeal: BAD_SEAL}
Emit = Callable[[bytes], Awaitable[None]]  # hands one frame of an answer on; waits while nobody takes it


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedAsk:
    """An opened request. hint: this node, on whose account. deadline_s: seconds that are left."""

    content: bytes = field(repr=False)
    hint: RouteHint
    deadline_s: float


class Reply(Protocol):
    """Where an answer goes, in order: one head, then the body in parts."""

    async def head(self, head: SealedHead) -> None:
        """The status and headers."""

    async def body(self, part: bytes, *, is_last: bool) -> None:
        """More of the body."""


Answerer = Callable[[SealedAsk, Reply], Awaitable[None]]  # node.web.sealed_app


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedStatistics:
    """Counts since start of what came sealed to this node. cut: answers that ended without their last frame."""

    opened: int
    answered: int
    cut: int
    key_rotations: int
    drops: dict[str, int]  # reason -> count


class SealedServing:
    """See the module. `answerer` is set when this node has a model to answer with."""

    def __init__(self, identity: Identity, network: str) -> None:
        """Make it inside trio: the first key is made now."""
        self.peer = identity.peer_id
        self.answerer: Answerer | None = None
        self._counts: Counter[str] = Counter()
        self._drops: Counter[str] = Counter()
        self._network = network
        self._keys = SealingKeys(identity, network, trio.current_time())

    def handlers(self) -> Mapping[str, Handler]:
        """By method name, for p2p.calls.Calls of INFER_PROTOCOL."""
        return {"sealed": self._sealed, "sealing_key": self._sealing_key}

    def statistics(self) -> SealedStatistics:
        """A snapshot of the counters."""
        return SealedStatistics(
            opened=self._counts["opened"],
            answered=self._counts["answered"],
            cut=self._counts["cut"],
            key_rotations=self._keys.rotations,
            drops=dict(self._drops),
        )

    def tick(self) -> None:
        """Let go of keys whose time is over."""
        self._keys.tick(trio.current_time())

    def statement(self) -> bytes:
        """This peer's present sealing key, signed. Raises NotReady."""
        self._check_ready()
        return self._keys.statement(trio.current_time(), time.time_ns() // 1_000_000)

    async def answer(self, call: SealedCall, hint: RouteHint, emit: Emit) -> None:
        """Open and answer. Raises UnknownSealingKey, BadSeal (Replayed) and NotReady before any frame; later nothing.

        Cancelled, or out of time: the answer has no last frame.
        """
        answerer = self._check_ready()
        opened = self._opened(call)
        context = Context(network=self._network, peer=self.peer, request_id=call.request_id)
        sealer = AnswerSealer(opened.secret, secrets.token_bytes(SALT_BYTES), context)
        deadline_s = call.remaining_ms / 1000
        ask = SealedAsk(content=opened.content, hint=hint, deadline_s=deadline_s)
        try:
            with trio.move_on_after(deadline_s + OVERTIME_S):
                async with trio.open_nursery() as nursery:
                    await emit(sealer.opening())
                    nursery.start_soon(_show_life, emit)
                    await answerer(ask, _Sealing(sealer, emit))
                    nursery.cancel_scope.cancel()
        finally:
            self._counts["answered" if sealer.is_ended else "cut"] += 1

    def _opened(self, call: SealedCall) -> Any:
        try:
            opened = self._keys.open(call.sealed, public=call.key, request_id=call.request_id, now=trio.current_time())
        except (UnknownSealingKey, BadSeal) as exc:
            self._drops[_REASONS[type(exc)]] += 1
            raise
        self._counts["opened"] += 1
        return opened

    def _check_ready(self) -> Answerer:
        if self.answerer is None:
            raise NotReady("this peer hosts no model, or is still loading it", retry_after_s=NO_ROOM_RETRY_S)
        return self.answerer

    # what peers call

    async def _sealing_key(self, incoming: Incoming) -> Any:
        try:
            statement = self.statement()
        except NotReady as exc:
            raise RemoteError(exc.code, exc.message, retryable=True) from exc
        await trio.lowlevel.checkpoint()
        return to_wire(KeyStatement(statement=statement))

    async def _sealed(self, incoming: Incoming) -> Any:
        try:
            call = from_wire(incoming.body, SealedCall)
        except RemoteProtocolError as exc:
            raise RemoteError("bad_request", str(exc), retryable=False) from exc
        hint = RouteHint(route=Route.LOCAL, guest=PeerId(incoming.peer), is_sealed=True)
        try:
            await self.answer(call, hint, incoming.send)
        except UnknownSealingKey:
            return to_wire(KeyStatement(statement=self.statement()))
        except Replayed as exc:
            raise RemoteError(REPLAYED, str(exc), retryable=False) from exc
        except BadSeal as exc:
            raise RemoteError(BAD_SEAL, str(exc), retryable=False) from exc
        except NotReady as exc:
            raise RemoteError(exc.code, exc.message, retryable=True) from exc
        return None


class _Sealing:
    """A Reply that seals what it is given, in frames of bounded size."""

    def __init__(self, sealer: AnswerSealer, emit: Emit) -> None:
        self._sealer, self._emit = sealer, emit

    async def head(self, head: SealedHead) -> None:
        await self._emit(self._sealer.seal(msgspec.json.encode(head), is_last=False))

    async def body(self, part: bytes, *, is_last: bool) -> None:
        pieces = _cut(part)
        for number, piece in enumerate(pieces, 1):
            await self._emit(self._sealer.seal(piece, is_last=is_last and number == len(pieces)))


def _cut(part: bytes) -> Sequence[bytes]:
    return [part[at : at + CONTENT_BYTES_MAX] for at in range(0, len(part), CONTENT_BYTES_MAX)] or [b""]


async def _show_life(emit: Emit) -> None:
    while True:
        await trio.sleep(KEEP_ALIVE_S)
        await emit(b"")
