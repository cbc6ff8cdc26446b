"""A whole node in a process of its own, for tests/test_fuzz_host.py: the real host, handlers, gossip and engine.

Rules: prints its address once the model is served; lives until its standard input ends, then stops in order and prints
what it counted. FAILED counts log records with a traceback: an exception that a handler did not foresee.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import trio

from crypto.identity import Identity
from gossip.messages import advert_topic
from node.config import NodeConfig
from node.run import Node
from tests.libp2p_peers import node
from tests.tiny_models import save_causal

NETWORK = "fuzz"
failed: list[str] = []


class Tracebacks(logging.Handler):
    """Keeps the first of each kind of failure that was logged with a traceback."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and len(failed) < 20:
            failed.append(self.format(record)[-1500:])


async def main(path: Path) -> None:
    identity = Identity.make()
    config = NodeConfig(
        data_dir=path, http="off", mdns=False, network=NETWORK, model=str(path / "model"), threads=1,
        ready_file=path / "ready.json",
    )  # fmt: skip
    async with (
        node(identity, upgrade_s=10.0, topics=frozenset({advert_topic(NETWORK)})) as transport,
        trio.open_nursery() as nursery,
    ):
        here = Node(config, identity, transport, (), outside=transport.relay)
        nursery.start_soon(here.run)
        while not (path / "ready.json").exists():  # noqa: ASYNC110  # a file
            await trio.sleep(0.05)
        print(transport.addresses()[0], flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
        host, gossip, calls = transport.statistics(), here._gossip.statistics(), here._infer.statistics()
        counted = {
            "failed": failed,
            "frames_in": host.frames_in,
            "host": host.drops,
            "gossip": gossip.drops,
            "faults": gossip.standing.faults,
            "adverts": {str(outcome): count for outcome, count in gossip.directory.outcomes.items()},
            "infer": {"calls": calls.calls_in, **calls.drops},
            "control": {"calls": here._control.statistics().calls_in, **here._control.statistics().drops},
            "engine": asdict(here._inference.hosting.statistics()) if here._inference.hosting else None,
        }
        print("COUNTED " + json.dumps(counted), flush=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    logging.getLogger().addHandler(Tracebacks())
    with tempfile.TemporaryDirectory() as folder:
        save_causal(Path(folder) / "model")
        trio.run(main, Path(folder))
