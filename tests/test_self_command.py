"""`python -m node self` against a served fake over a real memory, and against the memory's file alone."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import typer
from typer.testing import CliRunner, Result

from crypto.identity import Identity
from node.commands import itself as command
from node.commands.client import NODE_URL
from node.commands.itself import itself
from node.commands.plots import BLOCKS, plot
from node.config import KEY_FILE
from node.consciousness_fields import FIELDS
from node.store_look import MEMORY_FILE, look
from tests.fake_front import PEER
from tests.fake_self import FakeSelf, measured
from tests.store_world import IDENTITY, World, inference, note
from tests.test_commands import closed_url as closed_url
from tests.test_web_serve import served

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(itself)
SECRET = "the heron stands in the reeds"


def cli(*words: str, said: str | None = None) -> Result:
    return CliRunner().invoke(app, list(words), input=said)


class Node:
    """A served front whose memory is in a folder with a key."""

    def __init__(self, url: str, itself: FakeSelf) -> None:
        self.url = url
        self.itself = itself

    async def cli(self, *words: str, said: str | None = None) -> Result:
        return await trio.to_thread.run_sync(lambda: cli(*words, "--node", self.url, said=said))

    async def json(self, *words: str, code: int = 0) -> Any:
        result = await self.cli(*words, "--json")
        assert result.exit_code == code, result.output
        return json.loads(result.stdout)


@asynccontextmanager
async def node_of(folder: Path, *, with_memory: bool = True) -> AsyncIterator[Node]:
    itself = FakeSelf(folder).live()
    async with served() as node:
        node.front.itself = itself if with_memory else None
        yield Node(f"http://127.0.0.1:{node.port}", itself)
    itself.close()


async def test_the_state_is_shown_by_member_with_its_unit(tmp_path: Path) -> None:
    async with node_of(tmp_path) as node:
        node.itself.snapshot()
        result = await node.cli()
        assert result.exit_code == 0, result.output
        lines = {line.split("│")[1].strip(): line for line in result.stdout.splitlines() if line.count("│") == 4}
        assert "3.5" in lines["load.loop_lag_ms"]
        assert lines["load.loop_lag_ms"].split("│")[3].strip() == "ms"
        figures, _ = measured(node.itself)
        assert set(figures) <= set(lines)
        assert "now: run 3; a; running" in result.stdout
        assert "before the last stop: nothing is recorded" in result.stdout
        assert "not measured so far: identity.stop_reason" in result.stdout
        whole = await node.cli("--formulas")
        for row in FIELDS:
            assert row.path in whole.stdout
        assert "sum over 10 bins" in whole.stdout
        assert await node.json() == json.loads(json.dumps(node.itself.told()))


async def test_history_is_a_plot_and_numbers(tmp_path: Path) -> None:
    async with node_of(tmp_path) as node:
        node.itself.snapshot()
        result = await node.cli("--history", "load.loop_lag_ms", "--history", "identity.phase", "--n", "2")
        assert result.exit_code == 0, result.output
        assert "load.loop_lag_ms (ms), 2 snapshots from 2027-" in result.stdout
        assert "least 3.5, mean 3.5, most 3.5, last 3.5; measured in 2" in result.stdout
        assert "running" in result.stdout
        told = await node.json("--history", "surprise.nll_nats")
        assert told["figures"]["surprise.nll_nats"] == [4.5, 4.5]
        wrong = await node.cli("--history", "load.mood")
        assert (wrong.exit_code, "load.mood" in wrong.stderr) == (2, True)


async def test_notes_are_kept_recalled_and_forgotten_with_a_typed_word(tmp_path: Path) -> None:
    async with node_of(tmp_path) as node:
        made = await node.json("--note", SECRET, "--subject", "birds")
        assert "remembered as event" in (await node.cli("--note", "an oak grows")).stdout
        found = await node.cli("--recall", "heron")
        assert SECRET in found.stdout
        assert "1 event" in found.stdout
        assert [each["id"] for each in (await node.json("--recall", "heron"))["events"]] == [made["id"]]
        assert "likeness" in (await node.cli("--recall", "heron reeds", "--meaning")).stdout
        kinds = (await node.json("--recall", "", "--kind", "merge"))["events"]
        assert [each["kind"] for each in kinds] == ["merge"]
        assert "nothing is remembered that fits" in (await node.cli("--recall", "walrus")).stdout
        wrong = await node.cli("--forget", "birds", said="trees\n")
        assert (wrong.exit_code, "nothing was forgotten" in wrong.stderr) == (1, True)
        silent = await node.cli("--forget", "birds")
        assert silent.exit_code != 0
        program = await node.cli("--forget", "birds", "--json")
        assert (program.exit_code, "--yes" in program.stderr) == (2, True)
        assert (await node.json("--recall", "heron"))["events"]
        gone = await node.cli("--forget", "birds", said="birds\n")
        assert (gone.exit_code, "1 event of birds erased" in gone.stdout) == (0, True)
        assert await node.json("--forget", "birds", "--yes") == {"forgotten": 0}
        assert (await node.json("--recall", "heron"))["events"] == []


async def test_a_node_without_memory_is_one_sentence(tmp_path: Path) -> None:
    async with node_of(tmp_path, with_memory=False) as node:
        for words in ([], ["--verify"], ["--recall", "a"], ["--history", "load.loop_lag_ms"]):
            result = await node.cli(*words)
            assert result.exit_code == 2
            assert "keeps no memory (--no-memory)" in result.stderr


def test_one_thing_at_a_time(closed_url: str) -> None:
    two = cli("--verify", "--note", "a", "--node", closed_url)
    assert (two.exit_code, "--verify and --note" in two.stderr) == (2, True)
    folder = cli("--data-dir", "/tmp", "--node", closed_url)
    assert (folder.exit_code, "--data-dir is of --verify" in folder.stderr) == (2, True)
    assert cli("--node", closed_url).exit_code == 69


# --- the walk ---


def data_dir(folder: Path, fill: Callable[[World], None]) -> World:
    """A node's folder that no node holds: key and memory."""
    IDENTITY.save(folder / KEY_FILE)
    world = World(folder)
    fill(world)
    return world


