"""A whole node (node.run.Node) as a process whose own code offers and fetches blobs, as training will.

Takes a data directory and MB/s; JSON lines on stdin: {"dial"}, {"offer"}, {"fetch", "peers"}, {"status"}; one answer
each on stdout, and {"stored"} lines while it fetches.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import trio

from crypto.digest import Digest
from crypto.identity import Identity, PeerId
from gossip.blob_fetching import Progress
from gossip.errors import CannotStore, Unavailable
from node.config import KEY_FILE, NodeConfig
from node.run import Node, topics_of
from p2p.host import open_host
from p2p.host_config import HostConfig


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


async def obey(node: Node, transport: Any, order: dict[str, Any]) -> dict[str, Any]:
    if "dial" in order:
        return {"peer": await transport.dial(order["dial"])}
    if "offer" in order:
        return {"blob": (await node.blobs.offer_file(Path(order["offer"]))).hex()}
    if "fetch" in order:

        def on_progress(progress: Progress) -> None:
            say(stored=progress.stored_bytes)

        try:
            blob, peers = Digest(bytes.fromhex(order["fetch"])), map(PeerId, order["peers"])
            return {"path": str(await node.blobs.fetch(blob, peers, on_progress))}
        except (Unavailable, CannotStore) as exc:
            return {"error": str(exc)}
    return {"status": node.state.status()}


async def main(data_dir: Path, upload_mb_s: int) -> None:
    config = NodeConfig(
        data_dir=data_dir, http="off", mdns=False, model="none", upload_mb_s=upload_mb_s, ready_file=data_dir / "ready"
    )
    identity = Identity.load_or_make(data_dir / KEY_FILE)
    host = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",), topics=topics_of("main"))
    async with open_host(identity, host) as transport:
        node = Node(config, identity, transport, ())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.run)
            say(address=transport.addresses()[0], peer=transport.peer_id)
            while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
                say(**await obey(node, transport, json.loads(line)))
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    where = Path(sys.argv[1])
    where.mkdir(parents=True, exist_ok=True)
    trio.run(main, where, int(sys.argv[2]))
