"""A whole node under mutated frames, over every protocol it registers: it lives, serves others, and does not grow.

FRAMES_SOAK is `pytest -m soak`. The victim (tests/fuzz_victim.py) is a node.run.Node with a model behind the real host;
frames are sent on its protocols, and given as answers to what it asks of those who connect.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.utils import encode_delim

from crypto.identity import Identity
from gossip.blob_wire import BLOB_PROTOCOL
from gossip.finding import FIND_PROTOCOL
from gossip.round_door import ROUND_PROTOCOL
from gossip.service import ADVERTS_PROTOCOL
from node.inference import INFER_PROTOCOL
from node.work import WORK_LIMITS, Finished, from_wire, to_wire
from p2p.calls import Calls
from p2p.errors import RemoteError
from p2p.guard_relay import HOP, STOP
from p2p.hello import RPC_PROTOCOL
from tests.fuzz_attack import ASKED, SHARES, Attack
from tests.fuzz_frames import damaged
from tests.libp2p_peers import bare_connection, node, raw_socket
from tests.node_swarm import work

FRAMES = 50_000
FRAMES_SOAK = 1_000_000
GROWTH_BYTES_MAX = 32 << 20
LOOKS = 20  # at the memory
WARM_UP = 2 / LOOKS  # of the frames, before the memory is first read
LOSSES_MAX = 2  # connections of somebody who behaves
ATTACKERS = 3


@asynccontextmanager
async def victim() -> AsyncIterator[tuple[psutil.Process, Any, Any]]:
    """The host's process; its address is read by `remote`."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "tests.fuzz_victim"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )
    try:
        assert process.stdout is not None
        with trio.fail_after(60):
            address = await line(process.stdout, "/ip4/")

        class Remote:
            def addresses(self) -> tuple[str, ...]:
                return (address,)

            peer_id = address.rpartition("/")[2]

        yield psutil.Process(process.pid), process, Remote()
    finally:
        process.kill()
        await process.wait()


async def line(stream: trio.abc.ReceiveStream, start: str) -> str:
    """The next line of a process that begins so; the process waits after it."""
    text = b""
    while True:
        piece = await stream.receive_some(65_536)
        assert piece, f"the process ended after {text!r}"
        text += piece
        for each in text.decode().splitlines(keepends=True):
            if each.startswith(start) and each.endswith("\n"):
                return each.strip()


def rss(process: psutil.Process) -> int:
    return int(process.memory_info().rss)


async def serves(control: Calls, infer: Calls, peer: Any) -> None:
    """The host still answers somebody who behaves: a greeting's ping, and a prompt."""
    with trio.fail_after(60):
        while True:
            try:
                assert await control.call(peer, "ping", {"instance": "ab" * 8, "twin": ""})
                finished = await infer.call(peer, "generate", to_wire(work(tokens=4)))
                break
            except RemoteError as exc:  # the attackers' last requests may still hold the engine
                if exc.code != "no_room":
                    raise
                await trio.sleep(0.1)
    assert from_wire(finished, Finished).completion_tokens == 4


@asynccontextmanager
async def client(remote: Any) -> AsyncIterator[Callable[[], Any]]:
    """Somebody who behaves, connected for the whole time: a check that the host serves it.

    As any peer does, it dials again when its connection is gone; that may happen on a starved machine, and not often.
    """
    async with node(Identity.make()) as honest, trio.open_nursery() as nursery:
        control, infer = Calls(honest, RPC_PROTOCOL, {}), Calls(honest, INFER_PROTOCOL, {}, limits=WORK_LIMITS)
        await nursery.start(control.run)
        await nursery.start(infer.run)
        peer = await honest.dial(remote.addresses()[0])
        losses: list[str] = []
        honest.watch(lambda change: None if change.connected else losses.append(change.breach or "without a word"))

        async def check() -> None:
            if peer not in honest.peers():
                print(f"the one who behaves lost its connection: {losses}, {honest.statistics().drops}", flush=True)
                assert len(losses) <= LOSSES_MAX
                assert await honest.dial(remote.addresses()[0]) == peer
            await serves(control, infer, peer)
            assert peer in honest.peers()

        yield check
        nursery.cancel_scope.cancel()


