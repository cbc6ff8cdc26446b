"""Bit identity: every rule under every SIMD path that this CPU has, with one thread and with two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from model.rules import BY_ORDER, Rule

ROOT = Path(__file__).parent.parent
PATHS = {"DEFAULT": ["default"], "AVX2": ["default", "avx2"], "AVX512": ["default", "avx2", "avx512"]}
BEST = torch.backends.cpu.get_cpu_capability()
WAYS = list(product(PATHS.get(BEST, ["default"]), (1, 2)))
ODD = ("fused", "zeros", "sum", "capability")  # not ours: what must differ, and what says under which path it ran
pytestmark = pytest.mark.slow

Found = dict[str, object]


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, int], Found]:
    """What tests/merge_bits.py printed, by (SIMD path, threads)."""
    return {(path, threads): run(path, threads) for path, threads in WAYS}


def run(path: str, threads: int) -> Found:
    # passive: idle threads that spin would take the cores from whoever else works here
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": path, "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.merge_bits", str(threads)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed: Found = json.loads(done.stdout)
    return printed


def test_every_way_is_the_way_that_was_asked_for(found: dict[tuple[str, int], Found]) -> None:
    for (path, _), printed in found.items():
        assert str(printed["capability"]).lower() in (path, BEST.lower() if BEST not in PATHS else path)


def test_updates_parameters_and_evidence_are_the_same_bits_in_every_way(found: dict[tuple[str, int], Found]) -> None:
    first = found[WAYS[0]]
    for rule in Rule:
        assert f"dense {rule}" in first
        assert (f"sparse {rule}" in first) == (rule not in BY_ORDER)
    for name in first.keys() - set(ODD):
        for way, printed in found.items():
            assert printed[name] == first[name], f"{name} differs between {WAYS[0]} and {way}"


def test_what_was_sent_alone_gives_the_bits_of_the_whole(found: dict[tuple[str, int], Found]) -> None:
    for name, value in found[WAYS[0]].items():
        if name.startswith("sparse "):
            assert value == found[WAYS[0]][name.replace("sparse", "plain")], name


@pytest.mark.skipif(BEST not in ("AVX2", "AVX512"), reason="this CPU has no path with fused multiply and add")
def test_the_comparison_sees_a_fused_addition(found: dict[tuple[str, int], Found]) -> None:
    """`add(alpha=)` rounds once with FMA and twice without: an outer step made of it would not pass above."""
    assert found["default", 1]["fused"] != found["avx2", 1]["fused"]


def test_the_comparison_sees_what_threads_do_to_a_plain_sum(found: dict[tuple[str, int], Found]) -> None:
    """The sum of squares by torch: why model/evidence.py counts in whole numbers."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("one core: torch does not cut a sum in two")
    assert found["default", 1]["sum"] != found["default", 2]["sum"]


@pytest.mark.skipif(BEST not in ("AVX2", "AVX512"), reason="the sign of the lesser zero was measured on x86")
def test_the_comparison_sees_the_sign_of_a_zero(found: dict[tuple[str, int], Found]) -> None:
    """Which of +0.0 and -0.0 `minimum` takes: why values to be sorted have 0.0 added."""
    assert len({printed["zeros"] for printed in found.values()}) > 1
