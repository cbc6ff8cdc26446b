"""A real node's own state from outside: the report against the memory's file, and the walk when it was killed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from crypto.identity import Identity
from node.commands.processes import Cluster
from node.config import KEY_FILE
from node.events import State
from node.memory_events import doing, replayed
from node.store import Store
from node.store_look import MEMORY_FILE
from tests.real.conftest import eventually
from tests.test_house import ROOT
from tests.test_self_tools import FORCED, REPORTING, figures_in

pytestmark = [pytest.mark.real, pytest.mark.slow]


def cli(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "node", "self", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def walked(*words: str) -> dict[str, Any]:
    result = cli("--verify", "--json", *words)
    assert result.returncode == 0, result.stderr
    told: dict[str, Any] = json.loads(result.stdout)
    return told


def test_the_report_is_what_the_memory_has_and_the_memory_outlives_a_kill(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        node = cluster.start("one", "--self-report").wait_ready()
        url, folder = node.url, node.root / node.name
        eventually("a snapshot of the running node is written", lambda: phases(url)[-1:] == ["running"])
        asked = {**FORCED, "messages": [{"role": "user", "content": "What is your state?"}]}
        chat = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=120)
        assert chat.status_code == 200, chat.text
        text = chat.json()["choices"][0]["message"]["content"]
        refused = httpx.post(f"{url}/v1/chat/completions", json=REPORTING, timeout=120)
        assert (refused.status_code, "takes no tools" in refused.text) == (400, True), "the embedded model takes none"
        assert walked("--node", url)["by"] == "node"
        assert walked("--node", url, "--data-dir", str(folder))["by"] == "node", "its file is locked"
        node.process.kill()
        node.process.wait()
        looked = walked("--data-dir", str(folder))
        assert (looked["by"], looked["is_whole"]) == ("file", True)
        assert cli("--verify", "--node", url).returncode == 69, "a node that was named is not replaced by a file"
        compare(text, folder, node.peer_id)
        again = cluster.start("one", "--self-report").wait_ready()
        before = httpx.get(f"{again.url}/api/v1/self", timeout=60).json()["before"]
        assert before.startswith("run 1; default; running")


def phases(url: str) -> list[str]:
    """What the memory itself has of the node's phase."""
    told = httpx.get(f"{url}/api/v1/self/history?path=identity.phase", timeout=60).json()
    words: list[str] = told["words"]["identity.phase"]
    return words


def compare(text: str, folder: Path, peer_id: str) -> None:
    """The report's sentences and figures, with the file that the killed node left."""
    store = Store(folder / MEMORY_FILE, Identity.load(folder / KEY_FILE))
    kept = sorted(store.recent(None, 1_000), key=lambda each: each.id)
    store.close()
    said = re.search(r"last event in its memory is (\d+), of hash ([0-9a-f]+)\.", text)
    assert said is not None
    head_id, head_hash = int(said[1]), said[2]
    assert {each.id: each.hash.hex() for each in kept}[head_id] == head_hash
    then = [each for each in kept if each.id <= head_id]
    told, state = figures_in(text), replayed(then)
    assert told["identity.peer_id"] == peer_id == state.identity.peer_id
    assert told["identity.boot_count"] == "1"
    assert told["identity.model"] == state.identity.model
    assert told["identity.revision"] == state.identity.revision
    assert told["memory.head_id"] in {str(each.id) for each in kept}
    assert "Before the last stop: nothing is recorded of this node yet." in text
    assert doing(state).startswith("run 1; default")
    snapshots = [each.body for each in kept if isinstance(each.body, State)]
    assert float(told["load.queue_length"]) in {each.figures.get("load.queue_length") for each in snapshots}
