"""The command line as a whole: every page, every --json, keyed nodes, one sentence for what is wrong, completion."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import trio
import typer
from typer.testing import CliRunner, Result

from crypto.identity import Identity
from node.__main__ import app, main
from node.banner import print_banner
from node.commands import status as status_command
from node.commands.ask import texts
from node.commands.chat import HELP, _Talk
from node.commands.checks import Verdict
from node.commands.client import CommandFailed, Event, NodeClient
from node.commands.doctor import node_checks
from node.commands.status import line, summary
from node.commands.tables import spoken
from node.config import KEY_FILE, NodeConfig
from tests.fake_front import PEER, FakeFront, tale
from tests.fake_self import FakeSelf
from tests.test_train_commands import RUN, Screen, listening_to_ctrl_c
from tests.test_web_serve import endless, served

__all__ = ["listening_to_ctrl_c"]
ROOT = Path(__file__).parent.parent
COMMANDS = {"run", "ask", "chat", "status", "peers", "self", "train", "keys", "doctor", "demo"}


def leaves(command: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that does something, with the words that name it."""
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, inner in command.commands.items():
        yield from leaves(inner, *path, name)


ROOT_COMMAND: Any = typer.main.get_command(app)
LEAVES = dict(leaves(ROOT_COMMAND))
each_leaf = pytest.mark.parametrize("words", LEAVES, ids=" ".join)


def flags_of(command: Any) -> set[str]:
    return {flag for param in command.params for flag in (*param.opts, *param.secondary_opts) if flag.startswith("-")}


def cli(*words: str, said: str | None = None, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, list(words), input=said, env={"COLUMNS": "80", **(env or {})})


def test_the_commands_are_those_of_the_interfaces() -> None:
    assert ROOT_COMMAND.commands.keys() >= COMMANDS


def test_each_flag_of_run_is_a_setting_and_each_setting_a_flag() -> None:
    names = {param.name for param in LEAVES[("run",)].params}
    assert names - {"config"} == NodeConfig.model_fields.keys()


# -- pages -----------------------------------------------------------------------------------------------------------


@each_leaf
def test_a_page_fits_the_screen_and_its_examples_are_right(words: tuple[str, ...]) -> None:
    result = cli(*words, "-h")
    assert result.exit_code == 0, result.output
    assert [line for line in result.stdout.splitlines() if len(line) > 80] == []
    for title in ("Examples", "Exit codes"):
        assert f"\n {title}" in result.stdout
    for param in LEAVES[words].params:
        assert param.name == "help" or param.help, f"{words}: {param.name} has no help"
    examples = re.findall(r"python -m node[^|<>\n]*", result.stdout.split("\n Examples")[1].split("\n Exit codes")[0])
    assert examples
    for example in examples:
        check_example(example)


def check_example(example: str) -> None:
    """Its command is one, and its flags are that command's."""
    given = shlex.split(example)[3:]
    path = next(p for n in range(4, -1, -1) if (p := tuple(given[:n])) in LEAVES or n == 0)
    command = LEAVES[path] if path else ROOT_COMMAND if "--help" in given else LEAVES[("run",)]
    for flag in (word.partition("=")[0] for word in given if word.startswith("-") and word != "-"):
        assert flag in flags_of(command) | {"--help"}, f"{example}: {flag}"


def test_the_first_page() -> None:
    result = cli("--help")
    for name in COMMANDS:
        assert f"│ {name} " in result.stdout
    assert "OPENAGI_API_KEY" in result.stdout
    assert [line for line in result.stdout.splitlines() if len(line) > 80] == []


