"""What peers may call on this node over the inference protocol: generate and embed, by the local engine only.

Rules: a request from a peer is never routed on. The caller's remaining time is the deadline here. A handler that is
cancelled (the caller left, its stream broke) frees the slot within one engine step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import trio

from node.backend import Backend
from node.errors import NO_ROOM_RETRY_S, DeadlinePassed, NoRoom, NotReady, PeerFailed, RequestError
from node.inference import Inference
from node.request_ended import CANCELLED, OK, Ended
from node.requester import Requester
from node.work import (
    GENERATE,
    GENERATE_TOOLS,
    AnswerItem,
    EmbedWork,
    Finished,
    GenerateWork,
    Piece,
    Started,
    from_wire,
    to_wire,
)
from p2p.calls import Handler, Incoming
from p2p.errors import RemoteError, RemoteProtocolError

_T = TypeVar("_T")


@dataclass(slots=True)
class _Visit:
    """What is known of a peer's request while it is answered here."""

    model: str
    revision: str = ""
    prompt_tokens: int = 0
    answer_tokens: int = 0

    def take(self, item: AnswerItem) -> None:
        """An item goes to the peer."""
        match item:
            case Started():
                self.model, self.revision, self.prompt_tokens = item.model, item.revision, item.prompt_tokens
            case Piece():
                self.answer_tokens += len(item.tokens)
            case Finished():
                self.prompt_tokens = item.prompt_tokens

    def ended(self, peer: str, took_s: float, outcome: str, *, is_hidden: bool) -> Ended:
        """Its text is never kept: it is of another node's client."""
        return Ended(
            account=peer,
            is_hidden=is_hidden,
            model=self.model,
            revision=self.revision,
            prompt_tokens=self.prompt_tokens,
            answer_tokens=self.answer_tokens,
            took_s=took_s,
            outcome=outcome,
        )


class Serving:
    """The handlers of INFER_PROTOCOL."""

    def __init__(self) -> None:
        """`inference` is set before the first call comes: it calls peers through the same Calls that serves these."""
        self.inference: Inference | None = None
        self.served = 0

    def handlers(self) -> Mapping[str, Handler]:
        """By method name, for p2p.calls.Calls."""
        return {GENERATE: self._generate, GENERATE_TOOLS: self._generate, "embed": self._embed}

    async def _generate(self, incoming: Incoming) -> Any:
        work = _decoded(incoming, GenerateWork)
        with self._told(incoming, work) as visit, self._counted(incoming):
            with trio.move_on_after(work.remaining_ms / 1000):
                return await self._generated(incoming, work, visit)
            raise DeadlinePassed(f"the {work.remaining_ms} ms that the request had left are over")

    async def _generated(self, incoming: Incoming, work: GenerateWork, visit: _Visit) -> Any:
        async with self._hosting().generate(work, self._requester(incoming)) as items:
            async for item in items:
                if isinstance(item, RequestError):
                    raise item
                visit.take(item)
                if isinstance(item, Finished):
                    self.served += 1
                    return to_wire(item)
                await incoming.send(to_wire(item))
        raise PeerFailed("the engine ended the answer without a result")

    async def _embed(self, incoming: Incoming) -> Any:
        work = _decoded(incoming, EmbedWork)
        with self._told(incoming, work) as visit, self._counted(incoming):
            with trio.move_on_after(work.remaining_ms / 1000):
                embedded = await self._hosting().embed(work, self._requester(incoming))
                visit.model, visit.revision = embedded.model, embedded.revision
                visit.prompt_tokens = embedded.prompt_tokens
                self.served += 1
                return to_wire(embedded)
            raise DeadlinePassed(f"the {work.remaining_ms} ms that the request had left are over")

    @contextmanager
    def _told(self, incoming: Incoming, work: GenerateWork | EmbedWork) -> Iterator[_Visit]:
        """How a peer's request ends is told to the node's watcher, and its error to the peer."""
        visit, began, outcome = _Visit(model=work.model or ""), trio.current_time(), CANCELLED
        try:
            yield visit
            outcome = OK
        except RequestError as exc:
            outcome = exc.code
            raise _remote(exc) from exc
        finally:
            if self.inference is not None and self.inference.watcher is not None:
                ended = visit.ended(incoming.peer, trio.current_time() - began, outcome, is_hidden=work.private)
                self.inference.watcher.ended(ended)

    def _counted(self, incoming: Incoming) -> AbstractContextManager[None]:
        if self.inference is None:  # the request is refused next
            return nullcontext()
        return self.inference.flows.out_of(incoming.peer)

    def _requester(self, incoming: Incoming) -> Requester:
        assert self.inference is not None
        return self.inference.requester(incoming.peer)

    def _hosting(self) -> Backend:
        hosting = self.inference.hosting if self.inference is not None else None
        if hosting is None:
            raise NotReady("this peer hosts no model, or is still loading it", retry_after_s=NO_ROOM_RETRY_S)
        return hosting


def _decoded(incoming: Incoming, kind: type[_T]) -> _T:
    try:
        return from_wire(incoming.body, kind)
    except RemoteProtocolError as exc:
        raise RemoteError("bad_request", str(exc), retryable=False) from exc


def _remote(error: RequestError) -> RemoteError:
    code = NoRoom.code if isinstance(error, NoRoom) else error.code
    return RemoteError(code, error.message, retryable=error.retryable)
