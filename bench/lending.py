"""`python -m bench.lending`: what a client feels of a node that trains: latency of answers, with training and without.

Rules: one real node with the embedded model, which trains alone on a text made here, with the defaults of
`train start`; one client asks for answers of 64 tokens, one after the other, with a short rest between. Paused and
training take turns, so that a noisy machine is noisy for both. Figures are ratios within this run.
Source: MEASURE.md; the bar is 1.3 (docs/ARCHITECTURE.md "Rounds of training").
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx

from bench.harness import ANEW, Options, Row, options, report
from node.commands.processes import Cluster, NodeProcess

TOKENS = 64
REST_S = 0.3
TURNS, ASKED = 4, 12
WORDS = ("the", "old", "king", "had", "a", "fox", "who", "said", "gold", "snow", "were", "one", "to", "whom", "night")


def asked(node: NodeProcess, count: int) -> list[tuple[float, float]]:
    """(seconds to the first token, seconds in all) of so many answers."""
    found = []
    for number in range(count):
        body = {"prompt": f"Once upon a time {number}", "max_tokens": TOKENS, "stream": True, "temperature": 0}
        began, first = time.perf_counter(), 0.0
        with httpx.stream("POST", f"{node.url}/v1/completions", json=body, headers=ANEW, timeout=120) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if not first and line.startswith("data: {"):
                    first = time.perf_counter() - began
        found.append((first, time.perf_counter() - began))
        time.sleep(REST_S)
    return found


def told(node: NodeProcess, what: str) -> None:
    """Pause or resume, and wait until it is so."""
    httpx.post(f"{node.url}/api/v1/training/{what}", json={}, timeout=60).raise_for_status()
    wanted = "paused" if what == "pause" else "training"
    for _ in range(600):
        if httpx.get(f"{node.url}/api/v1/training", timeout=60).json()["state"] == wanted:
            return
        time.sleep(0.1)
    raise TimeoutError(f"the node is not {wanted} after a minute")


def measure(chosen: Options) -> tuple[list[tuple[float, float]], list[tuple[float, float]], int]:
    """Answers while paused, answers while training, steps that were trained."""
    rng = random.Random(1)
    text = ". ".join(" ".join(rng.choices(WORDS, k=9)) for _ in range(3_000))
    rest, busy = list[tuple[float, float]](), list[tuple[float, float]]()
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder)) as cluster:
        (Path(folder) / "text.txt").write_text(text)
        node = cluster.start("node").wait_ready()
        body = {"name": "lending", "data": [str(Path(folder) / "text.txt")]}
        httpx.post(f"{node.url}/api/v1/training/start", json=body, timeout=120).raise_for_status()
        for _ in range(1 if chosen.quick else TURNS):
            told(node, "pause")
            rest += asked(node, ASKED)
            told(node, "resume")
            busy += asked(node, ASKED)
        steps = httpx.get(f"{node.url}/api/v1/training", timeout=60).json()["work"]["steps"]
    return rest, busy, steps


def main() -> int:
    """Measure, report."""
    chosen = options(__doc__)
    rest, busy, steps = measure(chosen)
    rows = list[Row]()
    for name, place in (("first_token", 0), ("answer", 1)):
        plain, trained = ([each[place] for each in found] for found in (rest, busy))
        rows.append(
            Row(figure=f"{name}_p50_s", value=statistics.median(trained), unit="s, while it trains", better="lower",
                rival="paused", rival_value=statistics.median(plain))
        )  # fmt: skip
        rows.append(
            Row(figure=f"{name}_p95_s", value=_p95(trained), unit="s, while it trains", better="lower", rival="paused",
                rival_value=_p95(plain))
        )  # fmt: skip
    rows.append(Row(figure="steps_between", value=steps, unit="steps trained meanwhile", better="higher"))
    report("lending", rows, chosen)
    return 0


def _p95(values: list[float]) -> float:
    return sorted(values)[int(0.95 * (len(values) - 1))]


if __name__ == "__main__":
    sys.exit(main())
