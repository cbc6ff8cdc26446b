"""What keeps one bad frame, one bad handler and one noisy library from ending the node: reads and exceptions.

Rules: every workaround for libp2p 0.8.1 stands in p2p/guard*.py, says what it works around, and has a test in
tests/test_guard.py that is red without it. Subclasses where libp2p allows; `install()` replaces three functions where
it does not. Here is the one `except Exception` around what a peer can make fail: count, log, go on.

Source: SECURITY.md F1-F3, F19; NETWORK.md sections 0 and 4.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import libp2p.identity.identify_push.identify_push
import libp2p.io.msgio
import libp2p.io.utils
import libp2p.network.connection.swarm_connection
import libp2p.protocol_muxer.multiselect_communicator
import libp2p.pubsub.gossipsub
import libp2p.pubsub.pubsub
import libp2p.stream_muxer.yamux.yamux
import libp2p.utils
import libp2p.utils.varint
import trio
from libp2p.exceptions import BaseLibp2pError, ParseError
from libp2p.io.exceptions import IncompleteReadError
from libp2p.tools.anyio_service import LifecycleError

MULTISTREAM_BYTES_MAX = 1024  # one line of protocol negotiation; ours are under 64 bytes
WINDOW_BYTES_MAX = 2 << 20  # of one yamux stream whose reader keeps up, and of one frame; it begins at 256 KiB
SLICE_BYTES = 4 * 65_519 - 12  # of one frame that we send: four whole Noise records, and just below the first window
LINGER_S = 5.0  # for the other side of a finished inbound stream to end its direction too
LINGER_BYTES = 65_536  # thrown away at once meanwhile
RESET_S = 1.0  # to tell a peer that its stream is over
DAEMON_RESTART_S = 1.0  # before a failed background loop starts again

log = logging.getLogger("p2p.guard")


class Drops:
    """Counts of what was dropped or contained, by reason, and the one place where a peer's failures are caught."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def count(self, reason: str) -> None:
        """One more of `reason`."""
        self.counts[reason] += 1

    async def contain(self, reason: str, run: Callable[..., Awaitable[object]], *args: object) -> bool:
        """Run and say whether it ended well; an exception is counted under `reason` and goes no further."""
        try:
            await run(*args)
        except Exception as exc:  # the guard: a peer chose what happened in there
            self.counts[reason] += 1
            log.info("%s: %s", reason, _brief(exc), exc_info=log.isEnabledFor(logging.DEBUG))
            return False
        return True


def _brief(exc: BaseException) -> str:
    """Kind and first words of an exception; a group's first member. What peers send is not repeated at length."""
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return f"{type(exc).__name__}: {str(exc)[:200]!r}"


def guarded_stream_handler(
    inner: Callable[[Any], Awaitable[None]], drops: Drops, streams_per_peer_max: int
) -> Callable[[Any], Awaitable[None]]:
    """The host's handler of inbound streams, with the peer's share of streams and with an end to its exceptions.

    Around: an exception in any handler ends SwarmConn's nursery, the swarm service and the process.
    """
    held: Counter[Any] = Counter()

    async def handle(net_stream: Any) -> None:
        peer = net_stream.muxed_conn.peer_id
        if held[peer] >= streams_per_peer_max:
            drops.count("streams_per_peer")
            await reset_quietly(net_stream, drops)
            return
        held[peer] += 1
        try:
            if await drops.contain("handler_failed", inner, net_stream):
                await end_stream(net_stream, drops)
            else:
                await reset_quietly(net_stream, drops)
        finally:
            held[peer] -= 1
            if not held[peer]:
                del held[peer]

    return handle


async def end_stream(net_stream: Any, drops: Drops) -> None:
    """Close a stream whose handler is done; the other side has LINGER_S to end its direction, then it is reset.

    Around: libp2p's gossip handler leaves its stream open, and yamux keeps an entry until both directions have ended.
    """
    muxed = net_stream.muxed_stream
    if not muxed.send_closed:
        with trio.move_on_after(RESET_S) as scope:
            scope.shield = True
            await drops.contain("close_failed", net_stream.close)
    with trio.move_on_after(LINGER_S) as linger:
        try:
            while True:
                await muxed.conn.read_stream(muxed.stream_id, LINGER_BYTES)
        except BaseLibp2pError:
            pass  # the end, whichever way
    if linger.cancelled_caught:
        drops.count("stream_not_ended")
        await reset_quietly(net_stream, drops)
    if muxed.stream_id not in muxed.conn.streams:
        muxed.conn.stream_events.pop(muxed.stream_id, None)  # a reader that wakes after the end leaves one behind


async def reset_quietly(net_stream: Any, drops: Drops) -> None:
    """Reset a stream; whatever goes wrong with that is counted, and it takes RESET_S at most."""
    with trio.move_on_after(RESET_S) as scope:
        scope.shield = True
        await drops.contain("reset_failed", net_stream.reset)


def escalate(nursery: trio.Nursery, call: Callable[..., object], *args: object) -> None:
    """Run a callback of ours from inside libp2p's events; its exception ends `nursery`, and so the node.

    Around: libp2p logs what a listener to its events raises, and goes on: our bug would be hidden.
    """
    try:
        call(*args)
    except Exception as exc:  # raised again at once, where it is seen
        nursery.start_soon(_raise, exc)


