"""bench.serving: loads, turns beside rivals, rivals that fail, and a soak that finds what an engine keeps."""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from bench.serving import measure
from bench.serving_asks import MIXED_NEW, MIXED_PROMPT, SHAPES, Ask, Told, poisson, together
from bench.serving_load import Drive, answer, users
from bench.serving_model import Served, llama_config, loaded_of
from bench.serving_parts import PARTS, TINY, Bench, cpu, over, times
from bench.serving_rivals import CONTINUOUS, GENERATE, Contestant, Rival, RivalLostError, command_of, opened
from bench.serving_soak import Soak
from model.config import EngineConfig
from model.engine import Engine
from model.errors import BadInput
from model.linears import kinds_here
from model.requests import GenerationRequest

STEPS = 101  # of a soak, with one burst
SHAPE = replace(SHAPES["tiny"], layers=1, context=1_536)
ECHO = """
from bench.serving_asks import Told, answer_lines
print("not a line of ours")
def answer(path, asks):
    print("{}")
    assert path != "die"
    new = sum(ask.new for ask in asks)
    return Told(tokens=new, wall_s=1.0, cpu_s=2.0, first_s=tuple(ask.due_s for ask in asks))
answer_lines(answer, version="9")
"""


@pytest.fixture(scope="module")
def tiny() -> Served:
    """Without packed layers, so that it runs on every machine."""
    loaded = loaded_of(llama_config(SHAPE), "tiny", torch.float32, torch.device("cpu"))
    return Served(kind="plain", loaded=loaded, is_invariant=True)


def bench_of(ours: list[Served], rivals: dict[str, Contestant], notes: list[str]) -> Bench:
    pace = replace(TINY, turns=3, part_s=math.inf)
    return Bench(shape=SHAPE, ours=ours, rivals=rivals, pace=pace, seed=1, note=notes.append)


@contextmanager
def started(code: str, **limits: float) -> Iterator[Rival]:
    """A rival that is made of this code."""
    with tempfile.TemporaryFile() as errors:
        rival = Rival([sys.executable, "-c", code], errors, **limits)
        try:
            yield rival
        finally:
            rival.close()


def some_told(tokens: int = 10, cpu_s: float = 1.0) -> Told:
    return Told(tokens=tokens, wall_s=1.0, cpu_s=cpu_s)


def test_a_batch_is_answered_whole_and_decoding_is_told_apart(tiny: Served) -> None:
    engine = tiny.engine()
    told = answer(engine, together(random.Random(1), 3, SHAPE)[:3])
    assert told.tokens == 3 * 32
    assert len(told.first_s) == 3
    assert 0 < told.decode_tokens < told.tokens
    assert told.decode_tokens % 3 == 0, "only passes in which all three decode"
    assert 0.0 < told.decode_cpu_s < told.cpu_s
    assert not engine.has_work


def test_an_ask_comes_when_it_is_due_and_waits_from_then(tiny: Served) -> None:
    now = 100.0
    added: list[float] = []

    class Slow(Engine):
        """A second a step."""

        def add(self, request: GenerationRequest) -> None:
            added.append(now)
            super().add(request)

        def step(self) -> list[object]:  # type: ignore[override]  # Output
            nonlocal now
            now += 1.0
            return super().step()  # type: ignore[return-value]

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    asks = [Ask(7.25, (1, 2), 2), Ask(0.0, (3,), 3), Ask(7.75, (5,), 1)]
    told = Drive(Slow(tiny.loaded), clock=lambda: now, sleep=sleep).run(asks)
    assert added == [100.0, 107.25, 108.25]
    assert told.first_s == (1.0, 1.0, 1.5), "the third came in the middle of a step"
    assert (told.tokens, told.wall_s) == (6, 9.25)


def test_a_refused_request_ends_the_load(tiny: Served) -> None:
    with pytest.raises(BadInput):
        answer(tiny.engine(), [Ask(0.0, (), 3)])


def test_users_ask_again_and_their_first_requests_do_not_count(tiny: Served) -> None:
    engine = tiny.engine()
    first_s = users(engine, 2, 3, random.Random(1), SHAPE)
    assert len(first_s) == 2 * 2
    assert engine.statistics().finished == 2 * 3


