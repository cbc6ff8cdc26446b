"""A js-libp2p peer and our nodes, each dialling the other: everything that docs/PROTOCOLS.md promises a stranger.

Run by `python -m pytest -m interop`; client.mjs is written from that document alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from node.commands.processes import Cluster, NodeProcess
from p2p.errors import StreamClosed
from p2p.hello import RPC_PROTOCOL
from p2p.transport import FRAME_BYTES_MAX, Stream
from tests.libp2p_peers import node
from tests.real.conftest import eventually

pytestmark = [pytest.mark.interop, pytest.mark.slow]
TALK_S = 180.0  # a hang guard
BULK = "/openagi/test/bulk/1"
BULK_BYTES = 8 << 20
NOISE = 500  # messages; the node's bucket cuts a flooder off on the way
Facts = dict[str, dict[str, Any]]


def facts_of(output: str) -> Facts:
    rows = [json.loads(line) for line in output.splitlines()]
    return {row.pop("fact"): row for row in rows}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("interop")) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def served(cluster: Cluster) -> NodeProcess:
    return cluster.start("a").wait_ready()


@pytest.fixture(scope="module")
def talk(js: Path, cluster: Cluster, served: NodeProcess) -> Facts:
    """What the js client found in one session with a node."""
    command = ["node", "client.mjs", "talk", served.address, cluster.network]
    done = subprocess.run(command, cwd=js, capture_output=True, text=True, timeout=TALK_S)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}\n{served.log[-2000:]}"
    return facts_of(done.stdout)


def test_identify_and_ping(talk: Facts, served: NodeProcess) -> None:
    assert talk["identify"]["peer"] == served.peer_id
    assert {"/ipfs/ping/1.0.0", "/meshsub/1.1.0", RPC_PROTOCOL, "/openagi/infer/1", "/openagi/adverts/1"} <= set(
        talk["identify"]["protocols"]
    )
    assert talk["ping"]["ms"] >= 0


def test_hello_and_the_other_control_calls(talk: Facts, cluster: Cluster, served: NodeProcess) -> None:
    hello = talk["hello"]
    assert (hello["protocol"], hello["network"], hello["refused"]) == (1, cluster.network, "")
    assert served.address in hello["addresses"]
    assert hello["seen_at"].startswith("/ip4/127.0.0.1/tcp/")
    assert isinstance(talk["peers"]["peers"], list)
    assert talk["unknown"] == {"code": "unknown_method", "retryable": False}


def test_an_advert_comes_by_gossip_and_is_signed(talk: Facts, served: NodeProcess) -> None:
    heard = talk["gossip"]
    assert heard["sender"] == heard["publisher"] == served.peer_id
    assert heard["changedIsRefused"] == "not signed by its sender"
    assert heard["body"]["capacity"]["models"][0]["name"] == "default"
    assert served.address in heard["body"]["addresses"]


def test_adverts_are_handed_over_when_asked(talk: Facts, served: NodeProcess) -> None:
    assert talk["adverts"]["senders"][0] == served.peer_id
    assert talk["adverts"]["capacity"]["accepting"]


def test_tokens_come_to_the_end_under_credit(talk: Facts, served: NodeProcess) -> None:
    answer = talk["generate"]
    assert answer["first"]["type"] == "started"
    assert answer["first"]["served_by"] == served.peer_id
    assert answer["types"]["started"] == 1
    assert answer["tokens"] == answer["end"]["completion_tokens"] == 600
    assert answer["end"]["reason"] == "length"
    assert 254 <= answer["unread"] <= 256, "the node waits for credit, and sends all that it has credit for"
    prompt = "Once upon a time there was a king who had three daughters"
    body = {"model": "default", "prompt": prompt, "max_tokens": 600, "temperature": 0}
    same = httpx.post(f"{served.url}/v1/completions", json=body, timeout=TALK_S).json()
    assert answer["text"] == same["choices"][0]["text"]


def test_a_call_is_cancelled_and_its_place_is_free(talk: Facts, served: NodeProcess) -> None:
    assert talk["cancel"] == {"pieces": 3, "code": "cancelled"}
    assert talk["after cancel"]["tokens"] == 8
    engine = httpx.get(f"{served.url}/api/v1/status", timeout=30).json()["model"]["engine"]
    assert engine["slots_free"] == engine["slots_total"]


def test_embeddings_and_errors(talk: Facts) -> None:
    assert talk["embed"]["bytes"] == [4 * talk["embed"]["dimensions"]] * 2
    assert talk["wrong"] == {"code": "bad_request"}


class JsPeer:
    """A js peer that listens; what it says comes line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.facts: Facts = {}

    def wait_for(self, fact: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        while fact not in self.facts:
            line = self.process.stdout.readline()
            assert line, f"the js peer ended with {self.process.wait()} and did not say {fact!r}"
            self.facts |= facts_of(line)
        return self.facts.pop(fact)

    def publish_noise(self, count: int) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        return int(self.wait_for("published")["reached"])


@pytest.fixture
def listening(js: Path, cluster: Cluster) -> Iterator[JsPeer]:
    command = ["node", "client.mjs", "listen", cluster.network]
    process = subprocess.Popen(command, cwd=js, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield JsPeer(process)
    finally:
        process.kill()
        process.communicate()


def test_a_node_dials_a_js_peer_and_outlives_its_garbage(cluster: Cluster, listening: JsPeer) -> None:
    peer = listening.wait_for("listening")
    ours = cluster.start("b", "--model", "none", join=[peer["address"]]).wait_ready()
    hello = listening.wait_for("hello")
    assert hello["who"] == ours.peer_id
    assert hello["body"]["network"] == cluster.network
    listening.wait_for("ping")
    assert status(ours)["peering"]["peers"][0]["phase"] == "greeted"
    eventually("the js peer's mesh has the node", lambda: listening.publish_noise(1) > 0)
    for _ in range(5):
        listening.publish_noise(NOISE // 5)
    eventually("the noise is counted", lambda: sum(status(ours)["gossip"]["drops"].values()) > 0)
    assert ours.process.poll() is None
    assert httpx.get(f"{ours.url}/v1/models", timeout=30).status_code == 200
    assert ours.stop() == 0


def status(node: NodeProcess) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{node.url}/api/v1/status", timeout=30).json()
    return found


# ---- bulk ----


async def echo(stream: Stream) -> None:
    """The same frames back; then our end."""
    try:
        while True:
            await stream.send(await stream.receive())
    except StreamClosed:
        await stream.close()


async def test_eight_mib_both_ways_when_js_dials(js: Path) -> None:
    async with node() as ours:
        ours.serve(BULK, echo)
        with trio.fail_after(TALK_S):
            command = ["node", "client.mjs", "bulk", ours.addresses()[0], str(BULK_BYTES)]
            done = await trio.run_process(command, cwd=js, capture_stdout=True, check=False)
        found = facts_of(done.stdout.decode())
        assert done.returncode == 0
        assert found["bulk"]["same"]
        assert not ours.statistics().drops, "nothing of js's was out of order"


async def test_eight_mib_both_ways_when_we_dial(listening: JsPeer) -> None:
    peer = await trio.to_thread.run_sync(listening.wait_for, "listening")
    content = os.urandom(BULK_BYTES)
    sent = [content[at : at + FRAME_BYTES_MAX] for at in range(0, BULK_BYTES, FRAME_BYTES_MAX)]
    async with node() as ours:
        with trio.fail_after(TALK_S):
            stream = await ours.open_stream(await ours.dial(peer["address"]), BULK)
            for frame in sent:
                await stream.send(frame)
            await stream.close()
            back = [await stream.receive() for _ in sent]
            with pytest.raises(StreamClosed):
                await stream.receive()
        assert back == sent
        found = await trio.to_thread.run_sync(listening.wait_for, "bulk")
        assert found["digest"] == hashlib.sha256(content).hexdigest()
        assert not ours.statistics().drops.keys() - {"gossip_topic"}  # it subscribes to topics that are none of ours
