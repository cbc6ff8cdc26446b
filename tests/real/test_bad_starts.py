"""A start that cannot work ends in one sentence and the exit code of INTERFACES.md, and loses nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from crypto.identity import Identity
from node.commands.processes import Cluster
from node.config import KEY_FILE

pytestmark = [pytest.mark.real, pytest.mark.slow]


def run(tmp_path: Path, *flags: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a node that is expected to end by itself."""
    command = [sys.executable, "-m", "node", "run", "--data-dir", str(tmp_path / "data"), "--http", "127.0.0.1:0"]
    command += ["--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0", *flags]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **(environment or {})}
    )


def sentence(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


def test_wrong_config_key(tmp_path: Path) -> None:
    file = tmp_path / "app_config.json"
    file.write_text('{"modle": "default"}')
    sentence(run(tmp_path, "--config", str(file)), 2, "unknown key 'modle'", str(file))


def test_wrong_flag_and_wrong_environment(tmp_path: Path) -> None:
    sentence(run(tmp_path, "--no-such-flag"), 2, "--no-such-flag")
    sentence(run(tmp_path, environment={"OPENAGI_MODLE": "x"}), 2, "OPENAGI_MODLE")


def test_bad_bootstrap_file_names_the_entry(tmp_path: Path) -> None:
    file = tmp_path / "peers.json"
    file.write_text(json.dumps([{"addr": "/ip4/127.0.0.1/tcp/1", "note": "no peer id"}]))
    sentence(run(tmp_path, "--bootstrap-file", str(file), "--model", "none"), 2, str(file), "/p2p/")


def test_taken_http_port(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        sentence(run(tmp_path, "--http", f"127.0.0.1:{port}", "--model", "none"), 69, str(port))


def test_taken_listen_port(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        sentence(run(tmp_path, "--listen", f"/ip4/127.0.0.1/tcp/{port}", "--model", "none"), 69, str(port))


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    sentence(run(tmp_path, "--model", str(tmp_path / "absent")), 2, "absent")


def test_corrupt_safetensors(tmp_path: Path) -> None:
    from model.load import resolve

    source, broken = resolve("default").path, tmp_path / "broken"
    broken.mkdir()
    for file in source.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    before = weights.read_bytes()
    sentence(run(tmp_path, "--model", str(broken)), 2, "model.safetensors")
    assert weights.read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes")
def test_a_key_that_others_can_read(tmp_path: Path, cluster: Cluster) -> None:
    node = cluster.start("n", "--model", "none").wait_ready()
    node.stop()
    (key,) = (cluster.root / "n").glob("*.key")
    before = key.read_bytes()
    key.chmod(0o644)
    sentence(run(tmp_path, "--data-dir", str(cluster.root / "n")), 78, "chmod 600", str(key))
    assert key.read_bytes() == before


def test_a_damaged_key(tmp_path: Path) -> None:
    Identity.make().save(tmp_path / "data" / KEY_FILE)
    key = tmp_path / "data" / KEY_FILE
    whole = key.read_bytes()
    key.write_bytes(whole[:50])
    sentence(run(tmp_path, "--data-dir", str(tmp_path / "data"), "--model", "none"), 78, str(key), "damaged")
    assert key.read_bytes() == whole[:50]


def test_a_data_directory_in_use(tmp_path: Path, cluster: Cluster) -> None:
    node = cluster.start("n", "--model", "none").wait_ready()
    sentence(
        run(tmp_path, "--data-dir", str(cluster.root / "n"), "--model", "none"), 75, str(node.process.pid), "--data-dir"
    )
    assert node.process.poll() is None


def test_no_bootstrap_peer_answers_and_the_node_serves_alone(cluster: Cluster) -> None:
    import httpx

    from tests.real.conftest import eventually

    gone = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWGRUfU3DkBGKJFzBEn7bRPaXUbFbbZiyAEJYdM7Pf3sJQ"
    node = cluster.start("n", "--model", "none", "--bootstrap", gone).wait_ready()

    def told() -> bool:
        status = httpx.get(f"{node.url}/api/v1/status", timeout=30).json()
        return gone in json.dumps(status["peering"]) and "refused" in json.dumps(status["peering"])

    eventually("status names the bootstrap peer and why it failed", told)