def test_a_served_load_is_the_same_for_all_and_within_its_bounds() -> None:
    asks = poisson(random.Random(3), 200, 0.5, SHAPE)
    assert asks == poisson(random.Random(3), 200, 0.5, SHAPE)
    assert [ask.due_s for ask in asks] == sorted(ask.due_s for ask in asks)
    assert 60 < asks[-1].due_s < 140
    assert {MIXED_NEW[0], MIXED_NEW[1]} <= {ask.new for ask in asks} <= set(range(MIXED_NEW[0], MIXED_NEW[1] + 1))
    assert {len(ask.prompt) for ask in asks} <= set(range(MIXED_PROMPT[0], MIXED_PROMPT[1] + 1))
    assert max(max(ask.prompt) for ask in asks) < SHAPE.vocabulary


def test_turns_give_all_the_same_load_in_both_orders_and_the_first_counts_nowhere() -> None:
    seen: list[tuple[str, Sequence[Ask]]] = []

    def rival(name: str) -> Contestant:
        def told(asks: Sequence[Ask]) -> Told:
            seen.append((name, asks))
            return some_told(tokens=len(seen))

        return told

    bench = bench_of([], {"x": rival("x"), "y": rival("y"), "z": rival("z")}, [])
    made = bench.turns("part", ("x", "y"), lambda rng, is_warming: together(rng, 1 if is_warming else 2, SHAPE))
    assert [name for name, _ in seen] == ["y", "x", "x", "y", "y", "x", "x", "y"]
    loads = [asks for _, asks in seen]
    assert loads[::2] == loads[1::2], "both get the same load"
    assert len({str(load) for load in loads}) == 4, "each turn has a new one"
    assert [len(load) for load in loads] == [1, 1, 2, 2, 2, 2, 2, 2]
    assert [told.tokens for told in made["x"]] == [3, 6, 7]
    assert made.keys() == {"x", "y"}


def test_a_part_ends_after_its_turns_or_its_time() -> None:
    bench = bench_of([], {}, [])
    assert list(bench.count()) == [-1, 0, 1, 2]
    assert list(bench.count(2)) == [-1, 0, 1, 2, 3, 4, 5]
    bench.pace = replace(TINY, turns=3, part_s=0.0)
    assert list(bench.count()) == [-1, 0]


def test_a_rival_that_is_lost_is_left_out_with_a_note_and_the_others_go_on(tiny: Served) -> None:
    calls = 0

    def dies(asks: Sequence[Ask]) -> Told:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RivalLostError("ended with 1")
        return some_told()

    notes: list[str] = []
    bench = bench_of([tiny], {GENERATE: dies, CONTINUOUS: lambda _: some_told()}, notes)
    made = bench.turns("part", (GENERATE, CONTINUOUS), lambda rng, _: together(rng, 1, SHAPE))
    assert made.keys() == {"plain", CONTINUOUS}
    assert len(made["plain"]) == len(made[CONTINUOUS]) == 3
    assert notes == [f"{GENERATE} is left out from now on: ended with 1"]
    assert bench.rivals.keys() == {CONTINUOUS}
    assert times(made, "e2e_b1_ratio", tiny, GENERATE, cpu) == []
    assert times(made, "e2e_b1_ratio", tiny, CONTINUOUS, cpu)[0].unit == "times, plain, invariant"


def test_a_ratio_is_the_median_of_the_turns_ratios() -> None:
    ours = [some_told(cpu_s=each) for each in (1.0, 4.0, 10.0)]  # the machine got busier
    theirs = [some_told(cpu_s=each) for each in (2.0, 8.0, 5.0)]  # but for the last
    assert over({"a": ours, "b": theirs}, "a", "b", cpu) == 2.0


def test_a_rival_is_asked_by_lines_whatever_else_it_prints() -> None:
    with started(ECHO) as rival:
        assert rival.wait_ready() == "9"
        told = rival.ask("any", [Ask(0.5, (1, 2), 3), Ask(0.75, (4,), 5)])
        assert told == Told(tokens=8, wall_s=1.0, cpu_s=2.0, first_s=(0.5, 0.75))


