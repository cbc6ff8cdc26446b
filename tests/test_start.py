"""node/start.py and node/__main__.py: what is imported when, exit codes, the lock on the data directory."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from node.errors import ConfigError, DataDirLocked
from node.start import EXIT_LOCKED, EXIT_USAGE, leaves, locked, start

HEAVY = "{'torch', 'transformers', 'libp2p', 'starlette', 'hypercorn', 'httpx', 'zeroconf'}"


def imported_by(statement: str, modules: str) -> str:
    """Which of `modules` a fresh interpreter holds after `statement`."""
    code = f"{statement}\nimport sys\nprint(sorted({modules} & set(sys.modules)))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
def test_the_command_line_is_read_before_anything_heavy_is_imported() -> None:
    assert imported_by("import node.__main__, node.start", HEAVY) == "[]"


@pytest.mark.slow
def test_a_node_without_a_model_imports_no_torch() -> None:
    everything = "import node.run, node.state, node.web.app, node.web.serve, p2p.host"
    assert imported_by(everything, "{'torch', 'transformers', 'tokenizers', 'safetensors', 'numpy'}") == "[]"


def test_a_directory_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path / "data"):
        with pytest.raises(DataDirLocked, match="--data-dir"), locked(tmp_path / "data"):
            pytest.fail("locked twice")
    with locked(tmp_path / "data"):
        pass


def test_a_directory_that_cannot_be_used_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot use the data directory"), locked(tmp_path / "file" / "data"):
        pytest.fail("a file is no directory")
    with pytest.raises(ConfigError, match="it is a file; choose one by --data-dir"), locked(tmp_path / "file"):
        pytest.fail("a file is no directory")


@pytest.mark.slow
def test_ctrl_c_among_the_imports_ends_it_without_a_traceback() -> None:
    code = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background has it ignored

class Stops:
    def find_spec(self, name, *_):
        if name == "node.commands.ask":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Stops())
sys.argv = ["node", "status"]
runpy.run_module("node", run_name="__main__")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, b"", b"")


def test_expected_failures_are_one_line_and_a_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start({"network": "NOT GOOD"}, None) == EXIT_USAGE
    with locked(tmp_path):
        assert start({"data_dir": tmp_path}, None) == EXIT_LOCKED
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("node: ") for line in lines)


def test_leaves_of_nested_groups() -> None:
    group = ExceptionGroup("", [ValueError("a"), ExceptionGroup("", [OSError("b")])])
    assert [str(leaf) for leaf in leaves(group)] == ["a", "b"]
