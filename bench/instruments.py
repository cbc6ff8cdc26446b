"""`python -m bench.instruments`: what it costs a node to look at its own model: entropy, held-out text, probes.

Rules: the Llama of 60M of bench.serving with random weights, one thread of a CPU, CPU seconds. With and without judging
takes turns within the run, in the same engine, and without once more, which shows the noise; `told` is the engine's own
measure. A look is LOOK_SLICES slices of held-out text, a round of probes PROMPTS answers of ANSWER_TOKENS tokens; the
time between two follows from the shares that node/self_looks.py allows them.
Source: SELF.md ("sampled so that they cost under 1 % of compute"); issue 7.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Final

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as a node does, before torch

import torch

from bench.harness import Options, Row, options, report
from bench.serving_asks import SHAPES
from bench.serving_model import Served, kinds_to_measure, served
from model.engine import Engine
from model.look import ROW_TOKENS, looking
from model.openness import Judge, openness_of
from model.requests import GenerationRequest, SamplingParameters
from node.self_looks import LOOK_SHARE, LOOK_SLICES, PIECES, PROBE_SHARE
from node.self_probes import ANSWER_TOKENS, PROMPTS

BATCHES: Final = (1, 16)
PROMPT_TOKENS: Final = 32
OFF: Final = -1.0  # a share that nothing is judged at


def main() -> int:
    """Measure and report."""
    chosen = options(__doc__)
    torch.set_num_threads(1)
    rows = measure(chosen)
    report("instruments", rows, chosen)
    return 0


def measure(chosen: Options, shape: str = "60m") -> list[Row]:
    """All figures."""
    turns, steps, looks = (4, 20, 3) if chosen.quick else (8, 18, 10)
    rows = [_judging_row(SHAPES[shape].vocabulary)]
    for kind in kinds_to_measure():
        here = served(SHAPES[shape], kind)
        for batch in BATCHES:
            rows += _decoding(here, batch, turns, steps)
        rows += _looking(here, looks)
        rows.append(_probing(here))
    return rows


def _judging_row(vocabulary: int) -> Row:
    """One token."""
    logits = [3.0 * torch.sin(torch.arange(vocabulary) * (n + 1.0)) for n in range(16)]
    times_s = [_timed(partial(openness_of, row)) for _ in range(20) for row in logits]
    return Row(figure="judge_token_us", value=1e6 * statistics.median(times_s), unit="us CPU", better="lower")


def _decoding(here: Served, batch: int, turns: int, steps: int) -> list[Row]:
    """CPU seconds of a step with judging over those without, and what the engine itself says of it."""
    engine = here.engine()
    _filled(engine, batch, 3 * turns * steps + 16)
    judges = {"on": engine._judge, "off": Judge(time.perf_counter, OFF), "again": Judge(time.perf_counter, OFF)}
    spent_s: dict[str, list[float]] = {which: [] for which in judges}
    for turn in range(turns):
        for which in list(judges)[:: 1 if turn % 2 else -1]:  # a machine that slows down slows all
            engine._judge = judges[which]
            spent_s[which] += [_timed(engine.step) for _ in range(steps)]
    told, name = judges["on"].read(), f"{here.slug}_b{batch}"
    ratio, noise = (statistics.fmean(spent_s[which]) / statistics.fmean(spent_s["off"]) for which in ("on", "again"))
    return [
        Row(figure=f"step_{name}_ms", value=1e3 * statistics.median(spent_s["off"]), unit="ms CPU", better="lower"),
        Row(figure=f"step_judged_{name}_ratio", value=ratio, unit="over a step without", better="lower"),
        Row(figure=f"step_again_{name}_ratio", value=noise, unit="the same without: the noise", better="lower"),
        Row(figure=f"judging_told_{name}", value=100 * told.cost_s / told.steps_s, unit="% of steps", better="lower"),
        Row(figure=f"judged_{name}", value=100 * told.tokens / told.chosen, unit="% of tokens", better="higher"),
    ]


def _looking(here: Served, looks: int) -> list[Row]:
    """A look, by the size of its passes; and how often its share pays for one."""
    ids = [1 + n * 37 % (here.loaded.facts.vocabulary - 1) for n in range(ROW_TOKENS + 1)]
    rows = []
    for piece in (PIECES[0], PIECES[-1]):
        passes_s, looks_s = list[float](), list[float]()
        for _ in range(looks):
            began_s = time.process_time()
            for _ in range(LOOK_SLICES):
                work = looking(here.loaded, ids, piece)
                passes_s += [_timed(partial(next, work)) for _ in range(-(-ROW_TOKENS // piece))]
                assert next(work, None) is None
            looks_s.append(time.process_time() - began_s)
        name, look_s = f"{here.slug}_{piece}", statistics.median(looks_s)
        rows += [
            Row(figure=f"look_{name}_s", value=look_s, unit="s CPU", better="lower"),
            Row(figure=f"look_pass_{name}_ms", value=1e3 * statistics.median(passes_s), unit="ms CPU", better="lower"),
            Row(figure=f"look_every_{name}_s", value=look_s / LOOK_SHARE, unit="s at its share", better="lower"),
        ]
    return rows


def _probing(here: Served) -> Row:
    """A round of probes, without its vectors."""
    engine = here.engine()
    spent_s = 0.0
    for _ in PROMPTS:
        _filled(engine, 1, ANSWER_TOKENS, PROMPT_TOKENS // 2)
        while engine.has_work:
            spent_s += _timed(engine.step)
    unit = f"s CPU, one in {spent_s / PROBE_SHARE:.0f} s is paid"
    return Row(figure=f"probes_{here.slug}_s", value=spent_s, unit=unit, better="lower")


def _filled(engine: Engine, batch: int, tokens: int, prompt: int = PROMPT_TOKENS) -> None:
    """So many greedy answers under way, each past its prompt if it is longer than a few tokens."""
    sampling = SamplingParameters(max_tokens=min(tokens, 8_192 // batch - prompt - 32), temperature=0.0)
    for n in range(batch):
        ids = tuple(1 + (n * 101 + at * 17) % 900 for at in range(prompt))
        engine.add(GenerationRequest(request_id=f"{n}", prompt=ids, sampling=sampling))
    for _ in range(4 if tokens > ANSWER_TOKENS else 0):
        engine.step()


def _timed(act: Callable[[], object]) -> float:
    began_s = time.process_time()
    act()
    return time.process_time() - began_s


if __name__ == "__main__":
    sys.exit(main())
