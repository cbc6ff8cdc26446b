"""A late joiner among real nodes: a blob from three donors, one killed, the joiner itself killed and started again."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.real, pytest.mark.slow]
CONTENT = random.Random(3).randbytes(40_000_003)
ROOT = Path(__file__).parent.parent.parent


class BlobNode:
    """tests/real/blob_node.py as a process."""

    def __init__(self, data_dir: Path, upload_mb_s: int = 100) -> None:
        with (data_dir.parent / f"{data_dir.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.real.blob_node", str(data_dir), str(upload_mb_s)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
            )
        self.told = self._until("address")

    def tell(self, **order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def ask(self, answer: str, **order: Any) -> Any:
        self.tell(**order)
        return self._until(answer)[answer]

    def _until(self, *keys: str) -> dict[str, Any]:
        """The next line with one of these keys."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # the node's banner goes there too
                found: dict[str, Any] = json.loads(line)
                if "error" in found and "error" not in keys:
                    raise AssertionError(found["error"])
                if any(key in found for key in keys):
                    return found
        raise AssertionError(f"the node ended with {self.process.wait()}")

    def stored(self, at_least: int) -> None:
        while self._until("stored")["stored"] < at_least:
            pass

    def wait(self, key: str) -> Any:
        return self._until(key)[key]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture
def donors(tmp_path: Path) -> Iterator[list[BlobNode]]:
    file = tmp_path / "weights"
    file.write_bytes(CONTENT)
    with ExitStack() as stack:
        nodes = []
        for name in ("one", "two", "three"):
            nodes.append(BlobNode(tmp_path / name, upload_mb_s=8))
            stack.callback(nodes[-1].kill)
        yield nodes


def test_a_late_joiner_gets_a_blob_though_donors_and_itself_are_killed(donors: list[BlobNode], tmp_path: Path) -> None:
    (blob,) = {donor.ask("blob", offer=str(tmp_path / "weights")) for donor in donors}
    peers = [donor.told["peer"] for donor in donors]

    def joined() -> BlobNode:
        node = BlobNode(tmp_path / "me")
        for donor in donors:
            node.tell(dial=donor.told["address"])
            assert node.wait("peer") == donor.told["peer"]
        return node

    me = joined()
    try:
        me.tell(fetch=blob, peers=peers)
        me.stored(8_000_000)
        donors[0].kill()
        me.stored(16_000_000)
        me.kill()
        part = tmp_path / "me" / "blobs" / f"{blob}.part"
        assert part.exists()
        del donors[0]
        me = joined()
        me.tell(fetch=blob, peers=peers)
        path = Path(me.wait("path"))
        assert path.read_bytes() == CONTENT
        status = me.ask("status", status=True)
        counts = status["blobs"]["fetched"]
        assert counts["chunks_resumed"] * 524_288 >= 14_000_000
        assert counts["bytes"] < 27_000_000
        assert status["direct"]["counts"]["opened"] >= 2
        assert path == tmp_path / "me" / "blobs" / blob
        assert {each.name for each in path.parent.iterdir()} == {blob, f"{blob}.manifest"}
        given = donors[0].ask("status", status=True)
        assert given["blobs"]["given"]["bytes"] > 4_000_000
        assert given["direct"]["counts"]["served"] >= 1
        for donor in donors:
            donor.kill()
        assert me.ask("path", fetch=blob, peers=[]) == str(path)  # it is here
    finally:
        me.kill()