# -- one sentence ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--foo"], "node: No such option: --foo; see `python -m node run --help`"),
        (["ask"], "node: Missing argument 'text'; see `python -m node ask --help`"),
        (["stattus"], "node: No such command 'stattus'. Did you mean 'status'? see `python -m node --help`"),
        (["status", "--node", "ftp://x"], "node: --node 'ftp://x' is not an address like http://127.0.0.1:8765"),
        (["status", "--api-key", "a\nb"], "node: --api-key is no key: wanted letters, digits and signs, in one line"),
        (["train", "join", "x"], "node: Missing option '--data'; see `python -m node train join --help`"),
    ],
    ids=str,
)
def test_what_is_wrong_is_one_sentence_on_stderr(
    words: list[str], wanted: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["node", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    assert (ended.value.code, told.out, told.err) == (2, "", wanted + "\n")


@pytest.mark.parametrize("words", [["train"], ["keys"], ["keys", "identity"]], ids=str)
def test_a_group_without_a_command_shows_its_page(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["node", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    assert (ended.value.code, told.err) == (2, "")
    assert "Usage" in told.out


# -- JSON ------------------------------------------------------------------------------------------------------------

# how each command is called in the test below; chat reads a turn, watch ends by itself nowhere
CALLS: dict[tuple[str, ...], list[str]] = {
    ("ask",): ["Once"],
    ("chat",): [],
    ("doctor",): ["--config", "CONFIG"],
    ("peers",): [],
    ("self",): [],
    ("status",): [],
    ("keys", "identity", "show"): ["--data-dir", "DATA"],
    ("keys", "identity", "export"): ["DATA/copy.key", "--data-dir", "DATA"],
    ("keys", "identity", "rotate"): ["--data-dir", "DATA", "--yes"],
    ("train", "start"): ["tales", "--data", "/x"],
    ("train", "join"): ["tales", "--data", "/x"],
    ("train", "status"): [],
    ("train", "pause"): [],
    ("train", "resume"): [],
    ("train", "leave"): [],
}
# what starts nodes or wants a finished run: tests/real and tests/test_train_export.py
ELSEWHERE = {("run",), ("demo",), ("train", "export")}


def test_every_command_has_json() -> None:
    """Commands of others' that are not in CALLS must at least have the flag."""
    assert [words for words, command in LEAVES.items() if "--json" not in flags_of(command)] == []
    assert CALLS.keys() | ELSEWHERE <= LEAVES.keys()


async def test_json_is_one_object_or_one_a_line(tmp_path: Path) -> None:
    Identity.make().save(tmp_path / KEY_FILE)
    (tmp_path / "peers.json").write_text("[]")
    config = {"data_dir": str(tmp_path), "http": "127.0.0.1:0", "bootstrap_file": str(tmp_path / "peers.json")}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model": "none", "mdns": False}))
    places = {"DATA": str(tmp_path), "CONFIG": str(tmp_path / "config.json")}
    async with served() as node:
        node.front.trains.tells = RUN
        node.front.itself = itself = FakeSelf(tmp_path / "memory")
        url = f"http://127.0.0.1:{node.port}"
        for words, more in CALLS.items():
            given = [re.sub("DATA|CONFIG", lambda found: places[found[0]], word) for word in more]
            asks = "--node" in flags_of(LEAVES[words])
            whole = [*words, *given, "--json", *(["--node", url] if asks else [])]
            said = "hello\n/new\nagain\n" if words == ("chat",) else None
            result = await trio.to_thread.run_sync(lambda whole=whole, said=said: cli(*whole, said=said))  # type: ignore[misc]
            assert result.exit_code == 0, (words, result.output)
            rows = result.stdout.splitlines() if words == ("chat",) else [result.stdout]
            for row in rows:
                assert isinstance(json.loads(row), dict), words
            assert len(rows) == (2 if words == ("chat",) else 1)
        itself.close()


def test_a_node_that_is_ready_says_so_in_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    ready: dict[str, object] = {"peer_id": PEER, "http": "127.0.0.1:1", "listen": ["/ip4/1"], "model": None}
    print_banner(ready, NodeConfig(log_json=True), 3)
    told = json.loads(capsys.readouterr().out)
    assert told == {**ready, "network": "main", "peers": 3, "ready": True}
    print_banner(ready, NodeConfig(), 3)
    assert "3 peers connected\nready; Ctrl-C stops" in capsys.readouterr().out
    print_banner(ready, NodeConfig(), 1)
    assert "1 peer connected\n" in capsys.readouterr().out
    assert "--json" in flags_of(LEAVES[("run",)])


# -- a node that wants a key -----------------------------------------------------------------------------------------


@contextmanager
def keyed_node(key: str) -> Iterator[str]:
    """A door that tells its status to who has the key."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            good = self.headers.get("authorization") == f"Bearer {key}"
            told: dict[str, Any] = FakeFront().status() if good else {"error": {"message": "this node wants a key"}}
            body = json.dumps(told).encode()
            self.send_response(200 if good else 401)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_key_is_sent_and_asked_for() -> None:
    with keyed_node("sk-1") as url:
        result = cli("status", "--node", url)
        wanted = "node: this node wants a key; give the node's key by --api-key or OPENAGI_API_KEY\n"
        assert (result.exit_code, result.stderr) == (2, wanted)
        assert cli("status", "--node", url, "--api-key", "sk-2").exit_code == 2
        [check] = node_checks(url, expected=True, api_key="sk-2")
        assert (check.verdict, check.advice.split(" (")[0]) == (Verdict.BAD, "give a key that may look")
        assert cli("status", "--node", url, "--api-key", "sk-1").exit_code == 0
        assert cli("status", env={"OPENAGI_NODE": url, "OPENAGI_API_KEY": "sk-1"}).exit_code == 0


def test_every_command_that_asks_a_node_takes_a_key() -> None:
    asking = {words: flags_of(command) for words, command in LEAVES.items() if "--node" in flags_of(command)}
    assert asking
    assert [words for words, flags in asking.items() if "--api-key" not in flags] == []


# -- status ----------------------------------------------------------------------------------------------------------

STATUS: dict[str, Any] = {
    "node": {"peer_id": PEER, "network": "main", "version": "0.1.0", "uptime_s": 3_725.0, "rss_bytes": 5 << 20},
    "readiness": {"ready": True, "degraded": ["the disk is full"]},
    "reach": {"verdict": "relayed", "reason": "no dial-back came"},
    "peering": {
        "connected": 2,
        "known": 5,
        "bootstrap": [{"state": "failed", "address": "/ip4/9", "reason": "refused"}, {"state": "connected"}],
        "refusals": [{"peer": "12D3x", "reason": "other network\x1b[31m"}],
        "duplicate": "12D3y answers too",
    },
    "inference": {"requests": 9, "errors": {"no_room": 2}, "running": 1, "completion_tokens": 400},
    "model": {
        "models": [{"name": "fairy", "revision": "sha256-1"}],
        "device": "cpu",
        "linears": {"kind": "packed", "told": "packed fp32"},
        "engine": {"slots_free": 15, "slots_total": 16, "queue_length": 0, "decode_tok_s": 41.25},
    },
    "backend": {"url": "http://127.0.0.1:8000", "server": "vLLM", "problem": "it is down"},
    "training": {"run": "tales", "state": "training", "why": "", "problem": ""},
}


def test_the_summary_says_what_is_of_use() -> None:
    rows = list(summary(STATUS))
    told = dict(rows)
    assert told["node"] == "0.1.0, up 1 h 2 min, 5 MiB of memory"
    assert (told["ready"], told["degraded"]) == ("yes", "the disk is full")
    assert told["reach"] == "relayed: no dial-back came"
    assert told["peers"] == "2 connected, 5 known"
    assert told["bootstrap"] == "/ip4/9: refused"
    assert told["identity"] == "12D3y answers too"
    assert told["model"] == "fairy sha256-1 on cpu"
    assert told["room"] == "15 of 16 slots free, 0 waiting, 41.2 tok/s"
    assert told["backend"] == "vLLM at http://127.0.0.1:8000, it is down"
    assert told["answered"] == "9 requests, 2 failed, 1 running, 400 tokens made"
    assert told["training"] == "tales, training"
    assert line(STATUS) == (
        "ready, 2 connected, 5 known, fairy sha256-1 on cpu, "
        "9 requests, 2 failed, 1 running, 400 tokens made, tales, training"
    )


@pytest.mark.parametrize("told", [{}, {"peering": None, "model": {}}, {"readiness": {"reason": "draining"}}], ids=str)
def test_a_status_that_tells_little_is_borne(told: dict[str, Any]) -> None:
    assert dict(summary(told))["peers"] == "- connected, - known"
    assert line(told).startswith("not ready")


class Told:
    """A node that tells these, one a look, and then the operator presses Ctrl-C."""

    def __init__(self, *told: dict[str, Any]) -> None:
        self._told = iter(told)

    def get(self, path: str) -> dict[str, Any]:
        assert path == "/api/v1/status"
        told = next(self._told, None)
        if told is None:
            raise KeyboardInterrupt
        return told


def watched(monkeypatch: pytest.MonkeyPatch, screen: io.StringIO, *told: dict[str, Any], as_json: bool = False) -> str:
    monkeypatch.setattr("node.commands.status.LOOK_EVERY_S", 0.0)
    monkeypatch.setattr("sys.stdout", screen)
    client: Any = Told(*told)
    with pytest.raises(KeyboardInterrupt):
        status_command.follow(client, as_json=as_json)
    return screen.getvalue()


def test_watched_where_no_terminal_reads_it_is_a_line_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    down = {**STATUS, "readiness": {"ready": False, "reason": "draining"}}
    slower = {**STATUS, "node": {**STATUS["node"], "uptime_s": 9e6}}  # changes at each look
    rows = watched(monkeypatch, io.StringIO(), STATUS, slower, down, down).splitlines()
    assert [row.split(",")[0] for row in rows] == ["ready", "not ready (draining)"]
    rows = watched(monkeypatch, io.StringIO(), STATUS, slower, down, as_json=True).splitlines()
    assert [json.loads(row)["readiness"]["ready"] for row in rows] == [True, False]


def test_watched_on_a_terminal_one_table_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    raw = watched(monkeypatch, Screen(), STATUS, {**STATUS, "peering": {"connected": 77, "known": 78}})
    assert "77 connected" in raw
    assert "Ctrl-C ends" in raw
    assert raw.count("\x1b[?25l") == raw.count("\x1b[?25h")  # the cursor is shown again


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for a process")
async def test_watching_the_status_ends_with_ctrl_c(listening_to_ctrl_c: None) -> None:
    async with served() as node:
        words = ["status", "--watch", "--node", f"http://127.0.0.1:{node.port}"]
        process = subprocess.Popen(  # noqa: ASYNC220  # it returns at once
            [sys.executable, "-m", "node", *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        try:
            assert process.stdout is not None
            first = await trio.to_thread.run_sync(process.stdout.readline)
            assert first.startswith(b"ready, 1 connected")
            process.send_signal(signal.SIGINT)
            out, err = await trio.to_thread.run_sync(process.communicate)
        finally:
            process.kill()
        assert process.returncode == 130
        assert b"Traceback" not in out + err


# -- chat ------------------------------------------------------------------------------------------------------------


class Answers:
    """A node whose answers are these; a KeyboardInterrupt among the pieces is a Ctrl-C."""

    def __init__(self, *answers: list[Any]) -> None:
        self._answers = list(answers)
        self.bodies: list[dict[str, Any]] = []

    def get(self, path: str) -> dict[str, Any]:
        assert path == "/v1/models"
        return {"data": [{"id": "fairy", "kind": "causal"}, {"id": "org/enc", "kind": "encoder"}]}

    @contextmanager
    def stream(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Iterator[Any]:
        self.bodies.append(json.loads(json.dumps(body)))

        def events() -> Iterator[Event]:
            for piece in self._answers.pop(0):
                if not isinstance(piece, str):
                    raise piece
                yield Event("", {"choices": [{"delta": {"content": piece}}]})
            yield Event("", {"choices": [], "usage": {"completion_tokens": 2}})

        yield {"x-served-by": PEER, "x-model-revision": "sha256-1"}, events()


def talk(client: Any, **more: bool) -> _Talk:
    return _Talk(client=client, body={}, opening=[], **{"as_json": False, "quiet": False, **more})


def test_ctrl_c_stops_the_answer_and_not_the_chat(capsys: pytest.CaptureFixture[str]) -> None:
    node = Answers(["Once", " upon", KeyboardInterrupt()], ["fine"], [KeyboardInterrupt()])
    chat = talk(node)
    chat.turn("one")
    chat.turn("two")
    told = capsys.readouterr()
    assert told.out == "Once upon\nfine\n"
    assert told.err == f" [stopped]\n[{PEER}, sha256-1]\n[{PEER}, sha256-1, 2 tokens]\n"
    assert [turn["content"] for turn in node.bodies[1]["messages"]] == ["one", "Once upon", "two"]
    chat.turn("three")  # stopped before any text: taken back
    assert [turn["content"] for turn in chat.turns] == ["one", "Once upon", "two", "fine"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for a process")
async def test_ctrl_c_in_a_real_chat_frees_the_peer_and_the_chat_goes_on(listening_to_ctrl_c: None) -> None:
    async with served() as node:
        node.front.script = lambda work: endless() if len(node.front.works) == 1 else tale(["fine"])
        process = subprocess.Popen(  # noqa: ASYNC220  # it returns at once
            [sys.executable, "-m", "node", "chat", "--node", f"http://127.0.0.1:{node.port}"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"one\n")
            process.stdin.flush()
            assert await trio.to_thread.run_sync(process.stdout.read, 1) == b"x"
            process.send_signal(signal.SIGINT)
            await node.idle()
            out, err = await trio.to_thread.run_sync(process.communicate, b"two\n/quit\n")
        finally:
            process.kill()
        assert process.returncode == 0, err
        assert out.endswith(b"\nfine\n")
        assert b" [stopped]" in err
        assert b"Traceback" not in err
        assert node.front.cancelled == 1


def test_the_commands_of_a_chat(capsys: pytest.CaptureFixture[str]) -> None:
    node = Answers(["a"], ["b"])
    chat = talk(node, quiet=True)
    chat.turn("one")
    chat.command("/new")
    chat.command("/model fairy")
    chat.turn("two")
    assert node.bodies[1]["messages"] == [{"role": "user", "content": "two"}]
    assert node.bodies[1]["model"] == "fairy"
    for words, shown in (
        ("/help", HELP),
        ("/model", "  fairy (asked now)"),
        ("/model no-such", "nobody serves no-such"),
        ("/model org/enc", "nobody serves org/enc for chats"),
        ("/nonsense\x1b", "there is no /nonsense?; /help"),
    ):
        capsys.readouterr()
        chat.command(words)
        told = capsys.readouterr()
        assert shown in told.err
        assert told.out == ""
    assert chat.body["model"] == "fairy"


def test_a_chat_in_json_says_how_each_answer_ended(capsys: pytest.CaptureFixture[str]) -> None:
    chat = talk(Answers(["a"], ["b", KeyboardInterrupt()], ["c", CommandFailed("it died")]), as_json=True)
    for said in ("one", "two", "three"):
        chat.turn(said)
    rows = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    assert [(row["content"], row["end"]) for row in rows] == [("a", "complete"), ("b", "stopped"), ("c", "error")]
    assert rows[0]["served_by"] == PEER
    assert rows[2]["error"] == "it died"
    chat = talk(Answers(["a"], [CommandFailed("the prompt has 600 tokens", 2)]))
    chat.turn("one")
    chat.turn("two")
    assert capsys.readouterr().err.endswith("node: the prompt has 600 tokens\n/new forgets what was said\n")


def test_a_model_cannot_write_escape_sequences_to_the_terminal() -> None:
    assert spoken("a\x1b[31m\x07\r\n\tü🙂‍") == "a?[31m??\n\tü🙂‍"


def test_texts_of_an_empty_stream() -> None:
    assert list(texts(iter([Event("", {})]), {})) == []
    with pytest.raises(CommandFailed, match="--node"):
        NodeClient("ftp://x")


# -- completion ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_shell_completes_the_installed_name() -> None:
    code = "import sys; sys.argv[0] = 'bin/openagi-node'; from node.__main__ import main; main()"

    def run(*words: str, **variables: str) -> str:
        env = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
        done = subprocess.run([sys.executable, "-c", code, *words], env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    script = run("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "complete -o default -F _openagi_node_completion openagi-node" in script
    asked = {"_OPENAGI_NODE_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    assert run(COMP_WORDS="openagi-node st", **asked).split() == ["status"]
    assert "--bootstrap" in run(COMP_WORDS="openagi-node run --boot", **{**asked, "COMP_CWORD": "2"}).split()