def some(world: World) -> None:
    store = world.open()
    store.append([note(f"note {n}") for n in range(20)])
    store.close()


async def test_a_running_node_is_asked(tmp_path: Path) -> None:
    async with node_of(tmp_path) as node:
        result = await node.cli("--verify")
        assert result.exit_code == 0, result.output
        assert f"asked the running node at {node.url}" in result.stdout
        assert "whole: 5 events" in result.stdout
        assert (await node.json("--verify"))["by"] == "node"


async def test_a_walk_that_failed_after_its_answer_had_begun_is_a_failure(tmp_path: Path) -> None:
    async with node_of(tmp_path) as node:

        async def verify() -> dict[str, Any]:
            await trio.lowlevel.checkpoint()
            return {"error": {"message": "the memory is closed", "code": "not_ready", "retryable": True}}

        node.itself.verify = verify  # type: ignore[method-assign]
        result = await node.cli("--verify")
        assert (result.exit_code, "the memory is closed" in result.stderr) == (75, True)


def test_without_a_node_the_file_is_looked_at_and_nothing_changes(tmp_path: Path, closed_url: str) -> None:
    data_dir(tmp_path, some)
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    result = cli("--verify", "--data-dir", str(tmp_path), "--node", closed_url)
    assert result.exit_code == 0, result.output
    assert f"looked at the file {tmp_path / MEMORY_FILE} itself" in result.stdout
    assert "whole: 20 events, the last one 20, hash " in result.stdout
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before


def test_what_a_kill_left_in_the_log_is_read(tmp_path: Path, closed_url: str) -> None:
    (tmp_path / "running").mkdir()
    world = data_dir(tmp_path / "running", lambda world: None)
    store = world.open()
    store.append([note(f"note {n}") for n in range(20)])
    world.crashed(tmp_path / "killed")
    shutil.copy(tmp_path / "running" / KEY_FILE, tmp_path / "killed")
    store.close()
    assert (tmp_path / "killed" / "memory.db-wal").stat().st_size > 0
    before = {each.name for each in (tmp_path / "killed").iterdir()}
    result = cli("--verify", "--data-dir", str(tmp_path / "killed"), "--json", "--node", closed_url)
    told = json.loads(result.stdout)
    assert (told["is_whole"], told["events"], told["by"]) == (True, 20, "file")
    assert {each.name for each in (tmp_path / "killed").iterdir()} == before
    again = World(tmp_path / "killed").open()
    assert again.verify() is None
    again.close()


