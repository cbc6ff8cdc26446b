"""p2p/guard_gossip.py: a neighbour's frames in few reads, and none of ours with a record that nobody needs."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from libp2p.exceptions import ParseError
from libp2p.io.exceptions import IncompleteReadError, MessageTooLarge
from libp2p.peer.peerstore import env_to_send_in_RPC
from libp2p.pubsub.pb import rpc_pb2
from libp2p.utils import encode_varint_prefixed
from libp2p.utils.varint import encode_uvarint, read_varint_prefixed_bytes_limited

from p2p.guard_gossip import RPC_BYTES_MAX, Frames
from tests.libp2p_peers import TOPIC, node, stranger, until


class Pieces:
    """A stream that gives what is there, as yamux does; nothing at its end. `reads` counts."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = list(pieces)
        self.reads = 0

    async def read(self, n: int) -> bytes:
        await trio.lowlevel.checkpoint()
        self.reads += 1
        if not self._pieces:
            return b""
        taken, rest = self._pieces[0][:n], self._pieces[0][n:]
        self._pieces[:1] = [rest] if rest else []
        return taken


@given(st.lists(st.binary(max_size=300), max_size=8), st.lists(st.integers(1, 200), max_size=20))
def test_frames_come_out_whole_however_they_are_cut(contents: list[bytes], cuts: list[int]) -> None:
    raw, pieces = b"".join(map(encode_varint_prefixed, contents)), []
    for cut in cuts:
        pieces += [raw[:cut]] if raw[:cut] else []
        raw = raw[cut:]
    frames = Frames(Pieces(*pieces, raw) if raw else Pieces(*pieces))

    async def read() -> None:
        assert [await frames.next() for _ in contents] == contents
        with pytest.raises(IncompleteReadError):
            await frames.next()

    trio.run(read)


async def test_one_read_gives_all_frames_that_are_there_where_libp2p_reads_byte_by_byte() -> None:
    raw = encode_varint_prefixed(bytes(300)) * 5
    ours, theirs = Pieces(raw), Pieces(raw)
    frames = Frames(ours)
    for _ in range(5):
        assert await frames.next() == await read_varint_prefixed_bytes_limited(theirs, RPC_BYTES_MAX) == bytes(300)
    assert ours.reads == 1
    assert theirs.reads == 5 * 3  # else this workaround is not needed any more


async def test_a_length_out_of_bounds_ends_the_reading_before_its_content() -> None:
    with pytest.raises(MessageTooLarge):
        await Frames(Pieces(encode_uvarint(RPC_BYTES_MAX + 1))).next()
    with pytest.raises(ParseError):
        await Frames(Pieces(b"\xff" * 10)).next()
    largest = bytes(RPC_BYTES_MAX)
    assert await Frames(Pieces(encode_varint_prefixed(largest))).next() == largest


@pytest.mark.slow
async def test_no_frame_of_ours_carries_the_record_of_our_addresses() -> None:
    came: list[rpc_pb2.RPC] = []

    async def hear(stream: object) -> None:
        frames = Frames(stream)
        while True:
            rpc = rpc_pb2.RPC()
            rpc.ParseFromString(await frames.next())
            came.append(rpc)

    async with node() as bob:
        await bob.subscribe(TOPIC, lambda _peer, _payload: True)
        async with stranger(bob, handlers={"/meshsub/1.1.0": hear}) as eve:
            subscribe = rpc_pb2.RPC(subscriptions=[rpc_pb2.RPC.SubOpts(subscribe=True, topicid=TOPIC)])
            stream = await eve.stream("/meshsub/1.1.0")
            await stream.write(encode_varint_prefixed(subscribe.SerializeToString()))
            await until(lambda: bob.statistics().mesh_peers)
            await bob.publish(TOPIC, b"hello")
            await until(lambda: any(rpc.publish for rpc in came))
        assert any(rpc.subscriptions for rpc in came)
        assert not [rpc for rpc in came if rpc.senderRecord]
        assert env_to_send_in_RPC(bob._host)[0]  # libp2p would send one: else this workaround is not needed any more
