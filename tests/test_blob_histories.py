"""Any interleaving of donors' faults ends in the right bytes or in one clear error, and nothing is left running."""

from __future__ import annotations

import random
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from crypto.canonical import decode_struct
from gossip.blob_wire import RangeAsk, Refusal, here_frame, piece_head, refusal_frame
from gossip.errors import Unavailable
from p2p.errors import P2PError
from p2p.transport import Stream
from tests.blob_world import BLOB, CONTENT, RAW, SMALL, World, piece

ACTS = (
    "right",
    "right",
    "right",
    "right",
    "wrong",
    "short",
    "unasked",
    "twice",
    "break",
    "end",
    "gone",
    "junk",
    "stall",
)
FIRST = ("here", "here", "here", "here", "wrong manifest", "unknown", "busy", "silence", "break")
LIES = {"wrong", "short", "unasked", "twice", "junk", "wrong manifest"}
Script = st.tuples(st.sampled_from(FIRST), st.lists(st.sampled_from(ACTS), max_size=14))
Step = st.tuples(st.sampled_from(["wait", "break", "dial", "crash", "cancel"]), st.integers(0, 3), st.floats(0.1, 9.0))


class Actor:
    """A donor that plays one script after the other, a script a stream; then it is honest, or says nothing."""

    def __init__(self, scripts: list[tuple[str, list[str]]], faithful: bool) -> None:
        self.scripts, self.faithful = list(scripts), faithful
        self.lied = False

    async def play(self, stream: Stream) -> None:
        try:
            await self._play(stream)
        except P2PError:
            pass

    async def _play(self, stream: Stream) -> None:
        first, acts = self.scripts.pop(0) if self.scripts else ("here" if self.faithful else "silence", [])
        await stream.receive()
        self.lied |= first in LIES
        match first:
            case "here":
                await stream.send(here_frame(RAW))
            case "wrong manifest":
                await stream.send(here_frame(RAW[:-1] + b"\x00") + b"")
            case "unknown" | "busy":
                return await stream.send(refusal_frame(Refusal(first)))
            case "break":
                return await stream.reset()
            case _:
                await trio.sleep_forever()
        for act in acts:
            ask = decode_struct(await stream.receive(), RangeAsk)
            await trio.sleep(0.2)
            if not await self._act(act, stream, ask):
                return
        while self.faithful:
            await stream.send(piece(decode_struct(await stream.receive(), RangeAsk)))
        await trio.sleep_forever()

    async def _act(self, act: str, stream: Stream, ask: RangeAsk) -> bool:
        """Whether the stream goes on."""
        self.lied |= act in LIES
        right = piece(ask)
        match act:
            case "right":
                await stream.send(right)
            case "wrong":
                await stream.send(right[:-1] + bytes([right[-1] ^ 1]))
            case "short":
                await stream.send(right[:-1])
            case "unasked":
                await stream.send(piece_head(1) + CONTENT[1:SMALL])
            case "twice":
                await stream.send(right)
                await stream.send(right)
            case "junk":
                await stream.send(b"\xff")
            case "gone":
                await stream.send(refusal_frame(Refusal.GONE))
            case "break":
                await stream.reset()
            case "stall":
                await trio.sleep(60)
        return act in ("right", "stall", "twice")


@pytest.mark.slow
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.lists(Script, max_size=3), min_size=1, max_size=4), st.lists(Step, max_size=8), st.integers(0, 1 << 30)
)
def test_histories(scripts: list[list[tuple[str, list[str]]]], steps: list[tuple[str, int, float]], seed: int) -> None:
    async def run(path: Path) -> None:
        async with AsyncExitStack() as stack:
            world = World(stack, path)
            me = world.me = await world.peer()
            rng = random.Random(seed)
            actors = [Actor(each, faithful=rng.random() < 0.5) for each in scripts]
            donors = [await world.donor(actor.play) for actor in actors]
            ended: list[str] = []
            told: list[str] = []

            async def fetch(scope: trio.CancelScope) -> None:
                with scope:
                    try:
                        file = await me.blobs.fetch(BLOB, [donor.peer_id for donor in donors])
                        assert file.read_bytes() == CONTENT
                        ended.append("whole")
                    except Unavailable as exc:
                        ended.append("error")
                        told.append(str(exc))
                if scope.cancelled_caught:
                    ended.append("left")

            scope = trio.CancelScope()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fetch, scope)
                for what, which, seconds in steps:
                    donor = donors[which % len(donors)]
                    match what:
                        case "break":
                            world.network.break_connections(me.id, donor.peer_id)
                        case "crash":
                            world.network.crash(donor.peer_id)
                        case "dial" if not donor.ended:
                            await me.transport.dial(donor.addresses()[0])
                        case "cancel":
                            scope.cancel()
                    await trio.sleep(seconds)
            assert len(ended) == 1
            assert all(donor.peer_id in sentence for donor in donors for sentence in told)
            if "whole" not in ended:  # whatever it was, an honest donor mends it
                helper = Actor([], faithful=True)
                last = await world.donor(helper.play)
                assert (await me.blobs.fetch(BLOB, [last.peer_id])).read_bytes() == CONTENT
            await trio.sleep(1)
            assert me.transport.statistics().streams_open == 0
            assert me.blobs.statistics().fetches == 0
            blamed = {peer for peer, _, lied in me.faults if lied}
            assert blamed <= {donor.peer_id for donor, actor in zip(donors, actors, strict=True) if actor.lied}

    with tempfile.TemporaryDirectory() as folder:
        trio.run(run, Path(folder), clock=MockClock(autojump_threshold=0))