BROKEN: dict[str, tuple[str, str]] = {
    "a changed event": ("UPDATE events SET ts_ms = ts_ms + 1 WHERE id = 7", "event 7"),
    "a missing event": ("DELETE FROM events WHERE id = 7", "event 7"),
    "the end cut off": ("DELETE FROM events WHERE id > 15", "event 16"),
    "no signed head": ("DELETE FROM meta WHERE key = 'head'", "the file: the signed head"),
    "of another program": ("PRAGMA application_id = 7", "the file: it is of application 0x7"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_named(tmp_path: Path, closed_url: str, name: str) -> None:
    question, expected = BROKEN[name]
    data_dir(tmp_path, some).tamper(question)
    before = (tmp_path / MEMORY_FILE).read_bytes()
    result = cli("--verify", "--data-dir", str(tmp_path), "--node", closed_url)
    assert result.exit_code == 1, result.output
    assert f"NOT WHOLE: {expected}" in result.stdout
    assert (tmp_path / MEMORY_FILE).read_bytes() == before, "it is its node that moves it aside"


def test_one_flipped_byte_is_named(tmp_path: Path, closed_url: str) -> None:
    world = data_dir(tmp_path, some)
    raw = bytearray(world.path.read_bytes())
    at = raw.index(b"note 13")
    raw[at + 5] ^= 1
    world.path.write_bytes(bytes(raw))
    result = cli("--verify", "--data-dir", str(tmp_path), "--node", closed_url)
    assert (result.exit_code, "NOT WHOLE: event 14" in result.stdout) == (1, True)


def test_a_file_that_lost_its_log_is_behind_the_head_beside_it(tmp_path: Path, closed_url: str) -> None:
    world = data_dir(tmp_path, some)
    older = world.path.read_bytes()
    store = world.open()
    store.append([inference(subject=f"s{n}") for n in range(10)])
    store.close()
    world.path.write_bytes(older)
    result = cli("--verify", "--data-dir", str(tmp_path), "--node", closed_url)
    assert (result.exit_code, "NOT WHOLE: event 21" in result.stdout) == (1, True)


def test_a_kill_before_the_first_event_is_whole(tmp_path: Path, closed_url: str) -> None:
    data_dir(tmp_path, lambda world: world.path.touch())
    result = cli("--verify", "--data-dir", str(tmp_path), "--node", closed_url)
    assert (result.exit_code, "whole: 0 events" in result.stdout) == (0, True)


def test_a_folder_without_memory_or_key_says_so(tmp_path: Path, closed_url: str) -> None:
    bare = cli("--verify", "--data-dir", str(tmp_path), "--node", closed_url)
    assert (bare.exit_code, "there is no key" in bare.stderr) == (1, True)
    IDENTITY.save(tmp_path / KEY_FILE)
    empty = cli("--verify", "--data-dir", str(tmp_path), "--node", closed_url)
    assert (empty.exit_code, "there is no memory at" in empty.stderr) == (1, True)
    (tmp_path / KEY_FILE).chmod(0o644)
    assert cli("--verify", "--data-dir", str(tmp_path), "--node", closed_url).exit_code == 78


async def test_an_open_file_is_asked_of_its_own_node_alone(tmp_path: Path, closed_url: str) -> None:
    """SQLite's lock holds against other processes and other connections alike."""
    async with node_of(tmp_path) as node:
        IDENTITY.save(tmp_path / KEY_FILE)
        another = await node.cli("--verify", "--data-dir", str(tmp_path))
        assert another.exit_code == 75
        assert f"answers another node, {PEER}" in another.stderr
        nobody = await trio.to_thread.run_sync(
            lambda: cli("--verify", "--data-dir", str(tmp_path), "--node", closed_url)
        )
        assert (nobody.exit_code, "has the memory of" in nobody.stderr) == (75, True)


def test_the_usual_place_is_looked_at_when_no_node_answers_at_the_usual_address(
    tmp_path: Path, closed_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAGI_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(command, "NODE_URL", closed_url)
    empty = cli("--verify", "--node", closed_url)
    assert (empty.exit_code, "no node answers" in empty.stderr) == (69, True)
    data_dir(tmp_path, some)
    result = cli("--verify", "--node", closed_url)
    assert (result.exit_code, "looked at the file" in result.stdout) == (0, True)
    monkeypatch.setattr(command, "NODE_URL", NODE_URL)
    named = cli("--verify", "--node", closed_url)
    assert named.exit_code == 69, "a node that was named is not replaced by a file"


def test_another_peers_memory_is_not_this_ones(tmp_path: Path) -> None:
    world = data_dir(tmp_path, some)
    other = Identity(bytes(range(1, 33)))
    found = look(world.path, other.peer_id)
    assert found.fault is not None
    assert "another node" in found.fault.why


def test_a_look_holds_the_file_against_a_node_that_starts(tmp_path: Path) -> None:
    """So that what is walked is one state of it; the node says why it does not start."""
    world = data_dir(tmp_path, some)
    db = sqlite3.connect(f"{world.path.as_uri()}?mode=ro", uri=True, timeout=0, isolation_level=None)
    db.execute("BEGIN")
    db.execute("SELECT count(*) FROM events").fetchone()
    with pytest.raises(Exception, match="open in another process"):
        world.open()
    db.close()


# --- plots ---


def test_a_plot_shows_heights_and_gaps() -> None:
    assert plot([0, 1, 2, 3, 4, 5, 6, 7]) == BLOCKS
    assert plot([5, None, 5]) == "▅ ▅"
    assert plot([None, None]) == ""
    assert plot([]) == ""
    assert plot([0.0] * 50 + [1.0] * 50, columns=4) == "▁▁██"
    assert plot([0, 7], signs="01234567") == "07"
