"""The commands against a real port and a fake front, and without any node at all."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import typer
from rich.console import Console
from typer.testing import CliRunner, Result

from crypto.identity import Identity, PeerId
from node.commands import checks, doctor
from node.commands.ask import ask
from node.commands.chat import chat
from node.commands.checks import Verdict
from node.commands.client import NodeClient
from node.commands.keys import keys
from node.commands.peers import brief_of, peers
from node.commands.status import status
from node.commands.tables import flattened, printable, table_of
from node.config import KEY_FILE
from node.errors import NoRoom, PeerFailed
from node.front import Readiness
from p2p.peering_status import BootstrapResult, RefusalRow
from tests.fake_front import PEER, Step, started, tale
from tests.test_web_serve import Served, served

app = typer.Typer(pretty_exceptions_enable=False)
for command in (ask, chat, doctor.doctor, peers, status):
    app.command()(command)
app.add_typer(keys, name="keys")

ROOT = Path(__file__).parent.parent


def cli(*words: str, said: str | None = None) -> Result:
    return CliRunner().invoke(app, list(words), input=said)


async def with_node(
    *words: str, script: Callable[[Any], list[Step]] | None = None, said: str | None = None
) -> tuple[Result, Served]:
    """Run one command against a served fake."""
    async with served() as node:
        if script is not None:
            node.front.script = script
        url = f"http://127.0.0.1:{node.port}"
        return await trio.to_thread.run_sync(lambda: cli(*words, "--node", url, said=said)), node


@pytest.fixture
def closed_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


async def test_ask_prints_the_answer_alone_on_stdout() -> None:
    result, node = await with_node("ask", "Once", "--max-tokens", "9", "--seed", "4", "--temperature", "0")
    assert result.exit_code == 0, result.output
    assert result.stdout == "Once upon a time\n"
    assert PEER in result.stderr
    assert "4 tokens" in result.stderr
    [work] = node.front.works
    assert (work.text, work.sampling.max_tokens, work.sampling.seed, work.sampling.temperature) == ("Once", 9, 4, 0.0)


async def test_ask_through_the_chat_template_from_stdin() -> None:
    result, node = await with_node("ask", "-", "--chat", "-q", "--route", "remote", "--peer", PEER, said="hello\n")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Once upon a time\n", "")
    [work] = node.front.works
    assert work.messages is not None
    assert work.messages[0].content == "hello\n"
    assert node.front.hints[0].peer == PEER


async def test_ask_as_json() -> None:
    result, _ = await with_node("ask", "Once", "--json")
    assert json.loads(result.stdout)["choices"][0]["text"] == "Once upon a time"


@pytest.mark.parametrize(
    ("steps", "code", "words"),
    [
        ([NoRoom("every peer is full")], 75, "every peer is full"),
        ([started(), 0.05, *tale(["x"])[1:-1], 0.05, PeerFailed("it died")], 75, "it died"),
    ],
)
async def test_ask_tells_a_failure_in_one_line(steps: list[Step], code: int, words: str) -> None:
    result, _ = await with_node("ask", "Once", script=lambda work: steps)
    assert result.exit_code == code
    assert result.stderr.strip() == f"node: {words}"


async def test_ask_for_an_unknown_model_is_a_usage_error() -> None:
    result, _ = await with_node("ask", "Once", "--model", "no-such")
    assert result.exit_code == 2
    assert "no-such" in result.stderr


@pytest.mark.parametrize("words", [["ask", "x"], ["chat"], ["status"], ["peers"]])
def test_without_a_node_every_command_says_what_to_do(words: list[str], closed_url: str) -> None:
    result = cli(*words, "--node", closed_url)
    assert result.exit_code == 69
    assert result.stderr.count("\n") == 1
    assert "python -m node" in result.stderr


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://127.0.0.1:0", "http://127.0.0.1:99999", ""])
def test_a_bad_address_is_a_usage_error(url: str) -> None:
    result = cli("status", "--node", url)
    assert result.exit_code == 2, result.output
    assert "--node" in result.stderr


def test_an_empty_prompt_is_a_usage_error(closed_url: str) -> None:
    assert cli("ask", "", "--node", closed_url).exit_code == 2


async def test_chat_keeps_the_turns_and_takes_back_the_failed() -> None:
    count = 0

    def script(work: Any) -> list[Step]:
        nonlocal count
        count += 1
        return [NoRoom("full")] if count == 2 else tale([f"answer {count}"])

    result, node = await with_node("chat", "--system", "be brief", script=script, said="one\ntwo\nthree\n/quit\nfour\n")
    assert result.exit_code == 0, result.output
    assert result.stdout == "answer 1\n\nanswer 3\n"
    last = node.front.works[-1].messages
    assert last is not None
    assert [(m.role, m.content) for m in last] == [
        ("system", "be brief"),
        ("user", "one"),
        ("assistant", "answer 1"),
        ("user", "three"),
    ]


async def test_status_and_peers_tell_what_the_node_told() -> None:
    result, _ = await with_node("status")
    assert result.exit_code == 0, result.output
    assert PEER in result.stdout
    result, _ = await with_node("status", "--json")
    assert json.loads(result.stdout)["node"]["network"] == "main"
    result, _ = await with_node("peers")
    assert PEER in result.stdout
    assert "1.25" in result.stdout


def test_peers_have_room_in_80_columns() -> None:
    models = [{"name": "default", "revision": "sha256-bad3466530cb"}, {"name": "qwen", "revision": "hub-0123456789ab"}]
    offer = {"models": models, "slots_free": 16, "decode_tok_s": 243.5}
    rows = [
        {"peer_id": PEER, "connected": True, "relayed": False, "rtt_ms": 13.04, **offer},
        {"peer_id": PEER[:-1] + "x", "connected": True, "relayed": True, "rtt_ms": 1234.5},
        {"peer_id": PEER[:-1] + "y", "connected": False},
    ]
    columns, cells = brief_of(rows)
    printed = io.StringIO()
    Console(file=printed, width=80).print(table_of("3 peers", columns, cells))
    lines = printed.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) == 1 + 3 + 4 + 1 + 1 + 1  # no row takes more lines than its models do
    assert [cell[1] for cell in cells] == ["direct", "relay", "none"]
    assert f"12D3…{PEER[-6:]}" in printed.getvalue()


def test_a_base_url_of_an_sdk_is_an_address_too(closed_url: str) -> None:
    with NodeClient(closed_url + "/v1/") as client:
        assert client.url == closed_url


def test_a_peer_cannot_write_to_the_terminal() -> None:
    assert printable("a\x1b[31m\x07\u202eb") == "a?[31m??b"
    assert dict(flattened({"a": {"b": [1, 2], "c": None}, "d": [{"e": True}]})) == {
        "a.b": "1, 2",
        "a.c": "-",
        "d.0.e": "yes",
    }


# -- keys ------------------------------------------------------------------------------------------------------------


def test_keys_show_export_rotate(tmp_path: Path) -> None:
    folder = tmp_path / "node"
    assert "no key" in cli("keys", "identity", "show", "--data-dir", str(folder)).stderr
    own = Identity.make()
    own.save(folder / KEY_FILE)
    result = cli("keys", "identity", "show", "--data-dir", str(folder))
    assert own.peer_id in result.stdout
    assert own.seed.hex() not in result.output
    copy = tmp_path / "copy.key"
    result = cli("keys", "identity", "export", str(copy), "--data-dir", str(folder))
    assert result.exit_code == 0, result.output
    assert own.seed.hex() not in result.output
    assert Identity.load(copy).peer_id == own.peer_id
    assert cli("keys", "identity", "export", str(copy), "--data-dir", str(folder)).exit_code == 1
    assert cli("keys", "identity", "rotate", "--data-dir", str(folder), said="n\n").exit_code == 1
    assert Identity.load(folder / KEY_FILE).peer_id == own.peer_id
    result = cli("keys", "identity", "rotate", "--data-dir", str(folder), "--yes")
    assert result.exit_code == 0, result.output
    fresh = Identity.load(folder / KEY_FILE)
    assert fresh.peer_id != own.peer_id
    [kept] = folder.glob(f"{KEY_FILE}.*")
    assert Identity.load(kept).peer_id == own.peer_id


def test_keys_are_not_rotated_under_a_running_node(tmp_path: Path) -> None:
    from node.start import locked

    own = Identity.make()
    own.save(tmp_path / KEY_FILE)
    with locked(tmp_path):
        result = cli("keys", "identity", "rotate", "--data-dir", str(tmp_path), "--yes")
    assert result.exit_code == 75
    assert Identity.load(tmp_path / KEY_FILE).peer_id == own.peer_id


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no mode bits")
def test_keys_that_others_may_read_are_refused(tmp_path: Path) -> None:
    Identity.make().save(tmp_path / KEY_FILE)
    (tmp_path / KEY_FILE).chmod(0o644)
    result = cli("keys", "identity", "show", "--data-dir", str(tmp_path))
    assert result.exit_code == 78
    assert "chmod 600" in result.stderr


# -- doctor ----------------------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "node": {"peer_id": PEER},
    "peering": {"connected": 2, "known": 5, "bootstrap": [], "refusals": [], "duplicate": None},
    "readiness": {"ready": True, "reason": "", "loading": False},
}


def told(**peering: object) -> list[checks.Check]:
    return list(doctor.status_checks({**GOOD, "peering": {**GOOD["peering"], **peering}}))


def found(lines: list[checks.Check], name: str) -> checks.Check:
    [line] = [line for line in lines if line.name == name]
    return line


def test_doctor_finds_nothing_wrong_with_a_good_node() -> None:
    assert {line.verdict for line in told()} == {Verdict.OK}


def bootstrapped(state: str, reason: str = "") -> object:
    result = BootstrapResult(address=f"/{state}", note="", state=state, reason=reason, tries=1, tried_ago_s=1.0)
    return msgspec.to_builtins(result)


def test_doctor_repeats_what_the_node_says_of_its_peers() -> None:
    refusal = RefusalRow(peer=PeerId("12D3KooWother"), reason="other network 'lab'", address="/ip4/1", ago_s=2.0)
    lines = told(
        connected=0,
        bootstrap=[bootstrapped("connected"), bootstrapped("failed", "connection refused"), bootstrapped("this node")],
        refusals=[msgspec.to_builtins(refusal)],
        duplicate="12D3KooWtwin answers at 10.0.0.7",
        mdns="no multicast here",
    )
    assert {line.name for line in lines if line.verdict is Verdict.LOOK} == {
        "peers",
        "bootstrap peer",
        "refused peer",
        "mDNS",
    }
    assert found(lines, "bootstrap peer").found == "/failed: connection refused"
    assert "other network" in found(lines, "refused peer").found
    assert found(lines, "identity").verdict is Verdict.BAD


@pytest.mark.parametrize(
    ("readiness", "verdict"),
    [
        ({"ready": False, "reason": "loading", "loading": True}, Verdict.LOOK),
        ({"ready": False, "reason": "draining", "loading": False}, Verdict.BAD),
    ],
)
def test_doctor_tells_readiness(readiness: dict[str, Any], verdict: Verdict) -> None:
    assert found(list(doctor.status_checks({**GOOD, "readiness": readiness})), "readiness").verdict is verdict


def test_doctor_tells_how_linear_layers_are_computed() -> None:
    linears = {"kind": "int8", "told": "int8; not measured", "problem": ""}
    line = found(list(doctor.status_checks({**GOOD, "model": {"linears": linears}})), "linear layers")
    assert (line.verdict, line.found) == (Verdict.OK, "int8; not measured")
    linears = {"kind": "plain", "told": "plain: it failed", "problem": "it failed"}
    line = found(list(doctor.status_checks({**GOOD, "model": {"linears": linears}})), "linear layers")
    assert (line.verdict, line.found) == (Verdict.LOOK, "plain: it failed")
    assert "--dtype" in line.advice


@pytest.mark.parametrize(
    ("verdict", "advice", "expected"),
    [
        ("public", "", Verdict.OK),
        ("local", "", Verdict.OK),
        ("unknown", "", Verdict.OK),
        ("relayed", "", Verdict.LOOK),
        ("unreachable", "forward its TCP port in the router", Verdict.BAD),
    ],
)
def test_doctor_tells_whether_others_reach_the_node(verdict: str, advice: str, expected: Verdict) -> None:
    reach = {"verdict": verdict, "reason": "IPv4: 0 of 2 reached 11.0.3.1", "advice": advice}
    line = found(list(doctor.status_checks({**GOOD, "reach": reach})), "reachable")
    assert line.verdict is expected
    assert line.found == f"{verdict}: IPv4: 0 of 2 reached 11.0.3.1"
    assert ("forward its TCP port" in line.advice) == (expected is not Verdict.OK)


@pytest.mark.parametrize("nonsense", [{}, {"peering": None}, {"peering": {"bootstrap": "x", "refusals": 5}}])
def test_doctor_bears_a_status_it_does_not_know(nonsense: dict[str, Any]) -> None:
    assert list(doctor.status_checks(nonsense))


def test_doctor_checks_the_clock(tmp_path: Path) -> None:
    assert checks.check_clock(tmp_path, time.time()).verdict is Verdict.OK
    assert checks.check_clock(tmp_path, 0.0).verdict is Verdict.BAD
    assert checks.check_clock(tmp_path, 1e11).verdict is Verdict.BAD
    (tmp_path / "book.json").write_text("{}")
    os.utime(tmp_path / "book.json", (time.time() + 7200,) * 2)
    assert "120 min newer" in checks.check_clock(tmp_path, time.time()).found


def test_doctor_checks_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = checks.check_port("HTTP port", "127.0.0.1", port)
        assert line.verdict is Verdict.BAD
        assert "--http" in line.advice
    assert checks.check_port("HTTP port", "127.0.0.1", port).verdict is Verdict.OK


def test_doctor_checks_files(tmp_path: Path) -> None:
    from node.start import locked

    assert checks.check_data_dir(tmp_path / "new").verdict is Verdict.OK
    with locked(tmp_path):
        assert checks.check_data_dir(tmp_path).found.startswith("in use")
    assert checks.check_data_dir(tmp_path).found.endswith("no node runs on it")
    file = tmp_path / "file"
    file.write_text("[{}]")
    assert checks.check_data_dir(file).verdict is Verdict.BAD
    assert checks.check_bootstrap(file).verdict is Verdict.BAD
    assert checks.check_bootstrap(None).verdict is Verdict.OK
    file.write_text("[]")
    assert checks.check_bootstrap(file).verdict is Verdict.OK
    assert checks.check_key(tmp_path / KEY_FILE).verdict is Verdict.OK
    (tmp_path / KEY_FILE).write_text("junk")
    (tmp_path / KEY_FILE).chmod(0o600)
    assert checks.check_key(tmp_path / KEY_FILE).verdict is Verdict.BAD
    assert checks.check_model("model", "none").verdict is Verdict.OK
    assert checks.check_model("model", "org/name").verdict is Verdict.OK
    assert checks.check_model("model", "all-MiniLM-L6-v2").verdict is Verdict.OK
    assert checks.check_model("model", "defalt").verdict is Verdict.BAD  # as a start says
    assert checks.check_model("model", "/no/such/place").verdict is Verdict.BAD
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "model.safetensors").write_bytes(b"junk")
    assert checks.check_model("model", str(model)).verdict is Verdict.BAD


@pytest.fixture
def settings_file(tmp_path: Path) -> list[str]:
    (tmp_path / "peers.json").write_text("[]")
    file = tmp_path / "config.json"
    chosen = {"data_dir": str(tmp_path / "node"), "http": "127.0.0.1:0", "model": "none", "mdns": False}
    file.write_text(json.dumps({**chosen, "bootstrap_file": str(tmp_path / "peers.json")}))
    return ["--config", str(file)]


def test_doctor_without_a_node(settings_file: list[str], closed_url: str) -> None:
    result = cli("doctor", *settings_file)
    assert result.exit_code == 0, result.output
    assert "identity key" in result.stdout
    result = cli("doctor", *settings_file, "--json", "--node", closed_url)
    assert result.exit_code == 1
    rows = {row["check"]: row for row in json.loads(result.stdout)["checks"]}
    assert rows["running node"]["verdict"] == "bad"


async def test_doctor_with_a_node(settings_file: list[str]) -> None:
    result, _ = await with_node("doctor", *settings_file)
    assert result.exit_code == 0, result.output
    async with served() as node:
        node.front.ready = Readiness(ready=False, reason="draining")
        url = f"http://127.0.0.1:{node.port}"
        result = await trio.to_thread.run_sync(lambda: cli("doctor", *settings_file, "--node", url))
        assert result.exit_code == 1
        assert "draining" in result.stdout


def test_doctor_names_a_bad_setting(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"modle": "x"}')
    result = cli("doctor", "--config", str(tmp_path / "config.json"))
    assert result.exit_code == 2
    assert "modle" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("words", [["status", "--help"], ["status", "--node", "http://127.0.0.1:9"]])
def test_light_commands_import_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['node', *{words!r}]\n"
        "try:\n    runpy.run_module('node', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'libp2p', 'starlette', 'hypercorn', 'zeroconf'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


async def test_a_key_of_the_environment_is_sent_and_is_no_setting_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAGI_API_KEY", "oa_0123456789ab." + "A" * 43)
    result, node = await with_node("ask", "Once")
    assert (result.exit_code, node.front.works) == (2, [])
    assert "is none of this node's" in result.stderr
    monkeypatch.setenv("OPENAGI_API_KEY", "a\nb")
    result, _ = await with_node("ask", "Once")
    assert (result.exit_code, "is no key" in result.stderr) == (2, True)
