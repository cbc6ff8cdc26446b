"""Four real nodes train the embedded model on texts of their own: one set of weights, which they then serve.

The long form, with losses and twenty kills: `python -m bench.together`.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import httpx
import pytest

from node.commands.processes import Cluster, NodeProcess
from tests.real.conftest import eventually

pytestmark = [pytest.mark.real, pytest.mark.slow]
RUN = "tales"
NODES = 4
HANG_S = 400.0  # a guard for a busy machine, never a measurement


def text_of(number: int) -> str:
    """Some thousand words that no other node has in this order."""
    rng = random.Random(number)
    words = (
        "the",
        "old",
        "king",
        "had",
        "a",
        "fox",
        "who",
        "said",
        "gold",
        "snow",
        "were",
        "one",
        "to",
        "whom",
        "night",
    )
    return ". ".join(" ".join(rng.choices(words, k=9)).capitalize() for _ in range(300))


def told(node: NodeProcess) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.get(f"{node.url}/api/v1/training", timeout=60).json()
    return answer


def reached(node: NodeProcess, number: int) -> None:
    eventually(f"{node.name} is at round {number}", lambda: told(node).get("round", 0) >= number, HANG_S)


def roots(node: NodeProcess) -> dict[int, str]:
    return {each["round"]: each["root"] for each in told(node)["rounds"]}


def test_four_nodes_train_one_model_and_serve_it_and_one_that_dies_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    texts = []
    for number in range(NODES):
        texts.append(tmp_path / f"text-{number}.txt")
        texts[-1].write_text(text_of(number))
    address = cluster.reserve("node-0")

    def start(number: int) -> NodeProcess:
        joins = () if number == 0 else ("--train", RUN, "--data", str(texts[number]))
        return cluster.start(f"node-{number}", *joins, join=[address] if number else [])

    nodes = [start(number) for number in range(NODES)]
    for node in nodes:
        node.wait_ready(HANG_S)
    asked = {
        "name": RUN,
        "data": [str(texts[0])],
        "founders": [node.peer_id for node in nodes[1:]],
        "steps": 2,
        "rows": 1,
        "context": 32,
        "accumulation": 1,
    }
    answer = httpx.post(f"{nodes[0].url}/api/v1/training/start", json=asked, timeout=HANG_S)
    assert answer.status_code == 200, answer.text
    for node in nodes:
        reached(node, 3)

    by_node = [roots(node) for node in nodes]
    common = set.intersection(*(set(each) for each in by_node))
    assert len(common) >= 2
    assert all(len({each[number] for each in by_node}) == 1 for number in common), by_node
    for node in nodes:
        served = httpx.post(f"{node.url}/v1/completions", json={"prompt": "The king", "max_tokens": 3}, timeout=HANG_S)
        assert served.headers["x-model-revision"].startswith(f"{RUN}-r"), served.headers
    rows = httpx.get(f"{nodes[0].url}/v1/models", timeout=60).json()["data"]
    assert any(row["revision"].startswith(f"{RUN}-r") for row in rows)

    dead = nodes[3].peer_id
    nodes[3].process.kill()
    nodes[3].process.wait()
    eventually(
        "the round names who is missing", lambda: any(dead in r["missing"] for r in told(nodes[0])["rounds"]), HANG_S
    )
    reached(nodes[0], told(nodes[0])["round"] + 2)

    nodes[3] = start(3).wait_ready(HANG_S)
    reached(nodes[3], told(nodes[0])["round"])
    eventually("it holds the weights of the others", lambda: same_later_root(nodes), HANG_S)
    assert [node.stop() for node in nodes] == [0] * NODES


def same_later_root(nodes: list[NodeProcess]) -> bool:
    """Whether the one that came back made a round to the same weights as another."""
    mine, other = roots(nodes[3]), roots(nodes[0])
    common = mine.keys() & other.keys()
    assert all(mine[number] == other[number] for number in common)
    return bool(common)
