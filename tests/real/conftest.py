"""Real node processes for the tests of this folder, one cluster a test."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from node.commands.processes import Cluster, NodeProcess

PATIENCE_S = 60.0  # a hang guard on a busy machine, never a measurement


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path) as nodes:
        yield nodes


def eventually(what: str, check: Callable[[], object], seconds: float = PATIENCE_S) -> None:
    """Wait until `check()` is true; fail with `what` otherwise."""
    until = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < until, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)


def peers_serving(node: NodeProcess, model: str = "default") -> int:
    rows = httpx.get(f"{node.url}/v1/models", timeout=30).json()["data"]
    return max([row["peers"] for row in rows if row["id"] == model], default=0)


def sees(node: NodeProcess, count: int) -> None:
    """Wait until a node knows `count` peers that serve the default model (itself counted)."""
    eventually(f"{node.name} sees {count} peers that serve", lambda: peers_serving(node) >= count)
