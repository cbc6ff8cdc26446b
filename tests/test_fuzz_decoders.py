"""Every decoder meets any bytes, and damaged right ones: a value or its one error, soon and in little memory.

The table is tests/fuzz/decoders.py; the same targets run for longer under atheris (tests/fuzz/run.py).
"""

from __future__ import annotations

import random
import time
import tracemalloc
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.fuzz.decoders import TARGETS
from tests.fuzz.target import Target

HANG_S = 10.0  # for one input, on a busy machine
made = cache(lambda name: TARGETS[name]())
each_target = pytest.mark.parametrize("name", TARGETS)


def meet(target: Target, raw: bytes) -> bool:
    began = time.perf_counter()
    taken = target.meet(raw)
    assert time.perf_counter() - began < HANG_S, f"{len(raw)} bytes held the decoder for over {HANG_S} s"
    return taken


@each_target
def test_what_is_right_is_taken_and_the_rest_refused(name: str) -> None:
    target = made(name)
    taken = [meet(target, raw) for raw in target.corpus]
    assert any(taken), "no seed of this target is right: it would fuzz nothing but the refusal"
    tracemalloc.start()
    for raw in target.corpus:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        target.meet(raw)
        assert tracemalloc.get_traced_memory()[1] - before < target.taken_bytes_max, raw[:40]
    tracemalloc.stop()


@pytest.mark.slow
@each_target
@settings(max_examples=120, deadline=None)
@example(seed=0)
@given(seed=st.integers(0, 2**64))
def test_damaged_input_is_a_value_or_the_one_error(name: str, seed: int) -> None:
    target = made(name)
    meet(target, target.input(random.Random(seed)))


@pytest.mark.slow
@each_target
@settings(max_examples=50, deadline=None)
@given(raw=st.binary(max_size=300))
def test_any_bytes_are_a_value_or_the_one_error(name: str, raw: bytes) -> None:
    meet(made(name), raw)
