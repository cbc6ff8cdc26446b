"""Real servers behind real nodes: llama-cpp-python's, and llama.cpp's own, with a tiny random model.

Skipped unless LLAMA_PYTHON names the Python of an environment with them:

    python3 -m venv /tmp/llama/venv && /tmp/llama/venv/bin/pip install 'llama-cpp-python[server]' gguf
    LLAMA_PYTHON=/tmp/llama/venv/bin/python python -m pytest -q tests/real/test_upstream_llama.py

LLAMA_SERVER=/path/of/llama-server adds llama.cpp's own; it can be built from the sources that llama-cpp-python comes
with (cmake -B build -DLLAMA_BUILD_SERVER=ON vendor/llama.cpp && cmake --build build --target llama-server).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from node.commands.processes import Cluster, NodeProcess
from tests.real.conftest import eventually

PYTHON, SERVER = os.environ.get("LLAMA_PYTHON"), os.environ.get("LLAMA_SERVER")
pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="LLAMA_PYTHON names no environment with llama-cpp-python"),
]
KINDS = ["llama-cpp-python", *(["llama.cpp"] if SERVER else [])]
HANG_S = 120.0
PROMPT, LONG = "Once upon a time", 3_000


class Llama:
    """One server as a process of its own."""

    def __init__(self, kind: str, model: Path, port: int, log: Path) -> None:
        self.kind, self.url = kind, f"http://127.0.0.1:{port}"
        common = ["--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
        if kind == "llama.cpp":
            assert SERVER is not None
            self.command = [SERVER, *common, "--ctx-size", "8192", "--parallel", "2", "--threads", "1", "--metrics"]
        else:
            assert PYTHON is not None
            more = ["--n_ctx", "4096", "--n_threads", "1", "--model_alias", "tiny", "--chat_format", "chatml"]
            self.command = [PYTHON, "-m", "llama_cpp.server", *common, *more]
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        eventually(f"{self.kind} answers", self.is_there, HANG_S)

    def is_there(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text(errors="replace")[-3000:]
        try:
            return httpx.get(f"{self.url}/v1/models", timeout=5.0, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    assert PYTHON is not None
    subprocess.run([PYTHON, str(Path(__file__).with_name("tiny_gguf.py")), str(path), "1"], check=True)
    return path


@contextmanager
def llama(kind: str, model: Path, root: Path, name: str = "llama") -> Iterator[Llama]:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Llama(kind, model, port, root / f"{name}.log")
    try:
        server.start()
        yield server
    finally:
        server.kill()


def asked(tokens: int, **more: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "stream": True, **more}


def chat(tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hello there"}]
    return {"messages": messages, "max_tokens": tokens, "temperature": 0, "stream": True}


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line[6:])


def text_of(url: str, body: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """The text of a streamed answer, and all its events."""
    path = "chat/completions" if "messages" in body else "completions"
    with httpx.stream("POST", f"{url}/v1/{path}", json=body, timeout=HANG_S, trust_env=False) as response:
        assert response.status_code == 200, response.read()
        told = list(events(response))
    choices = [event["choices"][0] for event in told if event.get("choices")]
    return "".join(each.get("text") or each.get("delta", {}).get("content") or "" for each in choices), told


def status(node: NodeProcess) -> dict[str, Any]:
    told: dict[str, Any] = httpx.get(f"{node.url}/api/v1/status", timeout=HANG_S, trust_env=False).json()
    return told


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_servers_own_for_own_clients_and_peers(kind: str, model: Path, cluster: Cluster) -> None:
    with llama(kind, model, cluster.root) as server:
        address = cluster.reserve("node")
        node = cluster.start("node", "--backend", f"openai:{server.url}")
        door = cluster.start("door", "--model", "none", join=[address])
        node.wait_ready(HANG_S)
        door.wait_ready(HANG_S)
        assert status(node)["backend"]["server"] == kind
        neutral = {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}
        for body in (asked(64), chat(64)):
            wanted, _ = text_of(server.url, {**body, **neutral, "top_p": 1.0})
            assert len(wanted) > 10
            eventually("the door knows the node", lambda: bool(models(door)), HANG_S)
            for through in (node, door):
                got, told = text_of(through.url, {**body, "stream_options": {"include_usage": True}})
                assert got == wanted
                assert told[-1]["usage"]["completion_tokens"] == 64
        if kind == "llama.cpp":
            _, told = text_of(door.url, asked(8, logprobs=2))
            assert any(event["choices"][0].get("logprobs") for event in told if event.get("choices"))


def models(node: NodeProcess) -> list[Any]:
    rows: list[Any] = httpx.get(f"{node.url}/v1/models", timeout=HANG_S, trust_env=False).json()["data"]
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_who_leaves_frees_the_server(kind: str, model: Path, cluster: Cluster) -> None:
    with llama(kind, model, cluster.root) as server:
        node = cluster.start("node", "--backend", f"openai:{server.url}").wait_ready(HANG_S)
        body = asked(LONG)
        for _ in range(3):
            url = f"{node.url}/v1/completions"
            with httpx.stream("POST", url, json=body, timeout=HANG_S, trust_env=False) as response:
                for _event, _ in zip(events(response), range(5), strict=False):
                    pass
        if kind == "llama.cpp":
            slots = f"{server.url}/slots"
            eventually(
                "no slot is busy",
                lambda: not any(s["is_processing"] for s in httpx.get(slots, trust_env=False).json()),
                HANG_S,
            )
        eventually("the node counts nobody there", lambda: status(node)["model"]["running"] == 0, HANG_S)
        assert status(node)["model"]["engine"]["cancelled"] == 3
        assert text_of(node.url, asked(8))[0], "it does one thing at a time, and does it"


@pytest.mark.parametrize("kind", KINDS)
def test_the_node_outlives_its_server_and_serves_again_when_it_is_back(
    kind: str, model: Path, cluster: Cluster
) -> None:
    with llama(kind, model, cluster.root) as server:
        node = cluster.start("node", "--backend", f"openai:{server.url}").wait_ready(HANG_S)
        before = text_of(node.url, asked(32))[0]
        url = f"{node.url}/v1/completions"
        with httpx.stream("POST", url, json=asked(LONG), timeout=HANG_S, trust_env=False) as response:
            told = []
            for event in events(response):
                told.append(event)
                if len(told) == 20:
                    server.kill()
        assert "error" in told[-1], told[-1]
        assert told[-1]["error"]["code"] == "peer_failed"
        assert not any(event["choices"][0]["finish_reason"] for event in told[:-1] if event.get("choices"))
        eventually("it says so", lambda: status(node)["backend"]["state"] == "down", HANG_S)
        refused = httpx.post(url, json={**asked(8), "stream": False}, timeout=HANG_S, trust_env=False)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        ready = httpx.get(f"{node.url}/readyz", timeout=HANG_S, trust_env=False)
        assert ready.status_code == 200
        assert "is down" in ready.json()["degraded"][0]
        server.start()
        eventually("it is back", lambda: status(node)["backend"]["state"] == "up", HANG_S)
        assert text_of(node.url, asked(32))[0] == before
        assert node.process.poll() is None
        assert "Traceback" not in node.log


@pytest.mark.skipif(SERVER is None, reason="LLAMA_SERVER names no llama.cpp server")
@pytest.mark.parametrize("body", [asked(600), chat(600)], ids=["text", "chat"])
def test_a_second_server_with_the_same_weights_goes_on(body: dict[str, Any], model: Path, cluster: Cluster) -> None:
    with llama("llama.cpp", model, cluster.root, "one") as one, llama("llama.cpp", model, cluster.root, "two") as two:
        servers = {"first": one, "second": two}
        address = cluster.reserve("first")
        nodes = {
            name: cluster.start(name, "--backend", f"openai:{server.url}", join=[address])
            for name, server in servers.items()
        }
        door = cluster.start("door", "--model", "none", join=[address]).wait_ready(HANG_S)
        for node in nodes.values():
            node.wait_ready(HANG_S)
        eventually("both are known", lambda: bool(models(door)) and models(door)[0]["peers"] == 2, HANG_S)
        assert len({node.ready["revision"] for node in nodes.values()}) == 1
        wanted, _ = text_of(door.url, body)
        path = "chat/completions" if "messages" in body else "completions"
        with httpx.stream("POST", f"{door.url}/v1/{path}", json=body, timeout=HANG_S, trust_env=False) as response:
            by = response.headers["x-served-by"]
            serving = next(name for name, node in nodes.items() if node.peer_id == by)
            told = []
            for event in events(response):
                told.append(event)
                if len(told) == 50:
                    servers[serving].kill()
        assert "error" not in told[-1], told[-1]
        choices = [event["choices"][0] for event in told if event.get("choices")]
        got = "".join(each.get("text") or each.get("delta", {}).get("content") or "" for each in choices)
        assert wanted.startswith(got), "the rest is the one that nobody disturbed, less what was made twice"
        assert len(got) > 0.9 * len(wanted)
        assert status(door)["inference"]["counts"]["takeovers"] == 1
