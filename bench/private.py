"""`python -m bench.private`: what private training costs, in CPU seconds, in held-out loss, and in epsilon.

Rules: one node, a byte model of 0.2M parameters on the books of bench/learning.py, one start, and as many rows a step
(on average, where they are drawn) for the plain trainer and each setting of the private one. Epsilon is at delta 1e-6,
for one row of 65 bytes added or removed; nothing is refused. `--quick`: a tenth of the steps.
"""

from __future__ import annotations

import math
import secrets
import time
from dataclasses import dataclass

import torch

from bench.harness import Row, options, report
from bench.learning import INNER, SEED, TEXT, Scale, Shards, byte_model, shards_of
from model.budget import Budget
from model.config import PrivacyConfig, TrainConfig
from model.corpus import read_text
from model.evaluate import held_out_loss
from model.private import PrivateTrainer, add_noise
from model.train import Trainer

SCALE = Scale(workers=1, rows=8, context=64, width=64, layers=3)
ACCUMULATION = 8
STEPS = 150
CLIP_NORM = 0.5
DELTA = 1e-6
NOISES = (0.6, 1.0)
NOISE_ELEMENTS = 4_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """nats: held out, a token. cpu_s: a row that was trained on, the optimiser's turn and noise among them."""

    nats: float
    cpu_s: float
    epsilon: float


def run(trainer: Trainer, shards: Shards, steps: int) -> Outcome:
    """So many steps, then the held-out loss."""
    rows, cpu_s = 0, 0.0

    def count(_model: object, _arguments: object, given: dict[str, torch.Tensor]) -> None:
        nonlocal rows
        rows += len(given["input_ids"])

    handle = trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    while trainer.step < steps:
        cpu_s += trainer.micro_step().cpu_s
    handle.remove()
    epsilon = trainer.spent() if isinstance(trainer, PrivateTrainer) else math.inf
    return Outcome(nats=_loss(trainer, shards), cpu_s=cpu_s / rows, epsilon=epsilon)


def _loss(trainer: Trainer, shards: Shards) -> float:
    walk = held_out_loss(trainer.model, shards.held_out)
    while True:
        try:
            next(walk)
        except StopIteration as end:
            return float(end.value.nats_per_token)


def noise_ns() -> float:
    """CPU nanoseconds an element of noise."""
    began = time.process_time()
    add_noise(torch.zeros(NOISE_ELEMENTS), 1.0, secrets.token_bytes)
    return (time.process_time() - began) / NOISE_ELEMENTS * 1e9


def main() -> None:
    """Trains three times from one start."""
    chosen = options(__doc__)
    torch.set_num_threads(1)
    steps = STEPS // 10 if chosen.quick else STEPS
    shards = shards_of(read_text(TEXT), SCALE)
    (batches,) = shards.workers
    config = TrainConfig(seed=SEED, accumulation=ACCUMULATION, **INNER)  # type: ignore[arg-type]  # fits
    plain = run(Trainer(byte_model(SCALE), batches, config), shards, steps)
    rows = [Row(figure="loss_plain", value=plain.nats, unit="nats, held out", better="lower")]
    for noise in NOISES:
        privacy = PrivacyConfig(noise_multiplier=noise, clip_norm=CLIP_NORM, delta=DELTA, epsilon_max=math.inf)
        budget = Budget(privacy, context=SCALE.context, save=lambda content: True)
        found = run(PrivateTrainer(byte_model(SCALE), batches, config, budget), shards, steps)
        name = f"noise_{noise:g}"
        rows += [
            Row(
                figure=f"loss_{name}",
                value=found.nats,
                unit="nats, held out",
                better="lower",
                rival="plain",
                rival_value=plain.nats,
            ),
            Row(figure=f"epsilon_{name}", value=found.epsilon, unit=f"after {steps} steps", better="lower"),
            Row(
                figure=f"cpu_ms_row_{name}",
                value=found.cpu_s * 1e3,
                unit="ms a row",
                better="lower",
                rival="plain",
                rival_value=plain.cpu_s * 1e3,
            ),
        ]
    rows.append(Row(figure="noise_ns", value=noise_ns(), unit="ns an element", better="lower"))
    report("private", rows, chosen)


if __name__ == "__main__":
    main()
