"""What peers may call on this node over the inference protocol: generate and embed, by the local engine only.

Rules: a request from a peer is never routed on. The caller's remaining time is the deadline here. A handler that is
cancelled (the caller left, its stream broke) frees the slot within one engine step.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import trio

from node.backend import Backend
from node.errors import NO_ROOM_RETRY_S, DeadlinePassed, NoRoom, NotReady, PeerFailed, RequestError
from node.inference import Inference
from node.requester import Requester
from node.work import GENERATE, GENERATE_TOOLS, EmbedWork, Finished, GenerateWork, from_wire, to_wire
from p2p.calls import Handler, Incoming
from p2p.errors import RemoteError, RemoteProtocolError

_T = TypeVar("_T")


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
        with trio.move_on_after(work.remaining_ms / 1000), self._counted(incoming):
            try:
                return await self._generated(incoming, work)
            except RequestError as exc:
                raise _remote(exc) from exc
        raise _remote(DeadlinePassed(f"the {work.remaining_ms} ms that the request had left are over"))

    async def _generated(self, incoming: Incoming, work: GenerateWork) -> Any:
        async with self._hosting().generate(work, self._requester(incoming)) as items:
            async for item in items:
                if isinstance(item, RequestError):
                    raise item
                if isinstance(item, Finished):
                    self.served += 1
                    return to_wire(item)
                await incoming.send(to_wire(item))
        raise PeerFailed("the engine ended the answer without a result")

    async def _embed(self, incoming: Incoming) -> Any:
        work = _decoded(incoming, EmbedWork)
        with trio.move_on_after(work.remaining_ms / 1000), self._counted(incoming):
            try:
                embedded = await self._hosting().embed(work, self._requester(incoming))
            except RequestError as exc:
                raise _remote(exc) from exc
            self.served += 1
            return to_wire(embedded)
        raise _remote(DeadlinePassed(f"the {work.remaining_ms} ms that the request had left are over"))

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
