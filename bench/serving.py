"""`python -m bench.serving`: our engine beside transformers' own serving and llama.cpp, one thread each, turn by turn.

Rules: a Llama of 60M (hidden 512, 8 layers, 8 heads, vocabulary 32,000) with random weights, on a CPU; our engine in a
plain loop in this process, rivals in processes of their own, in the same minutes (bench/serving_parts.py says how turns
are taken). CPU-seconds are those of the process that does the work; ours make text of tokens too, rivals do not.

    --rivals transformers,llamacpp:/tmp/llama-bench/bin/python   bench/serving_rivals.py says how to make that Python
    --only batch,served,users,prefix,lag                         parts
    --kinds bf16,int8                                            of our linear layers
    --shape tiny                                                 seconds: shows that all runs, measures nothing
    --soak SECONDS                                               mixed load, cancels, overload: what is left at the end
    --device cuda                                                decoding on a GPU: 1B and 8B, over the memory's speed

Source: MEASURE.md (serving), SERVING.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as a node does, before torch
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch

from bench.harness import Options, Row, report
from bench.serving_asks import SHAPES
from bench.serving_cuda import cuda_rows
from bench.serving_model import kinds_to_measure, served
from bench.serving_parts import FULL, PARTS, QUICK, TINY, Bench, checked_invariance
from bench.serving_rivals import DEFAULT, command_of, opened
from bench.serving_soak import judged, soaked
from model.linears import kinds_here

GOALS: Final = {  # MEASURE.md; figures that are no ratios are of the machine of SERVING.md
    "e2e_b16_bf16_ratio": (">=", 1.3), "e2e_b16_int8_ratio": (">=", 1.5), "e2e_b1_ratio": (">=", 2.2),
    "decode_b16_bf16_tok_per_cpu_s": (">=", 560.0), "decode_b16_int8_tok_per_cpu_s": (">=", 650.0),
    "served_load_ratio": (">=", 2.0), "served_load_int8_ratio": (">=", 2.8), "served_load_ttft_ratio": ("<=", 0.5),
    "served_load_int8_ttft_ratio": ("<=", 0.5), "ttft_16_users_ratio": ("<=", 2.0), "prefix_reuse_ratio": (">=", 5.0),
    "llamacpp_b1_bf16_ratio": (">=", 0.6), "llamacpp_b1_q8_0_ratio": (">=", 0.6),
    "llamacpp_b16_bf16_ratio": (">=", 1.0), "llamacpp_b16_q8_0_ratio": (">=", 1.1), "loop_lag_p99_ms": ("<=", 10.0),
    "bound_1b_b1_ratio": (">=", 0.6), "bound_8b_b1_ratio": (">=", 0.6),
}  # fmt: skip


def main() -> int:
    """Measure and report. 0, or 1 when a soak found something."""
    chosen = _arguments()
    options = Options(quick=chosen.quick, json_path=chosen.json)
    if chosen.device == "cuda":
        rows = cuda_rows(quick=chosen.quick, seed=chosen.seed, note=note)
        report("serving_cuda", rows, options)
        tell_goals(rows)
        return 0
    torch.set_num_threads(1)
    kind = chosen.kinds[0]
    if chosen.soak:
        rows, faults = soaked(served(SHAPES[chosen.shape], kind), SHAPES[chosen.shape], chosen.soak, chosen.seed)
        report("serving_soak", rows, options)
        print(
            "\n".join(f"FAULT: {fault}" for fault in faults)
            or f"verdict: nothing is left; memory {judged(chosen.soak)}"
        )
        return 1 if faults else 0
    rows = measure(chosen)
    report("serving", rows, options)
    if chosen.shape == "60m":
        tell_goals(rows)
    return 0


def measure(chosen: argparse.Namespace) -> list[Row]:
    """All figures of the parts that are asked for, on a CPU."""
    shape = SHAPES[chosen.shape]
    pace = TINY if chosen.shape == "tiny" else QUICK if chosen.quick else FULL
    with opened(chosen.rivals, chosen.shape, note) as rivals:
        ours = [served(shape, kind) for kind in chosen.kinds]
        bench = Bench(shape=shape, ours=ours, rivals=rivals, pace=pace, seed=chosen.seed, note=note)
        rows = checked_invariance(bench)
        for part in chosen.only:
            print(f"part {part}", flush=True)
            rows += PARTS[part](bench)
    return rows


def tell_goals(rows: Sequence[Row]) -> None:
    """What was wanted of these figures, and whether it is reached."""
    for row in rows:
        if row.figure in GOALS:
            sign, bound = GOALS[row.figure]
            is_reached = row.value >= bound if sign == ">=" else row.value <= bound
            print(f"{'reached' if is_reached else 'SHORT'}: {row.figure} {row.value:.3g}, wanted {sign} {bound:g}")


def note(text: str) -> None:
    """To the errors, beside the table."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="at most two minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--rivals", type=_listed, default=[DEFAULT], help=f"default {DEFAULT}; '' for none")
    parser.add_argument("--only", type=_listed, default=list(PARTS), metavar="PARTS", help="default all")
    parser.add_argument("--kinds", type=_listed, default=list(kinds_to_measure()), help="default all fast ones")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="60m")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--soak", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    chosen = parser.parse_args()
    kinds = kinds_here() if chosen.device == "cpu" else chosen.kinds
    for name, given, known in (("--only", chosen.only, PARTS), ("--kinds", chosen.kinds, kinds)):
        if wrong := [each for each in given if each not in known] or (not given and ["nothing"]):
            parser.error(f"{name} {wrong[0]} came, wanted some of {', '.join(known) or 'none: no packed layers here'}")
    try:
        for rival in chosen.rivals:
            command_of(rival, chosen.shape)
    except ValueError as exc:
        parser.error(str(exc))
    return chosen


def _listed(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


if __name__ == "__main__":
    sys.exit(main())
