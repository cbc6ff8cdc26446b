"""A network that is cut in mid-answer: two hosts of our own, made of network namespaces, and a link taken down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from node.commands.processes import Cluster, NodeProcess
from tests.real.conftest import PATIENCE_S

pytestmark = [pytest.mark.real, pytest.mark.slow]

CLIENT = """
import httpx, json, sys
url, tokens, peers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
while True:
    rows = httpx.get(url + "/v1/models", timeout=30).json()["data"]
    if max([row["peers"] for row in rows], default=0) >= peers: break
body = {"model": "default", "prompt": "Once upon a time", "max_tokens": tokens, "temperature": 0, "stream": True}
with httpx.stream("POST", url + "/v1/completions", json=body, timeout=120) as response:
    print(json.dumps({"served_by": response.headers["x-served-by"]}), flush=True)
    for line in response.iter_lines():
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            text = "".join(choice["text"] for choice in event.get("choices", []))
            print(json.dumps({"text": text, "error": event.get("error")}), flush=True)
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces joined by one cable, 10.77.0.1 and 10.77.0.2."""
    near, far = f"near{os.getpid()}", f"far{os.getpid()}"
    try:
        for name in (near, far):
            ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as exc:
        pytest.skip(f"network namespaces need root and iproute2 here: {exc}")
    try:
        ip("link", "add", "cable0", "netns", near, "type", "veth", "peer", "name", "cable1", "netns", far)
        for name, device, address in ((near, "cable0", "10.77.0.1/24"), (far, "cable1", "10.77.0.2/24")):
            ip("-n", name, "addr", "add", address, "dev", device)
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield near, far
    finally:
        for name in (near, far):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def client(host: str, door: NodeProcess, tokens: int, peers: int) -> subprocess.Popen[str]:
    command = ["ip", "netns", "exec", host, sys.executable, "-c", CLIENT, door.url, str(tokens), str(peers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def lines(process: subprocess.Popen[str]) -> Iterator[dict[str, str]]:
    assert process.stdout is not None
    for line in process.stdout:
        yield json.loads(line)


def whole(answer: Iterator[dict[str, str]]) -> str:
    text = ""
    for line in answer:
        assert line["error"] is None
        text += line["text"]
    return text


def test_an_answer_goes_on_when_the_network_is_cut(cluster: Cluster, hosts: tuple[str, str]) -> None:
    near, far = hosts
    here, there = ("ip", "netns", "exec", near), ("ip", "netns", "exec", far)
    distant = cluster.start("distant", "--listen", "/ip4/10.77.0.2/tcp/4001", inside=there).wait_ready()
    door = cluster.start(
        "door", "--model", "none", "--listen", "/ip4/10.77.0.1/tcp/4001", join=[distant], inside=here
    ).wait_ready()
    backup = cluster.start("backup", "--listen", "/ip4/10.77.0.1/tcp/4002", join=[door], inside=here).wait_ready()
    with client(near, door, 300, 2) as calm_client:
        calm = lines(calm_client)
        next(calm)
        expected = whole(calm)
    until = time.monotonic() + PATIENCE_S
    while True:
        with client(near, door, 300, 2) as cut_client:
            answer = lines(cut_client)
            server = next(answer)["served_by"]
            if server == distant.peer_id:
                text = "".join(next(answer)["text"] for _ in range(3))
                ip("-n", near, "link", "set", "cable0", "down")
                text += whole(answer)
                break
            whole(answer)
        assert time.monotonic() < until, "the distant peer was never chosen"
    assert server == distant.peer_id
    assert text == expected
    assert distant.process.poll() is None, "cut off, not dead"
    assert backup.process.poll() is None
