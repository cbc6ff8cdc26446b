"""No chance in any metric path: the code that makes a figure of the node's state has no random source.

The one named exception is not walked: node/store*.py and node/chain.py draw nonces, and crypto/disk.py names of
temporary files, none of which enters a figure.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.test_house import ROOT

PATTERNS = (
    "node/consciousness*.py", "node/facts.py", "node/memory*.py", "node/prediction.py", "node/averages.py",
    "node/self_*.py", "node/recorder.py", "model/look.py", "model/openness.py",
)  # fmt: skip
SOURCES = tuple(sorted({path for pattern in PATTERNS for path in ROOT.glob(pattern)}))
APART: dict[str, str] = {}  # file -> why its chance enters no figure; what is gone from the code goes here, too
MODULES = frozenset({"random", "secrets", "uuid"})  # whole modules that are chance
DOTTED = frozenset({"numpy.random", "os.urandom", "os.getrandom", "random", "secrets", "uuid"})
DRAWS = frozenset(
    {
        "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "multinomial",
        "bernoulli", "poisson", "manual_seed", "seed", "dropout", "normal_", "uniform_", "random_", "bernoulli_",
        "exponential_", "geometric_", "cauchy_", "log_normal_", "urandom", "getrandom", "token_bytes", "token_hex",
        "default_rng", "getrandbits", "choices", "shuffle", "uuid1", "uuid4", "gauss",
    }
)  # fmt: skip
SALTED = "hash"  # of a str or bytes: another in every process


def chances(tree: ast.AST) -> list[str]:
    """Where a module imports or draws chance, as `line: what`. A type that is passed in (random.Random) counts, too."""
    found = []
    for item in ast.walk(tree):
        if isinstance(item, ast.Import):
            found += [f"{item.lineno}: import {each.name}" for each in item.names if _is_chance(each.name)]
        elif isinstance(item, ast.ImportFrom) and item.module is not None:
            names = [f"{item.module}.{each.name}" for each in item.names]
            found += [f"{item.lineno}: from {name}" for name in names if _is_chance(name) or _draws(name)]
        elif isinstance(item, ast.Attribute) and item.attr in DRAWS:
            found.append(f"{item.lineno}: .{item.attr}")
        elif isinstance(item, ast.Attribute) and item.attr == "random":
            found.append(f"{item.lineno}: .random")
        elif isinstance(item, ast.Call) and isinstance(item.func, ast.Name) and item.func.id in (SALTED, "id"):
            found.append(f"{item.lineno}: {item.func.id}()")
        elif isinstance(item, ast.Call) and isinstance(item.func, ast.Name) and item.func.id == "__import__":
            found.append(f"{item.lineno}: __import__()")
    return found


def _is_chance(name: str) -> bool:
    return name.split(".")[0] in MODULES or any(name == each or name.startswith(each + ".") for each in DOTTED)


def _draws(name: str) -> bool:
    return name.split(".")[-1] in DRAWS


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_figure_is_drawn(path: Path) -> None:
    found = chances(ast.parse(path.read_text()))
    if str(path.relative_to(ROOT)) in APART:
        assert found, "it draws nothing any more: take it out of APART"
    else:
        assert found == []


def test_every_part_of_the_path_is_walked() -> None:
    names = {str(path.relative_to(ROOT)) for path in SOURCES}
    known = {
        "model/look.py", "model/openness.py", "node/averages.py", "node/consciousness.py",
        "node/consciousness_fields.py", "node/facts.py", "node/memory.py", "node/memory_events.py",
        "node/prediction.py", "node/self_looks.py", "node/self_probes.py", "node/self_probing.py",
    }  # fmt: skip
    assert known <= names


@pytest.mark.parametrize(
    "line",
    [
        "import random", "import random as r", "from random import gauss", "import secrets", "import uuid",
        "import numpy.random", "from numpy import random", "from numpy.random import default_rng", "import os.urandom",
        "from os import urandom", "x = os.urandom(8)", "x = torch.rand(3)", "x = torch.randn_like(y)", "y.normal_()",
        "torch.manual_seed(1)", "x = np.random.rand()", "x = np.random.default_rng(3)", "x = hash(name)",
        "x = torch.nn.functional.dropout(y)", "x = __import__('random')", "import random\ndef f(r: random.Random): ...",
        "x = torch.multinomial(p, 1)", "x = id(y)", "from torch import randint",
    ],
)  # fmt: skip
def test_chance_is_found(line: str) -> None:
    assert chances(ast.parse(line))


def test_other_code_is_not_taken_for_chance() -> None:
    lines = (
        "from hashlib import sha256\nimport numpy as np\nx = sha256(b'').digest()\ny = np.mean([1])\nz = {1: 2}.items()"
    )
    assert chances(ast.parse(lines)) == []
