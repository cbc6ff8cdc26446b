"""`python -m bench.rules`: what merging a round costs: each rule on dense and on sparse payloads, and a whole sparse
round.

Rules: CPU seconds of this process with one torch thread, the least of a few runs; 25.5M parameters, four contributors,
as in TRAINING.md 2 and 7. Payloads are encoded and checked as they are in a round; nothing is sent. Memory is by how
much a rule raises the peak of this process (Linux counts it), with payloads and the update's own vector already there.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench.harness import Row, options, report
from model.codecs import codec_named, decode, encode
from model.delta import Codec, Delta, Sections
from model.evidence import norm, overlaps
from model.gate import ONE
from model.merge import Contribution, OuterStep, merge
from model.rules import BY_ORDER, Rule, contributors_min

ELEMENTS = 25_500_000
CONTRIBUTORS = 4
HIVEMIND = "hivemind 1.1.12, 4 peers, fp16"  # the whole averaging round, network included: TRAINING.md 7
HIVEMIND_CPU_S = 1.03


def main() -> None:
    """Measure and report."""
    chosen = options(__doc__)
    torch.set_num_threads(1)
    runs = 1 if chosen.quick else 5
    update_N = torch.zeros(ELEMENTS)
    rows: list[Row] = []
    for name in ("ef64.2b", "int8"):
        rows += rows_of_codec(codec_named(name), update_N, runs)
    report("rules", rows, chosen)


def rows_of_codec(codec: Codec, update_N: torch.Tensor, runs: int) -> list[Row]:
    """Every rule on payloads of this codec, and a whole round if it is sparse."""
    sent: list[Sections] = []
    encode_s = []
    for seed in range(1, CONTRIBUTORS + 1):
        vector_N = vector_of(seed)
        encode_s.append(cpu_s(partial(encode_into, sent, vector_N, codec)))
        del vector_N

    def receive() -> list[Delta]:
        return [decode(each, codec, ELEMENTS) for each in sent]

    deltas = receive()
    rows = rows_of_rules(codec.name, deltas, update_N, runs)
    return rows + rows_of_round(min(encode_s), receive, update_N, runs) if deltas[0].sparse else rows


def encode_into(sent: list[Sections], vector_N: torch.Tensor, codec: Codec) -> None:
    """Encode one payload."""
    sent.append(encode(vector_N, codec))


def vector_of(seed: int) -> torch.Tensor:
    """A delta that has a part in common with every other, heavy in the tails as real ones are."""
    made = np.random.default_rng(seed).standard_normal(ELEMENTS, np.float32)
    made += np.random.default_rng(0).standard_normal(ELEMENTS, np.float32)
    made *= np.abs(made)
    return torch.from_numpy(made)


def rows_of_rules(name: str, deltas: Sequence[Delta], update_N: torch.Tensor, runs: int) -> list[Row]:
    """CPU seconds of each rule that can be used on them, clip factors at work."""
    contributions = [Contribution(delta=delta, clip_parts=ONE - 1 - at) for at, delta in enumerate(deltas)]
    rows = []
    for rule in Rule:
        few = rule is Rule.MULTI_KRUM and len(deltas) < contributors_min(rule, len(deltas), None)
        if few or (deltas[0].sparse and rule in BY_ORDER):
            continue
        forget_peak()
        before = peak_mib()
        work = partial(merge, contributions, rule, out_N=update_N)
        seconds = min(cpu_s(work) for _ in range(runs))
        rows.append(Row(figure=f"{name} {rule}", value=seconds, unit="CPU-s", better="lower"))
        rows.append(Row(figure=f"{name} {rule}: memory", value=peak_mib() - before, unit="MiB", better="lower"))
    return rows


def rows_of_round(
    encode_s: float, decode_all: Callable[[], list[Delta]], update_N: torch.Tensor, runs: int
) -> list[Row]:
    """What one peer spends on a sparse round from its own delta to its new parameters, network and signatures aside."""
    theta_N = torch.zeros(ELEMENTS)
    deltas: list[Delta] = []

    def gather() -> None:
        deltas[:] = decode_all()

    parts: dict[str, Callable[[], object]] = {
        "check payloads": gather,
        "norms": lambda: [norm(delta) for delta in deltas],
        "copies": lambda: overlaps(deltas),
        "merge": lambda: merge([Contribution(delta=each) for each in deltas], Rule.MEAN_NONZERO, out_N=update_N),
        "outer step": lambda: OuterStep(1.0).step_(theta_N, update_N),
    }
    spent = {part: min(cpu_s(work) for _ in range(runs)) for part, work in parts.items()}
    whole = Row(
        figure="sparse round, whole",
        value=encode_s + sum(spent.values()),
        unit="CPU-s",
        better="lower",
        rival=HIVEMIND,
        rival_value=HIVEMIND_CPU_S,
    )
    spent = {"encode": encode_s, **spent}
    rows = [
        Row(figure=f"sparse round: {part}", value=took, unit="CPU-s", better="lower") for part, took in spent.items()
    ]
    return [*rows, whole]


def cpu_s(work: Callable[[], object]) -> float:
    """CPU seconds of this process that one call takes."""
    before = time.process_time()
    work()
    return time.process_time() - before


def peak_mib() -> float:
    """The most memory that this process has held since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def forget_peak() -> None:
    """Linux counts the peak anew from what is held now; what the C library keeps in reserve is given back before."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()
