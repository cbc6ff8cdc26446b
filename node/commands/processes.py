"""Node processes on this machine, for the demo, the benchmarks and the tests: start, wait until ready, stop.

Rules: every process started through a Cluster has ended when the Cluster is closed, however that comes about.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from crypto.identity import Identity
from node.config import KEY_FILE

READY_S_MAX = 120.0
STOP_S_MAX = 40.0
_LOOK_EVERY_S = 0.02


class NotStarted(Exception):
    """A node ended, or was not ready in time; the message has its exit code and the end of its log."""


@dataclass(slots=True, kw_only=True)
class NodeProcess:
    """One node: its process, where its files are, and what its ready file said (empty until wait_ready)."""

    name: str
    process: subprocess.Popen[bytes]
    root: Path
    ready: dict[str, Any] = field(default_factory=dict)

    @property
    def peer_id(self) -> str:
        """Its peer id."""
        return str(self.ready["peer_id"])

    @property
    def url(self) -> str:
        """Its HTTP address."""
        return f"http://{self.ready['http']}"

    @property
    def address(self) -> str:
        """Its first listen address, with its peer id."""
        return str(self.ready["listen"][0])

    @property
    def log(self) -> str:
        """What it wrote to stdout and stderr so far."""
        return (self.root / f"{self.name}.log").read_text(errors="replace")

    def wait_ready(self, seconds_max: float = READY_S_MAX) -> NodeProcess:
        """Wait for the ready file. Raises NotStarted."""
        file = self.root / f"{self.name}.ready"
        until = time.monotonic() + seconds_max
        while time.monotonic() < until:
            if file.exists():
                self.ready = json.loads(file.read_text())
                return self
            if self.process.poll() is not None:
                raise NotStarted(f"{self.name} ended with exit code {self.process.returncode}:\n{self.log[-4000:]}")
            time.sleep(_LOOK_EVERY_S)
        raise NotStarted(f"{self.name} was not ready within {seconds_max:.0f} s:\n{self.log[-4000:]}")

    def stop(self, seconds_max: float = STOP_S_MAX) -> int:
        """SIGTERM, then wait, then kill; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=seconds_max)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


class Cluster:
    """Several nodes under one directory, in one network of their own, on loopback, found by bootstrap only."""

    def __init__(self, root: Path, *, network: str | None = None) -> None:
        self.root = root
        self.network = network or f"cluster-{os.getpid()}"
        self.nodes: list[NodeProcess] = []
        self._reserved: dict[str, str] = {}
        self._no_peers = root / "no_peers.json"
        self._no_peers.write_text("[]")

    def start(
        self, name: str, *flags: str, join: Sequence[NodeProcess | str] = (), inside: Sequence[str] = ()
    ) -> NodeProcess:
        """Start a node; later flags win. A second start under one name keeps its data directory.

        inside: a command that runs the node somewhere, such as ("ip", "netns", "exec", NAME).
        """
        ready = self.root / f"{name}.ready"
        ready.unlink(missing_ok=True)
        command = [*inside, sys.executable, "-m", "node", "run", "--data-dir", str(self.root / name)]
        for key, value in self._defaults(name, ready).items():
            if key not in flags:
                command += [key, value]
        command += ["--no-mdns", *flags]
        for other in join:
            command += ["--bootstrap", other if isinstance(other, str) else other.address]
        with (self.root / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        node = NodeProcess(name=name, process=process, root=self.root)
        self.nodes.append(node)
        return node

    def reserve(self, name: str) -> str:
        """Choose port and identity of a node that starts later, so that others can name its address at once."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        identity = Identity.load_or_make(self.root / name / KEY_FILE)
        self._reserved[name] = f"/ip4/127.0.0.1/tcp/{port}"
        return f"{self._reserved[name]}/p2p/{identity.peer_id}"

    def _defaults(self, name: str, ready: Path) -> dict[str, str]:
        return {
            "--http": "127.0.0.1:0",
            "--listen": self._reserved.get(name, "/ip4/127.0.0.1/tcp/0"),
            "--network": self.network,
            "--bootstrap-file": str(self._no_peers),
            "--ready-file": str(ready),
            "--threads": "1",
        }

    def close(self) -> None:
        """End every process: SIGTERM to all, then wait for each."""
        for node in self.nodes:
            if node.process.poll() is None:
                if sys.platform != "win32":
                    node.process.send_signal(signal.SIGCONT)  # a frozen one cannot hear SIGTERM
                node.process.send_signal(signal.SIGTERM)
        for node in self.nodes:
            node.stop()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