async def fuzz(frames: int) -> None:
    seed = int(os.environ.get("FUZZ_SEED", "20261122"))
    print(f"SEED={seed} FRAMES={frames}")
    attack = Attack(frames, seed)
    total = attack.left.total()
    async with victim() as (memory, process, remote), client(remote) as serves_others:
        readings = []
        for done in (WARM_UP, *(step / LOOKS for step in range(3, LOOKS + 1))):
            async with trio.open_nursery() as nursery:
                for _ in range(ATTACKERS):
                    nursery.start_soon(attack.run, remote, int(total * (1 - done)))
            await serves_others()
            await trio.sleep(1)
            readings.append(rss(memory))
            print(
                f"{attack.sent.total()} frames, {attack.connections} connections, {readings[-1] / 1e6:.1f} MB",
                flush=True,
            )
        print({**attack.sent}, "total", attack.sent.total())
        print("answered", {**attack.answered}, "connections", attack.connections)
        assert process.returncode is None
        assert attack.sent.total() >= total
        process.stdin.close()
        counted = json.loads((await line(process.stdout, "COUNTED ")).removeprefix("COUNTED "))
        print(json.dumps(counted, indent=1))
        with trio.fail_after(30):
            assert await process.wait() == 0
        assert counted["failed"] == []
        assert "daemon_failed" not in counted["host"]
        every_protocol_was_reached(attack, counted)
        the_first_gate_was_passed(attack, counted)
        assert readings[-1] - readings[0] < GROWTH_BYTES_MAX


def every_protocol_was_reached(attack: Attack, counted: Any) -> None:
    """What the node registers is what was attacked, and what it asks of others was answered."""
    assert set(counted["registered"]) == set(SHARES)
    assert [protocol for protocol in SHARES if not (attack.sent[protocol] and counted["reached"].get(protocol))] == []
    assert [protocol for protocol in ASKED if not attack.answered[protocol]] == []


def the_first_gate_was_passed(attack: Attack, counted: Any) -> None:
    """Frames came as far as what stands behind each protocol."""
    assert counted["infer"]["calls"] > attack.sent[INFER_PROTOCOL] / 2
    assert counted["control"]["calls"] > attack.sent[RPC_PROTOCOL] / 2
    assert counted["adverts"]["accepted"] > attack.answered[ADVERTS_PROTOCOL] / 10
    assert counted["engine"]["finished"] > 0
    assert counted["reached"][FIND_PROTOCOL] > 2 * counted["gossip"].get("searched_too_often", 0)
    assert counted["blobs"]["given"]["pieces"] > attack.sent[BLOB_PROTOCOL] / 10
    assert counted["blobs"]["fetched"]["bytes"] > 0
    assert counted["direct"]["served"] > attack.claimed / 2 > 0
    assert counted["relay"]["circuits_total"] > 0
    assert counted["reached"][HOP] > 2 * counted["host"].get("relay_rate", 0)
    assert counted["reached"][STOP] > 2 * counted["host"].get("relay_unasked", 0)
    assert attack.circuits > 0
    assert counted["rounds"]["calls"] > attack.sent[ROUND_PROTOCOL] / 2
    assert counted["rounds"]["heard"].get("another_round", 0) > 0
    assert counted["rounds"]["heard"].get("other_history", 0) > 0
    assert counted["rounds"]["committed"] > 0
    assert counted["host"]["punch_failed"] > 0  # it dialled


@pytest.mark.slow
async def test_50000_mutated_frames_end_nothing_and_grow_nothing() -> None:
    await fuzz(FRAMES)


@pytest.mark.soak
async def test_a_million_mutated_frames_end_nothing_and_grow_nothing() -> None:
    await fuzz(FRAMES_SOAK)


@pytest.mark.slow
async def test_damaged_handshakes_and_multiplexing_end_their_connection_only() -> None:
    rng = random.Random(5)
    handshake = encode_delim(b"/multistream/1.0.0") + encode_delim(b"/noise")
    async with node() as bob, node() as alice:
        await alice.dial(bob.addresses()[0])

        async def quietly(run: Callable[[], Any]) -> None:
            try:
                with trio.fail_after(20):
                    await run()
            except* (BaseLibp2pError, OSError, trio.BrokenResourceError, trio.TooSlowError):
                pass

        async def before() -> None:
            async with await raw_socket(bob) as stream:
                await stream.send_all(damaged(rng, handshake))
                await stream.send_eof()
                while await stream.receive_some():
                    pass

        async def after() -> None:
            async with bare_connection(bob) as muxed:
                for _ in range(20):
                    header = bytes([0, rng.randrange(5), 0, rng.randrange(16)])
                    header += rng.choice([0, 1, 2, 3, 2**31]).to_bytes(4, "big")
                    body = damaged(rng, b"body")
                    size = rng.choice([len(body), 0, 5, 70_000, 2**32 - 1])
                    await muxed.secured_conn.write(header + size.to_bytes(4, "big") + body)

        for _ in range(100):
            await quietly(before)
        for _ in range(60):
            await quietly(after)
        assert alice.peers() == {bob.peer_id}
        async with node() as carol:
            await carol.dial(bob.addresses()[0])
