"""Disks that are full, read-only or damaged under a real node: it serves, says so, and recovers by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from node.commands.processes import Cluster, NodeProcess
from tests.real.conftest import PATIENCE_S, eventually
from tests.real.test_stop import state_loads

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="tmpfs")]
DISK_KIB = 256


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_KIB}k", "tmpfs", str(place)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as exc:
        pytest.skip(f"a small disk of its own (mount -t tmpfs) needs root here: {exc}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path) -> Path:
    """Take all the room there is."""
    ballast = place / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                pass
    return ballast


def told(node: NodeProcess) -> dict[str, Any]:
    disk: dict[str, Any] = httpx.get(f"{node.url}/api/v1/status", timeout=PATIENCE_S).json()["disk"]
    return disk


def degraded(node: NodeProcess) -> dict[str, str]:
    """What is degraded, and why."""
    return {row["what"]: row["reason"] for row in told(node)["degraded"]}


def serves(node: NodeProcess) -> None:
    body = {"model": "default", "prompt": "Once upon a time", "max_tokens": 8}
    answer = httpx.post(f"{node.url}/v1/completions", json=body, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    assert httpx.get(f"{node.url}/readyz", timeout=PATIENCE_S).status_code == 200


def test_a_full_and_a_read_only_disk_cost_no_request_and_are_said(cluster: Cluster, disk: Path) -> None:
    data = disk / "data"
    node = cluster.start("n", "--no-memory", "--data-dir", str(data)).wait_ready()
    assert degraded(node) == {}
    ballast = fill(disk)
    eventually("the full disk is told", lambda: degraded(node) == {"gossip state": "no_space"})
    serves(node)
    (row,) = told(node)["degraded"]
    assert "No space left on device" in row["sentence"]
    assert str(data / "gossip.json") in row["sentence"]
    assert "make room on that disk" in row["sentence"]
    assert row["since"].endswith("Z")
    command = [sys.executable, "-m", "node", "status", "--node", node.url]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S).stdout
    assert "make room on that disk" in shown
    ready = httpx.get(f"{node.url}/readyz", timeout=PATIENCE_S).json()
    assert (ready["ready"], len(ready["degraded"])) == (True, 1)
    ballast.unlink()
    eventually("it is saved again by itself", lambda: degraded(node) == {})
    counted = next(row for row in told(node)["files"] if row["what"] == "gossip state")
    assert counted["failures"]["no_space"] > 0

    # over the same place, since what the node holds open keeps the disk itself from becoming read-only
    subprocess.run(["mount", "--bind", str(disk), str(disk)], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", str(disk)], check=True)
    eventually("the read-only disk is told", lambda: degraded(node) == {"gossip state": "read_only"})
    serves(node)
    subprocess.run(["umount", str(disk)], check=True)
    eventually("it is saved again by itself", lambda: degraded(node) == {})
    assert node.stop() == 0
    state_loads(data)


def test_a_node_starts_and_stops_on_a_full_disk(cluster: Cluster, disk: Path) -> None:
    data = disk / "data"
    node = cluster.start("n", "--no-memory", "--model", "none", "--data-dir", str(data)).wait_ready()
    peer = node.peer_id
    assert node.stop() == 0
    (data / "lock").unlink()
    ballast = fill(disk)
    node = cluster.start("n", "--no-memory", "--model", "none", "--data-dir", str(data)).wait_ready()
    assert node.peer_id == peer
    assert degraded(node)["gossip state"] == "no_space"
    assert node.stop() == 0, node.log
    ballast.unlink()
    state_loads(data)


def test_a_node_that_cannot_write_its_log_runs_and_stops(cluster: Cluster) -> None:
    """/dev/full: every write says that there is no room."""
    ready = cluster.root / "n.ready"
    command = [sys.executable, "-m", "node", "run", "--data-dir", str(cluster.root / "n"), "--model", "none"]
    command += ["--http", "127.0.0.1:0", "--listen", "/ip4/127.0.0.1/tcp/0", "--no-mdns", "--ready-file", str(ready)]
    with open("/dev/full", "wb", buffering=0) as full:
        process = subprocess.Popen(command, stdout=full, stderr=full, stdin=subprocess.DEVNULL)
    node = NodeProcess(name="n", process=process, root=cluster.root)
    cluster.nodes.append(node)
    (cluster.root / "n.log").write_text("")
    node.wait_ready()
    assert httpx.get(f"{node.url}/readyz", timeout=PATIENCE_S).status_code == 200
    assert node.stop() == 0


def test_damaged_state_is_moved_aside_and_said_and_the_node_starts(cluster: Cluster) -> None:
    node = cluster.start("n", "--model", "none").wait_ready()
    assert node.stop() == 0
    data = cluster.root / "n"
    damaged = {}
    for name in ("gossip.json", "addresses.json"):
        whole = (data / name).read_bytes()
        damaged[name] = whole[: len(whole) // 2]
        (data / name).write_bytes(damaged[name])
    node = cluster.start("n", "--model", "none").wait_ready()
    aside = told(node)["set_aside"]
    assert len(aside) == 2
    for name, raw in damaged.items():
        assert (data / f"{name}.corrupt-1").read_bytes() == raw
        assert any(f"{name}.corrupt-1" in sentence for sentence in aside)
        assert f"{name}.corrupt-1" in node.log
    assert degraded(node) == {}
    doctor = [sys.executable, "-m", "node", "doctor", "--data-dir", str(data), "--node", node.url, "--json"]
    checks = json.loads(subprocess.run(doctor, capture_output=True, text=True, timeout=PATIENCE_S).stdout)["checks"]
    assert sum(check["check"] == "state on disk" for check in checks) == 2
    assert node.stop() == 0


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_was_closed_is_said(cluster: Cluster) -> None:
    node = cluster.start("n", "--model", "none").wait_ready()
    (cluster.root / "n").chmod(0o500)
    try:
        eventually("the closed folder is told", lambda: degraded(node) == {"gossip state": "not_permitted"})
    finally:
        (cluster.root / "n").chmod(0o700)
    eventually("it is saved again by itself", lambda: degraded(node) == {})
