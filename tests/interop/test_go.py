"""go-libp2p (p2pd, of hivemind's wheel) and our hosts, each dialling the other: `python -m pytest -m interop`."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from crypto.envelope import open_envelope
from gossip.messages import ADVERT_DOMAIN, advert_of, advert_topic
from node.commands.processes import Cluster
from node.inference import INFER_PROTOCOL
from node.work import Finished, Piece, from_wire, item_from_wire, to_wire
from p2p.frame import FrameReader, encode_frame
from p2p.rpc import End, Item, Role, Rpc, units_of
from p2p.transport import FRAME_BYTES_MAX
from tests.interop.daemon import Daemon, Socket, daemon
from tests.interop.test_js import BULK, BULK_BYTES, echo
from tests.libp2p_peers import TOPIC, node
from tests.node_swarm import work

pytestmark = [pytest.mark.interop, pytest.mark.slow]
HANG_S = 120.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short name: a socket's path has at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="p2pd-") as name:
        yield Path(name)


@asynccontextmanager
async def go_peer(program: Path, folder: Path) -> AsyncIterator[tuple[Daemon, str]]:
    with trio.fail_after(HANG_S):
        async with daemon(program, folder) as (go, address):
            yield go, address


async def test_ping_and_eight_mib_both_ways_when_go_dials(p2pd: Path, folder: Path) -> None:
    content = os.urandom(BULK_BYTES)
    async with node() as ours, go_peer(p2pd, folder) as (go, _):
        ours.serve(BULK, echo)
        us = await go.connect(ours.addresses()[0])
        async with go.open_stream(us, "/ipfs/ping/1.0.0") as ping:
            await ping.stream.send_all(bytes(range(32)))
            assert await ping.read(32) == bytes(range(32))
        async with go.open_stream(us, BULK) as bulk, trio.open_nursery() as nursery:
            nursery.start_soon(send_frames, bulk, content)
            reader, back = FrameReader(), bytearray()
            while len(back) < len(content):
                back += b"".join(reader.feed(await bulk.read_some()))
        assert back == content
        assert not ours.statistics().drops


async def send_frames(socket: Socket, content: bytes) -> None:
    for at in range(0, len(content), FRAME_BYTES_MAX):
        await socket.stream.send_all(encode_frame(content[at : at + FRAME_BYTES_MAX]))


async def test_eight_mib_both_ways_when_we_dial(p2pd: Path, folder: Path) -> None:
    content = os.urandom(BULK_BYTES)
    sent = [content[at : at + FRAME_BYTES_MAX] for at in range(0, BULK_BYTES, FRAME_BYTES_MAX)]
    async with node() as ours, go_peer(p2pd, folder) as (go, address), trio.open_nursery() as nursery:
        await go.serve(BULK, nursery, echo_bytes)
        stream = await ours.open_stream(await ours.dial(address), BULK)
        back: list[bytes] = []

        async def collect() -> None:
            while len(back) < len(sent):
                back.append(await stream.receive())

        async with trio.open_nursery() as both:
            both.start_soon(collect)
            for frame in sent:
                await stream.send(frame)
        await stream.close()  # not before: the daemon ends both directions of a served stream at once
        assert back == sent
        assert not ours.statistics().drops
        nursery.cancel_scope.cancel()


async def echo_bytes(socket: Socket) -> None:
    while piece := await socket.read_some():
        await socket.stream.send_all(piece)


async def test_gossip_both_ways(p2pd: Path, folder: Path) -> None:
    heard: list[tuple[str, bytes]] = []
    async with node() as ours, go_peer(p2pd, folder) as (go, address):
        await ours.subscribe(TOPIC, lambda peer, payload: heard.append((peer, payload)) is None)
        async with go.subscribe(TOPIC) as topic:
            them = await ours.dial(address)
            sent = 0
            while not heard:  # until the mesh has formed
                sent += 1
                await go.publish(TOPIC, b"from go %d" % sent)
                await trio.sleep(0.5)
            assert heard[0][0] == them
            assert heard[0][1].startswith(b"from go")
            payload = os.urandom(4000)
            await ours.publish(TOPIC, payload)
            while (await topic.read_message())[2] != [payload]:
                pass  # its own come back to it first


async def test_a_whole_node_answers_and_adverts_reach_go(p2pd: Path, folder: Path, tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        served = await trio.to_thread.run_sync(cluster.start("a").wait_ready)
        async with go_peer(p2pd, folder) as (go, _), go.subscribe(advert_topic(cluster.network)) as topic:
            them = await go.connect(served.address)
            (raw,) = (await topic.read_message())[2]
            assert isinstance(raw, bytes)
            now_ms = time.time_ns() // 1_000_000
            envelope = open_envelope(raw, domain=ADVERT_DOMAIN, network=cluster.network, now_ms=now_ms)
            assert envelope.sender == served.peer_id
            assert advert_of(envelope).capacity.models[0].name == "default"
            async with go.open_stream(them, INFER_PROTOCOL) as stream:
                tokens, finished = await generate(stream, 300)
            assert tokens == finished.completion_tokens == 300


async def generate(stream: Socket, tokens: int) -> tuple[int, Finished]:
    """One call, by our own automaton; go carries it."""
    rpc, reader, came = Rpc(Role.CALLER), FrameReader(), 0
    call_id, raw = rpc.call("generate", to_wire(work("Once upon a time", tokens)))
    await stream.stream.send_all(encode_frame(raw))
    while True:
        for raw in reader.feed(await stream.read_some()):
            match rpc.receive(raw):
                case Item(body=body):
                    item = item_from_wire(body)
                    came += len(item.tokens) if isinstance(item, Piece) else 0
                    if (credit := rpc.consumed(call_id, units_of(raw))) is not None:
                        await stream.stream.send_all(encode_frame(credit))
                case End(body=body):
                    return came, from_wire(body, Finished)
                case other:
                    pytest.fail(f"{other} came")
