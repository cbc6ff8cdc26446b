"""Passes sealed requests on to the peer that they are for, and its frames back: sizes and times are all that is seen.

Rules: shell. What a peer answers cannot be judged here, so nothing is learnt of its speed and nothing is tried at
another: the asker has chosen, and only the asker can seal anew. A peer that shows no sign of life for SILENT_S_MAX is
given up, one that sends what is no frame loses standing. A request for this very node is opened here, and goes no
further. Statements of keys are not kept: a peer that has just started has another, and asking it costs one round trip.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from random import Random

import trio

from crypto.errors import BadKey, BadSeal, Replayed, UnknownSealingKey
from crypto.identity import PeerId, public_key_of
from node.collector import importing
from node.config import NodeConfig
from node.errors import BadRequest, PeerFailed, RequestError, SealBroken, SealReplayed, UnknownPeer, WrongSealingKey
from node.front import Front, Route, RouteHint
from node.inference import Inference, single
from node.judge import judged
from node.remote import Network, connect
from node.sealed import BAD_SEAL, REPLAYED, SILENT_S_MAX, KeyStatement, SealedCall, check_frame
from node.sealed_serving import SealedServing
from node.work import from_wire, to_wire
from p2p.calls import Outgoing
from p2p.errors import P2PError, RemoteError

KEY_S_MAX = 5.0  # for a peer to say its key
FRAMES_BUFFERED = 16  # of an answer that this very node makes, when its client is slow


class PeerFrames:
    """The frames of a peer's answer. Raises what Outgoing raises, RemoteProtocolError, WrongSealingKey, PeerFailed."""

    def __init__(self, outgoing: Outgoing, peer: PeerId) -> None:
        self._outgoing, self._peer = outgoing, peer

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        with trio.move_on_after(SILENT_S_MAX):
            try:
                return check_frame(await anext(self._outgoing))
            except StopAsyncIteration:
                if self._outgoing.result is None:
                    raise
                statement = from_wire(self._outgoing.result, KeyStatement).statement
            raise WrongSealingKey(self._peer, statement)
        raise PeerFailed(f"no sign of life for {SILENT_S_MAX:.0f} s: it is frozen or cut off")


class SealedRelay:
    """See the module. `serving` opens what is for this very node."""

    def __init__(self, network: Network, inference: Inference, serving: SealedServing) -> None:
        self._network, self._inference, self.serving = network, inference, serving

    def begin(self, front: Front, rng: Random, config: NodeConfig) -> None:
        """There is a model now: from here on this node answers what is sealed to it."""
        with importing():
            from node.web.schema import Defaults
            from node.web.sealed_app import SealedApp

        defaults = Defaults(max_tokens=config.max_tokens, temperature=config.temperature)
        self.serving.answerer = SealedApp(front, rng, defaults)

    async def key_of(self, peer: str) -> bytes:
        """A peer's statement of its present sealing key, unread: who seals reads it. Raises RequestError."""
        if peer == self.serving.peer:
            await trio.lowlevel.checkpoint()
            return self.serving.statement()
        there = _peer_id(peer)
        with self._mapped(there):
            await self._connect(there)
            with trio.move_on_after(KEY_S_MAX):
                reply = await self._network.calls.call(there, "sealing_key", None)
                return from_wire(reply, KeyStatement).statement
        raise PeerFailed(f"{peer} did not say its sealing key within {KEY_S_MAX:.0f} s")

    @asynccontextmanager
    async def frames(self, call: SealedCall, peer: str, account: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """The frames of an answer. Raises RequestError, here or from the iteration. Leaving cancels it at the peer."""
        if peer == self.serving.peer:
            async with self._own(call, account) as frames:
                yield frames
            return
        there = _peer_id(peer)
        with self._inference.relaying(), self._mapped(there):
            await self._connect(there)
            async with self._network.calls.open(there, "sealed", to_wire(call)) as outgoing:
                yield PeerFrames(outgoing, there)

    @asynccontextmanager
    async def _own(self, call: SealedCall, account: str) -> AsyncIterator[AsyncIterator[bytes]]:
        send, receive = trio.open_memory_channel[bytes | RequestError](FRAMES_BUFFERED)

        async def make() -> None:
            with send:
                try:
                    await self.serving.answer(
                        call, RouteHint(route=Route.LOCAL, account=account, is_sealed=True), send.send
                    )
                except UnknownSealingKey:
                    await send.send(WrongSealingKey(self.serving.peer, self.serving.statement()))
                except BadSeal as exc:
                    await send.send(_broken(self.serving.peer, str(exc), is_replay=isinstance(exc, Replayed)))
                except RequestError as exc:
                    await send.send(exc)

        with single():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(make)
                yield _taken(receive)
                nursery.cancel_scope.cancel()

    async def _connect(self, peer: PeerId) -> None:
        offer = self._network.gossip.directory.offer_of(peer, trio.current_time())
        if offer is None and peer not in self._network.transport.peers():
            raise UnknownPeer(
                f"{peer} is neither connected nor heard of here: GET /api/v1/peers lists who is", param="peer"
            )
        await connect(self._network, peer, () if offer is None else offer.advert.addresses)

    @contextmanager
    def _mapped(self, peer: PeerId) -> Iterator[None]:
        """What a peer or the way to it can do wrong, as a RequestError; a breach lowers its standing."""
        try:
            yield
        except RemoteError as exc:
            raise _answered(peer, exc) from exc
        except (P2PError, PeerFailed) as exc:
            verdict = judged(exc, peer)
            if verdict.fault is not None:
                self._network.gossip.blame(peer, verdict.fault, str(exc))
            raise verdict.error from exc


async def _taken(receive: trio.MemoryReceiveChannel[bytes | RequestError]) -> AsyncIterator[bytes]:
    async for frame in receive:
        if isinstance(frame, RequestError):
            raise frame
        yield frame


def _answered(peer: PeerId, error: RemoteError) -> RequestError:
    if error.code in (BAD_SEAL, REPLAYED):
        return _broken(peer, error.message, is_replay=error.code == REPLAYED)
    if error.code == "unknown_method":
        return PeerFailed(f"{peer} takes no sealed requests (an older node): choose another peer")
    return judged(error, peer).error


def _broken(peer: PeerId, why: str, *, is_replay: bool) -> RequestError:
    if is_replay:
        return SealReplayed(f"{peer} does not answer it: {why}", param="sealed")
    return SealBroken(f"{peer} cannot open it: {why}", param="sealed")


def _peer_id(peer: str) -> PeerId:
    try:
        public_key_of(peer)
    except BadKey as exc:
        raise BadRequest(str(exc), param="peer") from exc
    return PeerId(peer)
