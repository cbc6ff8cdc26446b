"""The pages of real nodes in headless Chromium: a node that serves, and a door without a model beside it.

Needs Chromium (`apt-get install chromium`) and `pip install -c constraints.txt -e '.[browser]'`; `make browser` brings
both where it can. Without them these tests are skipped, and say so. Screenshots go to .ci/artefacts/ when that
folder is there.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("playwright", reason="Playwright is not installed: pip install -e '.[browser]'")
pytest.importorskip("axe_playwright_python", reason="axe is not installed: pip install -e '.[browser]'")

from node.commands.processes import Cluster, NodeProcess
from tests.browser.visits import chromium

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.real,
    pytest.mark.skipif(chromium() is None, reason="there is no Chromium: apt-get install chromium, or `make browser`"),
]
ROOT = Path(__file__).parent.parent.parent
PICTURES = ROOT / ".ci" / "artefacts"
VISIT_S_MAX = 400.0


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, NodeProcess]]:
    with Cluster(tmp_path_factory.mktemp("pages")) as cluster:
        server = cluster.start("server").wait_ready()
        door = cluster.start("door", "--model", "none", "--no-memory", join=[server]).wait_ready()
        yield {"server": server, "door": door}


def start(name: str, nodes: dict[str, NodeProcess]) -> subprocess.Popen[str]:
    urls = json.dumps({which: node.url for which, node in nodes.items()})
    pictures = [str(PICTURES)] if PICTURES.is_dir() else []
    command = [sys.executable, "-m", "tests.browser.visits", name, urls, *pictures]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def visited(process: subprocess.Popen[str], said: str = "") -> dict[str, Any]:
    """What a visit saw; whatever the browser complained of fails here."""
    out, errors = process.communicate(said, timeout=VISIT_S_MAX)
    assert process.returncode == 0, errors[-3000:]
    seen: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert seen.pop("complaints") == []
    return seen


def visit(name: str, nodes: dict[str, NodeProcess]) -> dict[str, Any]:
    return visited(start(name, nodes))


def inference(node: NodeProcess) -> dict[str, Any]:
    told: dict[str, Any] = httpx.get(f"{node.url}/api/v1/status", timeout=60).json()["inference"]
    return told


def test_the_dashboard_tells_and_follows(nodes: dict[str, NodeProcess]) -> None:
    seen = visit("dashboard", nodes)
    server = nodes["server"].peer_id
    assert seen["headline"].startswith("A door without a model, connected to 1 peer")
    assert server[-6:] in seen["peers"]
    assert "default" in seen["peers"]
    assert "None. Requests go to peers" in seen["model"]
    assert "train start" in seen["training"] or "no model to train" in seen["training"]
    assert "Nobody has asked" in seen["wait"]
    assert "none lately" in seen["before"]
    assert "0 of 1 request" in seen["after"]
    assert f"--bootstrap {nodes['door'].address}" in seen["joining"]


def test_the_chat_streams_says_who_and_starts_anew(nodes: dict[str, NodeProcess]) -> None:
    seen = visit("chat", nodes)
    server = nodes["server"]
    assert seen["options"] == ["default (elsewhere, 1 node)"]
    assert seen["grown"][-1] > seen["grown"][0], "the text came all at once"
    assert server.peer_id[-6:] in seen["who"]
    assert server.ready["revision"] in seen["who"]
    assert "tok/s" in seen["who"]
    assert "40 tokens" in seen["who"]
    assert seen["copied"].split() == seen["text"].split()
    assert seen["again"]
    assert (seen["turns"], seen["spoken"]) == (0, "")


def test_stop_cancels_at_the_node(nodes: dict[str, NodeProcess]) -> None:
    before = inference(nodes["door"])["cancelled"]
    seen = visit("stop", nodes)
    assert "stopped by you" in seen["who"]
    assert seen["focus"] == "prompt"
    told = inference(nodes["door"])
    assert (told["cancelled"], told["running"]) == (before + 1, 0)


def test_errors_are_sentences_that_say_what_to_do(nodes: dict[str, NodeProcess]) -> None:
    seen = visit("failing", nodes)
    assert "temperature" in seen["refused"]
    assert "Change what the sentence names" in seen["refused"]
    assert "wants an API key" in seen["locked"]
    assert seen["focus"] == "api-key"
    assert seen["opened"]
    assert seen["kept"] == [["sk-right"], []]
    assert "does not answer" in seen["gone"]
    assert "--scope metrics" in seen["asks"]
    assert "does not do" not in seen["asks"]
    assert "does not do: this node wants an API key." in seen["asks_again"]


def test_everything_is_reached_by_the_keyboard_and_shows_it(nodes: dict[str, NodeProcess]) -> None:
    seen = visit("keyboard", nodes)
    dashboard, chat = ([stop["name"] for stop in seen[path]] for path in ("/", "/chat"))
    assert dashboard[:5] == ["To the content", "Node", "Dashboard", "Chat", f"12D3…{nodes['door'].peer_id[-6:]}"]
    assert {"join", "peers"} <= set(dashboard)
    assert chat[:6] == ["To the message field", "Node", "Dashboard", "Chat", "fresh", "settings"]
    assert {"prompt", "send", "model"} <= set(chat)
    assert [stop["name"] for stops in seen.values() for stop in stops if not stop["shown"]] == []


def test_the_panel_of_the_nodes_own_state(nodes: dict[str, NodeProcess]) -> None:
    seen = visit("itself", nodes)
    told = httpx.get(f"{nodes['server'].url}/api/v1/self", timeout=60).json()
    formulas = {row["path"]: row["formula"] for row in told["fields"]}
    assert seen["without"], "a node without memory has no such panel"
    assert formulas["load.queue_length"] in seen["formula"]
    assert seen["described"] == "formula-load-queue_length"
    assert (seen["again"], seen["quiet"]) == (True, 0)
    assert seen["now"].startswith("run 1; default; running")
    assert seen["before"] == "nothing is recorded of this node yet"
    assert re.search(r"loop lag ms\s+[\d.]+ ms", seen["load"])
    assert "events in " in seen["memory"]
    assert re.fullmatch(r"Whole: \d+ events, each is what was written\.", seen["verified"])
    assert seen["plots"] >= 4
    assert not re.search(r"\b(mood|feel\w*|happy|sad|conscious\w*|level|phi)\b", seen["card"], re.IGNORECASE)


def test_what_a_model_says_stays_text_and_motion_can_be_off(nodes: dict[str, NodeProcess]) -> None:
    seen = visit("text", nodes)
    assert set(seen["names"]) == {"p", "pre", "code"}
    assert '<img src=x onerror="document.title=1">' in seen["text"]
    assert "<script>document.title=2</script>" in seen["text"]
    assert seen["title"] == "Chat · node"
    assert seen["moving"] == "none"


def test_axe_finds_nothing_serious_in_either_scheme_on_a_desk_or_a_telephone(nodes: dict[str, NodeProcess]) -> None:
    seen = visit("access", nodes)
    assert len(seen) == 8
    assert {name: faults for name, faults in seen.items() if faults} == {}


def test_a_page_that_is_open_does_not_keep_a_node_from_stopping(nodes: dict[str, NodeProcess]) -> None:
    process = start("ending", nodes)
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    assert nodes["door"].stop() == 0
    assert "bug" not in nodes["door"].log
    assert "Traceback" not in nodes["door"].log
    seen = visited(process, "\n")
    assert seen["live"] in ("the node is stopping", "the node does not answer", "the node closed the connection")
