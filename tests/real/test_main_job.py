"""The main job over libp2p on localhost: join by bootstrap only, ask anybody, survive the death of who answers."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from node.commands.processes import Cluster, NodeProcess
from tests.real.conftest import PATIENCE_S, eventually, sees

pytestmark = [pytest.mark.real, pytest.mark.slow]
PROMPT = "Once upon a time there was a king who had three daughters"


def body(tokens: int, **more: object) -> dict[str, Any]:
    return {"model": "default", "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, **more}


def ask(node: NodeProcess, tokens: int = 16, headers: dict[str, str] | None = None) -> httpx.Response:
    headers = {"cache-control": "no-store", **(headers or {})}
    return httpx.post(f"{node.url}/v1/completions", json=body(tokens), headers=headers, timeout=PATIENCE_S)


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def stream_and(node: NodeProcess, tokens: int, disturb: Any) -> tuple[str, str, dict[str, Any] | None]:
    """Stream an answer; call disturb(served_by) after four events. Returns (text, first server, error or None)."""
    text, seen = "", 0
    url, anew = f"{node.url}/v1/completions", {"cache-control": "no-store"}
    with httpx.stream("POST", url, json=body(tokens, stream=True), headers=anew, timeout=PATIENCE_S) as response:
        assert response.status_code == 200, response.read()
        server = response.headers["x-served-by"]
        for event in events(response):
            if "error" in event:
                return text, server, event["error"]
            text += "".join(choice["text"] for choice in event["choices"])
            seen += 1
            if seen == 4:
                disturb(server)
    return text, server, None


def three(cluster: Cluster) -> tuple[NodeProcess, NodeProcess, NodeProcess]:
    """Two nodes with the model and a door without; the door sees both."""
    address = cluster.reserve("a")
    seed, other = cluster.start("a"), cluster.start("b", join=[address])
    door = cluster.start("door", "--model", "none", join=[address])
    for node in (seed, other, door):
        node.wait_ready()
    sees(door, 2)
    return door, seed, other


def reference(tokens: int) -> str:
    """The same prompt answered by transformers' own generate on the same weights."""
    import torch  # only this test needs it
    import transformers

    from model.load import resolve

    place = resolve("default").path
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_any_node_answers_and_answers_as_transformers_does(cluster: Cluster) -> None:
    door, seed, other = three(cluster)
    through, direct = ask(door, 24), ask(seed, 24)
    assert through.status_code == 200, through.text
    assert through.headers["x-served-by"] in (seed.peer_id, other.peer_id)
    assert direct.headers["x-served-by"] == seed.peer_id
    assert through.headers["x-model-revision"] == direct.headers["x-model-revision"]
    expected = reference(24)
    assert through.json()["choices"][0]["text"] == expected
    assert direct.json()["choices"][0]["text"] == expected
    usage = through.json()["usage"]
    assert usage["completion_tokens"] == 24
    embedded = httpx.post(f"{door.url}/v1/embeddings", json={"input": "a fox"}, timeout=PATIENCE_S)
    near = httpx.post(f"{seed.url}/v1/embeddings", json={"input": "a fox"}, timeout=PATIENCE_S)
    assert embedded.status_code == 200, embedded.text
    assert embedded.json()["data"] == near.json()["data"]
    pinned = ask(door, 4, {"x-peer": other.peer_id})
    assert pinned.headers["x-served-by"] == other.peer_id
    unknown = httpx.post(f"{door.url}/v1/completions", json={"model": "nobody", "prompt": "x"}, timeout=PATIENCE_S)
    assert unknown.status_code == 404
    assert "default" in unknown.json()["error"]["message"]
    assert [node.stop() for node in (door, seed, other)] == [0, 0, 0]


def test_kill_in_mid_stream_goes_on_elsewhere_byte_for_byte(cluster: Cluster) -> None:
    door, seed, other = three(cluster)
    by_peer = {seed.peer_id: seed, other.peer_id: other}
    calm = ask(door, 200).json()["choices"][0]["text"]
    text, _, error = stream_and(door, 200, lambda server: by_peer[server].process.kill())
    assert error is None
    assert text == calm
    eventually("the dead peer leaves the list", lambda: _serving(door) == 1)
    survivor = next(node for node in (seed, other) if node.process.poll() is None)
    _, server, error = stream_and(door, 200, lambda server: by_peer[server].process.kill())
    assert server == survivor.peer_id
    assert error is not None
    assert "no other live peer" in error["message"]
    assert error["code"] == "peer_failed"


def _serving(node: NodeProcess) -> int:
    rows = httpx.get(f"{node.url}/v1/models", timeout=30).json()["data"]
    return sum(row["peers"] for row in rows if row["id"] == "default")


@pytest.mark.skipif(sys.platform == "win32", reason="SIGSTOP is POSIX")
def test_a_frozen_server_is_left_for_another(cluster: Cluster) -> None:
    door, seed, other = three(cluster)
    by_peer = {seed.peer_id: seed, other.peer_id: other}
    calm = ask(door, 200).json()["choices"][0]["text"]
    text, server, error = stream_and(door, 200, lambda server: by_peer[server].process.send_signal(signal.SIGSTOP))
    assert error is None
    assert text == calm
    assert by_peer[server].process.poll() is None, "frozen, not dead"


def test_a_stopping_server_finishes_what_runs_and_takes_nothing_new(cluster: Cluster) -> None:
    door, seed, other = three(cluster)
    by_peer = {seed.peer_id: seed, other.peer_id: other}
    calm = ask(door, 300).json()["choices"][0]["text"]
    text, server, error = stream_and(door, 300, lambda server: by_peer[server].process.send_signal(signal.SIGTERM))
    assert (error, text) == (None, calm)
    assert by_peer[server].process.wait(timeout=PATIENCE_S) == 0
    assert ask(door).headers["x-served-by"] != server


def test_a_client_that_leaves_frees_the_slot_on_the_serving_peer(cluster: Cluster) -> None:
    seed = cluster.start("a", "--max-batch", "1").wait_ready()
    door = cluster.start("door", "--model", "none", join=[seed]).wait_ready()
    sees(door, 1)
    with httpx.stream(
        "POST", f"{door.url}/v1/completions", json=body(900, stream=True), timeout=PATIENCE_S
    ) as response:
        stream = events(response)
        next(stream)
        assert running(seed) == 1
    eventually("the slot is free again", lambda: running(seed) == 0, 10)
    assert ask(door, 4).status_code == 200


def running(node: NodeProcess) -> int:
    engine = httpx.get(f"{node.url}/api/v1/status", timeout=30).json()["model"]["engine"]
    return int(engine["slots_total"] - engine["slots_free"])


def test_restart_keeps_the_identity_and_five_nodes_find_each_other(cluster: Cluster) -> None:
    seed = cluster.start("a").wait_ready()
    others = [cluster.start(name, "--model", "none", join=[seed]) for name in ("b", "c", "d")]
    last = cluster.start("e", join=[seed])
    for node in (*others, last):
        node.wait_ready()
        sees(node, 2)
    before = seed.peer_id
    assert seed.stop() == 0
    assert not (cluster.root / "a.ready").exists(), "the ready file goes when the node goes"
    again = cluster.start("a", "--listen", seed.address.split("/p2p/")[0]).wait_ready()
    assert again.peer_id == before
    for node in (*others, last):
        sees(node, 2)
    assert ask(others[0], 4).status_code == 200