async def _raise(exc: Exception) -> None:
    raise exc


class ContainedTasks:
    """A libp2p service manager whose tasks cannot end the service.

    Around: `run_task` lets an exception of one message or one connection cancel the whole service, and with it the
    host; a raising background loop does the same. Loops start again after DAEMON_RESTART_S.
    """

    def __init__(self, manager: Any, drops: Drops) -> None:
        self._manager = manager
        self._drops = drops

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def run_task(self, run: Callable[..., Awaitable[object]], *args: object, name: str | None = None) -> None:
        """Start a contained task; silently not when the service is stopping, which callers do not expect."""
        try:
            self._manager.run_task(self._drops.contain, "task_failed", run, *args, name=name or _name(run))
        except LifecycleError:
            self._drops.count("task_after_stop")

    def run_daemon_task(self, run: Callable[..., Awaitable[object]], *args: object, name: str | None = None) -> None:
        """Start a background loop that starts again when it fails."""
        self._manager.run_daemon_task(self._again, run, *args, name=name or _name(run))

    async def _again(self, run: Callable[..., Awaitable[object]], *args: object) -> None:
        while not await self._drops.contain("daemon_failed", run, *args):  # noqa: ASYNC110  # a pause, not polling
            await trio.sleep(DAEMON_RESTART_S)
        if self._manager.is_running:
            await self._manager.wait_finished()  # a daemon that returns is a crash to its service


def _name(run: Callable[..., Awaitable[object]]) -> str:
    return str(getattr(run, "__qualname__", run))


async def read_exactly(reader: Any, n: int, retry_count: int = 0) -> bytes:
    """n bytes of a reader, however many pieces they come in. Raises IncompleteReadError at its end.

    Around: libp2p gives up after 101 pieces, so a large frame over a slow link breaks the connection.
    """
    piece = await reader.read(n)
    if len(piece) == n:
        return bytes(piece)  # the common case: bytes already, not copied
    buffer = bytearray()
    while True:
        if not piece:
            raise IncompleteReadError(
                f"the other side ended after {len(buffer)} of {n} bytes", expected_bytes=n, received_bytes=len(buffer)
            )
        buffer += piece
        if len(buffer) == n:
            return bytes(buffer)
        piece = await reader.read(n - len(buffer))


async def read_delim(reader: Any) -> bytes:
    """One line of protocol negotiation, without its newline. Raises ParseError, IOException kinds.

    Around: libp2p takes as many bytes as an unauthenticated length says, and repeats them in its error.
    """
    line = await libp2p.utils.varint.read_varint_prefixed_bytes_limited(reader, MULTISTREAM_BYTES_MAX)
    if not line.endswith(b"\n"):
        raise ParseError("a line of protocol negotiation without its newline")
    return bytes(line[:-1])


_READ_DELIM_HOLDERS = (libp2p.utils, libp2p.utils.varint, libp2p.protocol_muxer.multiselect_communicator)
_RECORD_HOLDERS = (libp2p.pubsub.gossipsub, libp2p.pubsub.pubsub)
_READ_EXACTLY_HOLDERS = (
    libp2p.io.utils,
    libp2p.io.msgio,
    libp2p.utils.varint,
    libp2p.stream_muxer.yamux.yamux,
)


def no_record(host: Any) -> tuple[bytes, bool]:
    """In the place of the signed record of our addresses that libp2p puts into each gossip frame.

    Around: it is made anew for each message, from all our addresses, and is as large as an advert. Nobody needs it:
    we read none (p2p/guard_gossip.py), other builds know no such field, and our addresses stand in the advert. An
    empty one is left out on the way through libp2p's queues.
    """
    return b"", False


def install() -> None:
    """Put our readers, our record and our window where libp2p looks its own up; silence its logs. Again is the same."""
    for holder in _READ_DELIM_HOLDERS:
        assert hasattr(holder, "read_delim"), f"{holder.__name__} changed: look at this workaround again"
        holder.read_delim = read_delim
    for holder in _READ_EXACTLY_HOLDERS:
        assert hasattr(holder, "read_exactly"), f"{holder.__name__} changed: look at this workaround again"
        holder.read_exactly = read_exactly
    for holder in _RECORD_HOLDERS:
        assert hasattr(holder, "env_to_send_in_RPC"), f"{holder.__name__} changed: look at this workaround again"
        holder.env_to_send_in_RPC = no_record
    libp2p.stream_muxer.yamux.yamux.MAX_WINDOW_SIZE = WINDOW_BYTES_MAX
    libp2p.stream_muxer.yamux.yamux.MAX_MESSAGE_SIZE = SLICE_BYTES + libp2p.stream_muxer.yamux.yamux.HEADER_SIZE
    quiet()


def quiet() -> None:
    """Keep libp2p's log lines out of ours: peers choose many of them.

    Around: one file logs through the root logger, whose module functions also install a handler for everybody.
    """
    for name in [each for each in logging.Logger.manager.loggerDict if each.startswith("libp2p.")]:
        logging.getLogger(name).setLevel(logging.NOTSET)
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    libp2p.network.connection.swarm_connection.logging = logging.getLogger("libp2p.network.swarm_connection")