def test_a_rival_that_dies_says_why() -> None:
    with started(ECHO) as rival:
        rival.wait_ready()
        with pytest.raises(RivalLostError, match=r"^ended with 1: .*AssertionError"):
            rival.ask("die", [])
        with pytest.raises(RivalLostError, match=r"ended.*AssertionError"):
            rival.ask("any", [])


def test_a_rival_that_is_silent_is_ended() -> None:
    with started("import threading; threading.Event().wait()", silence_s_max=0.05) as rival:
        with pytest.raises(RivalLostError, match=r"no answer within 0\.05 s: it said nothing"):
            rival.wait_ready()


def test_a_rival_that_is_not_there_is_left_out() -> None:
    notes: list[str] = []
    with opened(["llamacpp:/nowhere/python"], "tiny", notes.append) as rivals:
        assert rivals == {}
    assert notes == ["llamacpp:/nowhere/python is left out: /nowhere/python does not run (No such file or directory)"]


@pytest.mark.parametrize("name", ["llamacpp", "vllm", "transformers:/usr/bin/python", ""])
def test_an_unknown_rival_is_an_error_that_says_what_is_wanted(name: str) -> None:
    with pytest.raises(ValueError, match="wanted transformers, or llamacpp:PYTHON"):
        command_of(name, "tiny")


@pytest.mark.slow
def test_transformers_answers_by_both_paths() -> None:
    """Its interface for continuous batching is young: this is red when it changes."""
    notes: list[str] = []
    with opened(["transformers"], "tiny", notes.append) as rivals:
        assert rivals.keys() == {GENERATE, CONTINUOUS}, notes
        shape = SHAPES["tiny"]
        assert rivals[GENERATE](together(random.Random(1), 2, shape)).tokens == 2 * 32
        asks = poisson(random.Random(2), 3, 0.01, shape)
        told = rivals[CONTINUOUS](asks)
        assert told.tokens == sum(ask.new for ask in asks)
        assert len(told.first_s) == 3
        assert min(told.first_s) > 0.0


@pytest.mark.slow
@pytest.mark.skipif(not kinds_here(), reason="this machine has no packed layers")
def test_every_part_gives_its_figures() -> None:
    kinds = list(kinds_here()[:1])
    chosen = argparse.Namespace(shape="tiny", quick=True, rivals=[], kinds=kinds, only=list(PARTS), seed=1)
    figures = {row.figure: row for row in measure(chosen)}
    for kind in kinds:
        assert {f"decode_b16_{kind}_tok_per_cpu_s", f"served_load_{kind}_ttft_p95_s"} <= figures.keys()
    assert {"decode_b1_tok_per_cpu_s", "ttft_16_users_ratio", "prefix_reuse_ratio", "loop_lag_p99_ms"} <= figures.keys()
    assert all(row.value > 0.0 for row in figures.values() if not row.figure.startswith("invariant"))
    assert all("invariant" in row.unit for row in figures.values() if not row.figure.startswith("invariant"))


class Forgets(Engine):
    """Every fourth cancel is lost."""

    cancels = 0

    def cancel(self, request_id: str) -> None:
        self.cancels += 1
        if self.cancels % 4:
            super().cancel(request_id)


@pytest.mark.slow
def test_a_soak_finds_nothing_in_our_engine_and_what_a_bad_one_keeps(
    tiny: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    soak = Soak(tiny.engine(kv_tokens=4_096, queue_max=8), SHAPE, seed=1, clock=itertools.count().__next__)
    soak.run(STEPS)
    assert soak.faults == []
    assert min(soak.counts[name] for name in ("finished", "cancelled", "refused", "wrong")) > 0
    assert soak.counts["accepted"] == soak.counts["finished"] + soak.counts["cancelled"]
    assert soak.live == {}
    assert "MiB" in capsys.readouterr().out
    bad = Soak(Forgets(tiny.loaded, EngineConfig(slots=16)), SHAPE, seed=1, clock=itertools.count().__next__)
    bad.run(STEPS // 2)
    assert any("had ended" in fault for fault in bad.faults)
    assert any("the engine counts" in fault for fault in bad.faults)
