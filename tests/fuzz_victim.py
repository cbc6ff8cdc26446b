"""A host with plain handlers in a process of its own, for tests/test_fuzz_host.py: prints its address, lives until its
standard input ends, then prints its counters."""

from __future__ import annotations

import json
import sys

import trio

from p2p.errors import StreamClosed, Unreachable
from p2p.transport import Stream
from tests.libp2p_peers import TOPIC, node

PROTOCOLS = ("/openagi/rpc/1", "/openagi/infer/1")


async def echo(stream: Stream) -> None:
    """Every frame back; a peer's breach of the frame's form ends here as an exception, on purpose."""
    try:
        while True:
            await stream.send(await stream.receive())
    except (StreamClosed, Unreachable):
        pass


async def main() -> None:
    async with node(upgrade_s=10.0) as transport:
        for protocol in PROTOCOLS:
            transport.serve(protocol, echo)
        await transport.subscribe(TOPIC, lambda peer, payload: len(payload) % 2 == 0)
        print(transport.addresses()[0], flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
        print(json.dumps(transport.statistics().drops), flush=True)


if __name__ == "__main__":
    trio.run(main)
