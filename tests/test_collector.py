"""node/collector.py: nothing is collected while modules are imported, and a node looks no more at what they made."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from node.collector import importing
from node.start import EXIT_NO_LISTEN

ROOT = Path(__file__).parent.parent
# A node that ends as it opens its host, when all but the web and the model was imported.
START = """
import gc, sys
from node.start import start
code = start({"data_dir": sys.argv[1], "model": "none", "http": "off", "mdns": False, "listen": (sys.argv[2],)}, None)
print(code, gc.isenabled(), gc.get_freeze_count())
"""


@pytest.fixture
def unfrozen() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("unfrozen")
def test_nothing_is_collected_meanwhile_nor_is_it_looked_at_afterwards() -> None:
    with importing():
        assert not gc.isenabled()
        made: list[list[int]] = [[] for _ in range(1000)]
    assert gc.isenabled()
    looked_at = {id(each) for each in gc.get_objects()}
    assert not looked_at & {id(each) for each in made}


@pytest.mark.usefixtures("unfrozen")
def test_a_failed_import_leaves_the_collector_running() -> None:
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()


@pytest.mark.slow
def test_a_node_that_starts_has_put_its_libraries_aside(tmp_path: Path) -> None:
    nowhere = "/ip4/192.0.2.1/tcp/4001"  # an address of no machine (RFC 5737)
    child = subprocess.run(
        [sys.executable, "-c", START, str(tmp_path), nowhere], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    code, enabled, frozen = child.stdout.split()
    assert (int(code), enabled) == (EXIT_NO_LISTEN, "True"), child.stderr
    assert int(frozen) > 100_000
