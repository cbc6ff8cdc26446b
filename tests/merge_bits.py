"""Merges a made round by every rule in this process, and prints what came out as digests: run by test_merge_bits.py
under other SIMD paths and numbers of threads (`python -m tests.merge_bits THREADS`)."""

from __future__ import annotations

import hashlib
import json
import sys

import numpy as np
import torch

from model.delta import CHUNK, Delta
from model.evidence import gram, norm, overlaps
from model.gate import ONE
from model.merge import SLICE_SUM, Contribution, OuterStep, Vector, merge
from model.rules import BY_ORDER, Rule
from tests.made_deltas import Plain, top_k

N = SLICE_SUM + 3 * CHUNK + 77  # two slices and a tail that fills no vector register
PEERS = 7
STEPS = 3


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def made(seed: int) -> tuple[list[Delta], list[Delta], list[Delta]]:
    """Dense, sparse, and the same sparse deltas without their short way."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(N)
    vectors = [common + 10.0 ** rng.uniform(-3, 0.2) * rng.standard_normal(N) for _ in range(PEERS)]
    for vector in vectors:
        vector[rng.random(N) < 0.05] = 0.0
        vector[rng.random(N) < 0.05] = -0.0
    vectors[-1] *= -1.0
    sparse = [top_k(vector) for vector in vectors]
    return [Vector(torch.from_numpy(each.astype(np.float32))) for each in vectors], [*sparse], [Plain(d) for d in sparse]


def outcome(rounds: list[list[Delta]], rule: Rule, momentum: float) -> list[str]:
    """Digests of the last update and of the parameters after all rounds, and the plan's factors."""
    theta = torch.from_numpy(np.random.default_rng(0).standard_normal(N).astype(np.float32))
    outer = OuterStep(0.7, momentum)
    for deltas in rounds:
        contributions = [
            Contribution(delta=delta, weight_parts=ONE + 12_345 * at, clip_parts=ONE - 54_321 * at)
            for at, delta in enumerate(deltas)
        ]
        merged = merge(contributions, rule)
        outer.step_(theta, merged.update)
    return [digest(merged.update), digest(theta), merged.plan.rule, *(each.hex() for each in merged.plan.factors)]


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    rounds = [made(seed) for seed in range(STEPS)]
    found: dict[str, object] = {"capability": torch.backends.cpu.get_cpu_capability()}
    for at, kind in enumerate(("dense", "sparse", "plain")):
        deltas = [each[at] for each in rounds]
        for rule in Rule:
            if kind == "dense" or rule not in BY_ORDER:
                found[f"{kind} {rule}"] = outcome(deltas, rule, 0.9 if rule is Rule.MEAN else 0.0)
        found[f"{kind} norms"] = [norm(delta).hex() for delta in deltas[0]]
        found[f"{kind} gram"] = [product.hex() for row in gram(deltas[0]) for product in row]
    found["overlaps"] = list(overlaps(rounds[0][1]).values())
    first, second = (delta.dense(0, N) for delta in rounds[0][0][:2])
    found["fused"] = digest(first.add(second, alpha=-0.7))
    found["zeros"] = digest(torch.minimum(first * 0.0, second * 0.0))
    found["sum"] = float(first.double().square().sum()).hex()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
