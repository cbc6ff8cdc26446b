"""docs/operators and the Dockerfile against the code: every flag exists, every file parses, every sentence is there."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from node.config import NodeConfig, load_config
from tests.doctor_words import OPEN, words
from tests.test_command_line import LEAVES, check_example, flags_of

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "operators"
PAGES = sorted(FOLDER.glob("*.md"))
UNIT = FOLDER / "openagi-node.service"
FOREIGN = {"--build", "--now", "--version"}  # of docker and systemctl
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def started_with(command: list[str], environment: dict[str, str] | None = None) -> NodeConfig:
    """The settings of a node that is started by these words, `run` first."""
    assert command[0] == "run"
    with LEAVES[("run",)].make_context("run", command[1:]) as context:
        given = {key: value for key, value in context.params.items() if value not in (None, [], ())}
    for key in ("listen", "bootstrap", "data"):
        if key in given:
            given[key] = tuple(given[key])
    return load_config(given, environment=environment or {})


def commands_in(text: str) -> list[str]:
    """Every command line of ours: in code blocks, in backticks, in tables."""
    text = text.replace("\\\n", " ")
    found = re.findall(r"(?:\.venv[/\\]bin[/\\])?python -m node(?: [^`|<>\n]*)?", text)
    return [each.split("#")[0].strip().rstrip(";,.").removeprefix(".venv/bin/") for each in found]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", UNIT], ids=lambda page: page.name)
def test_every_command_of_a_guide_is_one(page: Path) -> None:
    for command in commands_in(page.read_text()):
        if any(word in command for word in ("...`", "COMMAND", "train ...")):
            continue
        check_example(shlex.join(["python", *[w for w in shlex.split(command, posix=False)[1:] if w != "..."]]))


@each_page
def test_every_flag_that_is_named_exists(page: Path) -> None:
    known = set().union(*map(flags_of, LEAVES.values())) | FOREIGN | {"--help", "--install-completion"}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", page.read_text()))
    assert named - known == set()


@each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


def test_every_page_is_in_the_list() -> None:
    told = (FOLDER / "README.md").read_text()
    assert [file.name for file in FOLDER.iterdir() if file.name != "README.md" and f"]({file.name})" not in told] == []


def test_code_of_the_guides_is_python_and_its_names_are_ours() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (FOLDER / "clients.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    own = [line for block in blocks for line in ast.parse(block).body if isinstance(line, ast.ImportFrom)]
    source = (ROOT / "model" / "service.py").read_text()
    for line in own:
        if line.module == "model.service":
            assert all(f"def {alias.name}(" in source for alias in line.names)


def test_all_that_the_doctor_can_say_is_in_the_guide() -> None:
    """`python -m tests.doctor_words` prints the table anew."""
    guide = (FOLDER / "troubleshooting.md").read_text()
    said = words()
    assert len(said) > 25
    for each in said:
        assert f"| {each.check} | {each.found} | {each.advice} |" in guide, f"not in troubleshooting.md: {each}"
        assert each.check != OPEN or each.advice != OPEN
    rows = [line for line in guide.split("## Other symptoms")[0].splitlines() if line.startswith("| ")][2:]
    assert len(rows) == len({(each.check, each.found, each.advice) for each in said}), "a row that nothing says"


# -- systemd ---------------------------------------------------------------------------------------------------------


def test_the_unit_starts_a_node() -> None:
    [line] = [line for line in UNIT.read_text().splitlines() if line.startswith("ExecStart=")]
    command = shlex.split(line.removeprefix("ExecStart="))
    assert command[1:4] == ["-m", "node", "run"]
    config = started_with(command[3:])
    assert config.data_dir == Path("/var/lib/openagi")  # StateDirectory=openagi
    assert config.http == "127.0.0.1:8765"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_the_unit_is_good_and_hardened(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/openagi/.venv/bin/python", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    security = ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", str(unit)]
    done = subprocess.run(security, capture_output=True, text=True, timeout=60)
    if "unrecognized option" in done.stderr:
        pytest.skip("systemd is older than 250")
    assert done.returncode == 0, done.stdout[-300:]  # exposure of at most 2.0 of 10


# -- Docker ----------------------------------------------------------------------------------------------------------


def dockerfile() -> dict[str, list[str]]:
    """Instructions by name."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines():
        if line.strip() and not line.startswith("#"):
            name, _, rest = line.partition(" ")
            found.setdefault(name, []).append(rest.strip())
    return found


def test_the_image_starts_a_node_whose_ports_and_data_are_outside() -> None:
    told = dockerfile()
    assert json.loads(told["ENTRYPOINT"][0]) == ["python", "-m", "node"]
    config = started_with(json.loads(told["CMD"][0]))
    assert str(config.data_dir) == told["VOLUME"][0]
    http = config.http_address()
    assert http is not None
    assert set(told["EXPOSE"][0].split()) == {str(http.port), config.listen[0].rpartition("/")[2]}
    assert f"http://127.0.0.1:{http.port}/readyz" in (ROOT / "Dockerfile").read_text()
    assert told["USER"] == ["node"]


def test_the_image_has_all_that_the_node_imports() -> None:
    copied = [word for line in dockerfile()["COPY"] for word in line.split()[:-1]]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    assert {"crypto", "p2p", "model", "gossip", "node", "bootstrap_peers.json", "pyproject.toml"} <= set(copied)
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not set(copied) & set(ignored)


def test_compose_has_three_nodes_with_disks_of_their_own() -> None:
    told: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    services = told["services"]
    assert len(services) == 3
    volumes = [service["volumes"][0].partition(":") for service in services.values()]
    assert {name for name, _, place in volumes if place == dockerfile()["VOLUME"][0]} == set(told["volumes"])
    command = json.loads(dockerfile()["CMD"][0])
    models = []
    for service in services.values():
        assert (FOLDER / service["build"]["context"]).resolve() == ROOT
        given = {key: str(value).replace("${BOOTSTRAP:-}", "") for key, value in service["environment"].items()}
        config = started_with(command, given)
        models.append(config.model)
        assert service["stop_grace_period"] == "45s"
    assert sorted(models) == ["default", "default", "none"]
    ports = services["door"]["ports"]
    assert "127.0.0.1:8765:8765" in ports, "the door asks for no key, so only this machine may ask it"
