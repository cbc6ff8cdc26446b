"""`python -m node train ...` against a real port and a fake node: what it asks for, what it prints, how it ends."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import typer
from typer.testing import CliRunner, Result

from node.commands.train import train
from node.commands.train_watch import line, watch
from node.errors import BadRequest, NotReady
from node.training_wish import Begin, Join, Privacy
from tests.fake_front import PEER
from tests.test_web_serve import Served, served

app = typer.Typer(pretty_exceptions_enable=False)
app.add_typer(train, name="train")
ROOT = Path(__file__).parent.parent
OTHER = "12D3KooWOtherOtherOtherOtherOtherOtherOtherOtherOthe"
RUN: dict[str, Any] = {
    "state": "training",
    "why": "",
    "problem": "",
    "paused": False,
    "wanted": {"run": "tales", "data": ["/texts"]},
    "run": {
        "name": "tales", "id": "ab" * 32, "model": "default", "started_from": "sha256-0123456789ab",
        "parameters": 5_475_584, "codec": "int4", "rule": "adaptive", "outer_rate": 1.0, "steps": 20,
        "tokens_a_round": 20_480, "rate": 3e-4, "private": False, "update_bytes_max": 2_909_416,
        "state_bytes": 21_902_336,
    },
    "round": 12,
    "revision": "tales-r12-0123456789ab",
    "phase": "working",
    "view": 0,
    "step": 3,
    "loss": 6.6791,
    "held_out_loss": None,
    "work": {"steps": 243, "tokens": 248_832, "skipped": 0, "late": 1, "ahead": 0},
    "members": [
        {"peer_id": PEER, "votes": True, "proven": True, "rounds_missed": 0, "connected": True,
         "here_this_round": False},
        {"peer_id": OTHER, "votes": False, "proven": False, "rounds_missed": 1, "connected": False,
         "here_this_round": False},
    ],
    "refused": {OTHER: "an element is not a number\x1b[31m"},
    "round_s": 3.1,
    "round_s_median": 9.4,
    "rounds": [
        {"round": number, "revision": f"tales-r{number + 1}-x", "contributed": [PEER], "sat_out": [],
         "missing": [OTHER] if number == 11 else [], "not_counted": {OTHER: "on probation"} if number == 10 else {},
         "rule": "weighted", "why": "", "moved": 0.5, "seconds": 9.44, "held_out_loss": 6.5 if number < 11 else None}
        for number in range(12)
    ],
    "counts": {},
    "drops": {},
}  # fmt: skip


def cli(*words: str) -> Result:
    return CliRunner().invoke(app, ["train", *words])


async def with_node(*words: str, tells: dict[str, Any] | None = None, fails: Any = None) -> tuple[Result, Served]:
    async with served() as node:
        node.front.trains.fails = fails
        if tells is not None:
            node.front.trains.tells = tells
        url = f"http://127.0.0.1:{node.port}"
        return await trio.to_thread.run_sync(lambda: cli(*words, "--node", url)), node


def row(result: Result, name: str) -> str:
    """The line of a table that begins with this."""
    [line] = [line for line in result.stdout.splitlines() if line.startswith(f"│ {name} ")]
    return line


async def test_start_says_how_others_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result, node = await with_node("start", "tales", "--data", "texts", "--data", "/more")
    assert result.exit_code == 0, result.output
    assert result.stdout == (
        "run tales has begun; others join by: python -m node train join tales --data THEIR_TEXT\n"
        f"its id is {'ab' * 32}\n"
    )
    assert node.front.trains.said == [Begin(name="tales", data=(f"{tmp_path}/texts", "/more"))]


async def test_start_passes_on_what_was_asked_for() -> None:
    flags = (
        f"--founder {PEER} --founder {OTHER} --member {PEER} --steps 5 --rows 1 --context 64 --accumulation 2"
        " --rate 0.001 --codec int8 --rule mean --probation 9 --lora-rank 4 --epsilon 8 --delta 1e-5"
    ).split()
    result, node = await with_node("start", "tales", "--data", "/x", *flags)
    assert result.exit_code == 0, result.output
    assert node.front.trains.said == [
        Begin(name="tales", data=("/x",), founders=(PEER, OTHER), members=(PEER,), steps=5, rows=1, context=64,
              accumulation=2, rate=0.001, codec="int8", rule="mean", probation=9, lora_rank=4,
              privacy=Privacy(epsilon=8.0, delta=1e-5))
    ]  # fmt: skip


async def test_the_other_words() -> None:
    for words, said, printed in (
        (["join", "tales", "--data", "/x"], Join(run="tales", data=("/x",)), "joining tales"),
        (["pause"], "pause", "train resume"),
        (["resume"], "resume", "goes on"),
        (["leave"], "leave", "leaving"),
    ):
        result, node = await with_node(*words)
        assert (result.exit_code, result.stderr) == (0, "")
        assert printed in result.stdout
        assert node.front.trains.said == [said]


@pytest.mark.parametrize("words", [["start", "t"], ["join", "t"], ["start", "--data", "/x"], ["begin"], []], ids=str)
def test_what_is_missing_is_a_usage_error(words: list[str]) -> None:
    assert cli(*words).exit_code == 2


@pytest.mark.parametrize(
    ("fails", "code"),
    [(BadRequest("this node is in no run"), 2), (NotReady("the model is loading"), 75)],
    ids=["2", "75"],
)
async def test_what_the_node_refuses_is_one_line(fails: Any, code: int) -> None:
    for words in (["start", "t", "--data", "/x"], ["join", "t", "--data", "/x"], ["pause"], ["resume"], ["leave"]):
        result, _ = await with_node(*words, fails=fails)
        assert (result.exit_code, result.stdout, result.stderr) == (code, "", f"node: {fails.message}\n")


async def test_a_name_that_cannot_be_is_named() -> None:
    result, _ = await with_node("start", "Tales of Old", "--data", "/x")
    assert result.exit_code == 2
    assert result.stderr.startswith("node: the field name does not fit: ")


@pytest.mark.parametrize("word", ["status", "pause", "leave"])
def test_without_a_node_it_says_what_to_do(word: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        result = cli(word, "--node", f"http://127.0.0.1:{probe.getsockname()[1]}")
    assert result.exit_code == 69
    assert result.stderr.count("\n") == 1


async def test_status_of_a_node_that_is_in_no_run() -> None:
    result, _ = await with_node("status")
    assert result.exit_code == 0, result.output
    assert "idle" in row(result, "state")
    assert "members" not in result.stdout


async def test_status_shows_the_run_its_members_and_its_last_rounds() -> None:
    result, _ = await with_node("status", tells=RUN)
    assert result.exit_code == 0, result.output
    assert "tales (abababababababab)" in row(result, "run")
    assert "default sha256-0123456789ab, 5,475,584 parameters" in row(result, "from")
    assert "12, step 3 of 20" in row(result, "round")
    assert "tales-r12-0123456789ab" in row(result, "serving")
    assert "6.679 in training, - held out" in row(result, "loss")
    assert "at most 2.91 MB a round" in row(result, "update")
    assert "243 steps, 248,832 tokens" in row(result, "trained here")
    rows = result.stdout.splitlines()
    [own] = [line for line in rows if PEER in line]
    assert own.split("│")[2:6] == [" yes   ", " yes    ", " 0      ", " yes       "]
    [refused] = [line for line in rows if "an element is not a number" in line]
    assert OTHER in refused
    assert "\x1b" not in result.stdout
    told = [line.split("│")[1].strip() for line in rows if "weighted" in line]
    assert told == [str(number) for number in range(2, 12)]  # the newest
    assert OTHER[-6:] in rows[-2]  # it was missing in the last one
    assert OTHER[-6:] in rows[-3]  # and not counted in the one before


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"state": "waiting", "why": "until the round ends"}, "waiting: until the round ends"),
        ({"state": "training", "paused": True}, "training, to be paused"),
        ({"state": "training", "why": "ahead of the round"}, "training: ahead of the round"),
        ({"state": "paused", "why": "paused by the operator", "paused": True}, "paused: paused by the operator"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
async def test_the_state_is_said_with_its_reason(changes: dict[str, Any], shown: str) -> None:
    result, _ = await with_node("status", tells={**RUN, **changes})
    assert f"│ {shown}  " in row(result, "state")


async def test_steps_ahead_are_shown_while_there_are_some() -> None:
    result, _ = await with_node("status", tells=RUN)
    assert "next round" not in row(result, "trained here")
    result, _ = await with_node("status", tells={**RUN, "work": {**RUN["work"], "ahead": 40}})
    assert "248,832 tokens; 40 of the steps are for the next round" in row(result, "trained here")


async def test_a_problem_is_shown_though_there_is_no_run() -> None:
    stopped = {**RUN, "state": "stopped", "run": None, "problem": "the weights cannot be kept in /x: No space left"}
    result, _ = await with_node("status", tells=stopped)
    assert "No space left" in row(result, "problem")


async def test_a_run_without_rounds_has_no_table_of_them() -> None:
    result, _ = await with_node("status", tells={**RUN, "rounds": []})
    assert result.exit_code == 0, result.output
    assert "contributed" not in result.stdout


async def test_status_as_json_is_what_the_node_told() -> None:
    result, _ = await with_node("status", "--json", tells=RUN)
    assert json.loads(result.stdout) == RUN


class Told:
    """A node that tells these, one a look, and then the operator presses Ctrl-C."""

    def __init__(self, *told: dict[str, Any]) -> None:
        self._told = iter(told)

    def get(self, path: str) -> dict[str, Any]:
        assert path == "/api/v1/training"
        told = next(self._told, None)
        if told is None:
            raise KeyboardInterrupt
        return told


class Screen(io.StringIO):
    """A terminal of so many columns."""

    columns = 100

    def isatty(self) -> bool:
        return True


def watched(monkeypatch: pytest.MonkeyPatch, screen: io.StringIO, *told: dict[str, Any], as_json: bool = False) -> str:
    columns = getattr(screen, "columns", 80)
    monkeypatch.setattr("node.commands.train_watch.LOOK_EVERY_S", 0.0)
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((columns, 24)))
    with pytest.raises(KeyboardInterrupt):
        watch(Told(*told), as_json=as_json)  # type: ignore[arg-type]  # a node without a port
    return screen.getvalue()


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, "tales round 12 [###-----------------] step 3 of 20, loss 6.679, held out -, about 6 s left, training"),
        (
            {"step": 20, "round_s": 9.4},
            "[####################] step 20 of 20, loss 6.679, held out -, longer than the usual 9 s, ",
        ),
        (
            {"step": 0, "loss": None, "round_s_median": None},
            "[--------------------] step 0 of 20, loss -, held out -, tr",
        ),
        ({"state": "paused", "why": "by the\x1b[31m operator"}, "left, paused: by the?[31m operator"),
        ({"run": None, "wanted": None, "state": "idle"}, "in no run, idle"),
        ({"run": None, "state": "seeking", "why": "no peer"}, "tales, seeking: no peer"),
        ({"run": None, "state": "stopped", "problem": "No space left"}, "tales, stopped, No space left"),
    ],
    ids=str,
)
def test_the_line_of_a_run(changes: dict[str, Any], shown: str) -> None:
    assert shown in line({**RUN, **changes})


def test_on_a_terminal_one_line_is_written_over_and_never_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    told = [{**RUN, "why": "x" * 500}, {**RUN, "step": 4}, {**RUN, "run": None, "state": "idle", "wanted": None}]
    raw = watched(monkeypatch, Screen(), *told)
    assert raw.count("\n") == 1  # at the end, so that the prompt stands by itself
    assert raw.endswith("\n")
    first, second, third = raw.removesuffix("\n").split("\r")[1:]
    assert len(first) == Screen.columns - 1
    assert "step 4 of 20" in second
    assert third.rstrip() == "in no run, idle"
    assert len(third) == len(second.rstrip()) <= len(first)  # what stood there is gone


def test_elsewhere_it_is_a_line_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    told = [RUN, {**RUN, "loss": 6.5, "round_s": 4.0}, {**RUN, "step": 4}, {**RUN, "step": 4, "paused": True}]
    told += [{**RUN, "step": 4, "state": "paused"}, {**RUN, "step": 4, "state": "paused"}, {**RUN, "round": 13}]
    lines = watched(monkeypatch, io.StringIO(), *told).splitlines()
    assert [each.split("] ")[1].split(",")[0] for each in lines] == [
        "step 3 of 20", "step 4 of 20", "step 4 of 20", "step 3 of 20",
    ]  # fmt: skip
    rows = watched(monkeypatch, Screen(), *told, as_json=True).splitlines()
    assert [json.loads(each)["step"] for each in rows] == [3, 4, 4, 3]


@pytest.fixture
def listening_to_ctrl_c() -> Iterator[None]:
    """A shell starts what it puts into the background with SIGINT ignored, and so would all that the tests start: the
    watch would not hear it, and end with 69 when the served node does."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for a process")
async def test_watching_ends_with_ctrl_c_and_no_traceback(listening_to_ctrl_c: None) -> None:
    async with served() as node:
        node.front.trains.tells = RUN
        url = f"http://127.0.0.1:{node.port}"
        process = subprocess.Popen(  # noqa: ASYNC220  # it returns at once
            [sys.executable, "-m", "node", "train", "status", "--watch", "--node", url],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        try:
            assert process.stdout is not None
            first = await trio.to_thread.run_sync(process.stdout.readline)
            assert first.startswith(b"tales round 12 [###")
            process.send_signal(signal.SIGINT)
            out, err = await trio.to_thread.run_sync(process.communicate)
        finally:
            process.kill()
        assert process.returncode == 130
        assert b"Traceback" not in out + err
