"""Training whose deltas tell little of any one row: each row's gradient is clipped, and noise is added once a step.

Rules: a PrivateTrainer has a Trainer's face. What is protected is ONE ROW (context + 1 tokens): whether it was in the
text or not changes the odds of any outcome by e^epsilon at most, but for delta. Weights, moments and deltas are
protected; what is counted, and what is not: docs/PRIVACY.md. The rows of a step are drawn by Poisson sampling, each by
itself with rate rows x accumulation / training rows, and no draw is cut or filled: a step takes as many micro-batches
as its rows need, one at least, and a step without rows adds noise all the same. That is what the accountant's
amplification by sampling needs; the permuted order of model/batches.py would not do, and is not used. The sum is
divided by the EXPECTED number of rows. Which rows, and the noise, come from the system's secure generator, never from a
seed: torch's generator on a CPU takes 32 bits of its seed, which anybody can try out. They are kept nowhere, so that no
restart repeats noise over other gradients; from a saved state training goes on, though not to the bit, and steps
retaken are charged again. A row whose loss or gradient is not finite adds nothing (to skip the step would tell of it).
One row at a time goes through the model: its gradient is its own whatever the layers are, tied or not, and no B x N
numbers are held. opacus's own gradients of each row of a batch (GradSampleModule) give the same sum where they apply,
which a test holds; they took 1.15 to 1.3 times as long on a CPU, and are wrong for GPT-2's positions (one row for all)
and for padding tokens (whose embedding torch leaves alone).
Noise is computed in fp64 and rounded once, with the sum, to fp32. Against attacks on the grid of floating-point numbers
(Mironov 2012) that is a hardening and no proof.
Legend: N elements of the flat vector, B rows, T tokens of a row.
Source: Abadi et al., "Deep Learning with Differential Privacy" (arXiv 1607.00133), algorithm 1; Box and Muller 1958.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from msgspec import structs

from model.batches import Batches
from model.budget import Budget
from model.config import TrainConfig
from model.errors import FOREIGN, BadInput, BadModel, BadState, BudgetSpent, BudgetUnsaved, Diverged
from model.train import MicroStep, Trainer, compute_error, next_token_loss
from model.train_state import Course, Numbers

NOISE_BLOCK: Final = 1 << 20  # elements of noise at once: some 40 MB on their way
WORD_BYTES: Final = 8
SLACK: Final = 1e-6  # below clip_norm, so that rounding to fp32 never brings a row above it
Chance = Callable[[int], bytes]  # so many secret random bytes


class PrivateTrainer(Trainer):
    """A Trainer with example-level differential privacy."""

    def __init__(
        self,
        model: Any,
        batches: Batches,
        config: TrainConfig,
        budget: Budget,
        *,
        chance: Chance = secrets.token_bytes,
        clock: Callable[[], float] = time.process_time,
    ) -> None:
        """As Trainer's. budget: the one of this text. chance: for tests alone to replace.

        Raises BadModel (also: layers with running statistics), BadInput (also: a step of more rows than there are; a
        delta that gives whole rows away).
        """
        expected = batches.rows * config.accumulation
        if expected > batches.training_rows:
            raise BadInput(
                f"a private step draws {expected:,} rows on average, and the text has {batches.training_rows:,} to "
                "train on; choose fewer rows or less accumulation"
            )
        if budget.config.delta * batches.training_rows >= 1.0:
            raise BadInput(
                f"a delta of {budget.config.delta:g} would allow giving away one whole row of {batches.training_rows:,}"
                f"; choose one well below {1 / batches.training_rows:.1g}"
            )
        if budget.context != batches.context:
            raise BadInput(
                f"the budget is about rows of {budget.context:,} tokens, and these have {batches.context:,}; train "
                "with that context"
            )
        for layer in model.modules():
            if getattr(layer, "track_running_stats", False):
                raise BadModel(
                    f"{type(layer).__name__} keeps statistics of the rows where no noise reaches them; train another "
                    "model, or without privacy"
                )
        super().__init__(model, batches, config, clock=clock)
        self.rate = expected / batches.training_rows
        self._expected = expected
        self._budget = budget
        self._chance = chance
        self._sums = {
            name: torch.zeros_like(p, memory_format=torch.contiguous_format) for name, p in self.named.items()
        }
        self._drawn: list[int] | None = None  # the rows of the step under way
        self._usable = 0  # of those that were done
        self._unusable = 0

    @property
    def unusable_rows(self) -> int:
        """Rows so far that added nothing, since their numbers were not finite. Of the text itself: not to be sent."""
        return self._unusable

    def spent(self) -> float:
        """Epsilon at the budget's delta, of all steps charged to it."""
        return self._budget.spent()

    def micro_step(self) -> MicroStep:
        """At most `rows` of the rows drawn; with the last of a step noise, and the optimiser's turn.

        loss is that of the rows, NaN without any, and NOT private: it stays here. tokens are those of an average step,
        told with its last micro-batch: the true number would tell of the draw. grad_norm is of the noised gradient.
        Raises BudgetSpent before a step is begun, BudgetUnsaved before it is taken, and what Trainer's raises.
        """
        one = super().micro_step()
        ended = one.stepped or one.skipped
        return replace(one, tokens=self._expected * self._batches.context if ended else 0)

    def _course(self) -> Course:
        # so that no state of a plain trainer is gone on from: its weights hold steps without noise
        return structs.replace(super()._course(), privacy=True)

    def _check_saved(self, numbers: Numbers) -> None:
        if self._budget.steps < numbers.step:
            raise BadState(
                f"the saved state has taken {numbers.step:,} private steps, and the ledger knows "
                f"{self._budget.steps:,}: it is lost or an older copy; put back the newest one"
            )

    def _next_rows(self) -> tuple[int, torch.Tensor]:
        if self._drawn is None:
            self._budget.check(self.rate)
            self._drawn = poisson(self._batches.training_rows, self.rate, self._chance)
        begin = self._micro * self._batches.rows
        return self._micro, self._batches.training(self._drawn[begin : begin + self._batches.rows])

    def _is_last(self) -> bool:
        assert self._drawn is not None
        return self._micro * self._batches.rows >= len(self._drawn)

    def _forward_backward(self, ids_BT: torch.Tensor, index: int) -> float:
        """Adds each row's clipped gradient to the sums; the mean loss of those that were usable."""
        rows = (ids_BT[row : row + 1] for row in range(len(ids_BT)))
        losses = [loss for ids_1T in rows if (loss := self._add_row(ids_1T)) is not None]
        self._usable += len(losses)
        self._unusable += len(ids_BT) - len(losses)
        return math.fsum(losses) / len(losses) if losses else math.nan

    def _add_row(self, ids_1T: torch.Tensor) -> float | None:
        """The row's loss; None when it is unusable and nothing was added."""
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int.from_bytes(self._chance(WORD_BYTES), "big") >> 1)  # dropout's
            with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._autocast):
                loss = next_token_loss(self.model, ids_1T)
            if not math.isfinite(value := loss.item()):
                return None
            torch.autograd.backward(loss)
        found = {name: p.grad for name, p in self.named.items() if p.grad is not None}
        self._optimizer.zero_grad(set_to_none=True)
        norm = _norm(found.values())
        if not math.isfinite(norm):
            return None
        clip_norm = self._budget.config.clip_norm
        factor = 1.0 if norm <= clip_norm else clip_norm / norm * (1.0 - SLACK)
        for name, gradient in found.items():
            self._sums[name].add_(gradient, alpha=factor)
        return value

    def _end_step(self) -> float:
        """Charge, noise, the optimiser's turn. Raises BudgetSpent, BudgetUnsaved, Diverged."""
        try:
            if self._usable == 0 and not all(torch.isfinite(p).all() for p in self.named.values()):
                raise Diverged("training ends: the weights are not finite; start from the run's weights")
            self._budget.charge(self.rate)
        except (BudgetSpent, BudgetUnsaved, Diverged):
            self._drop_gradients()
            raise
        privacy = self._budget.config
        deviation = privacy.noise_multiplier * privacy.clip_norm if privacy.noise_multiplier else 0.0
        try:
            for name, parameter in self.named.items():
                if deviation:
                    add_noise(self._sums[name], deviation, self._chance)
                parameter.grad = self._sums[name].div_(self._expected)
        except FOREIGN as exc:
            self._drop_gradients()
            raise compute_error(exc, self._step) from exc
        return super()._end_step()

    def _drop_gradients(self) -> None:
        super()._drop_gradients()
        for total in self._sums.values():
            total.zero_()
        self._drawn, self._usable = None, 0


def poisson(count: int, rate: float, chance: Chance) -> list[int]:
    """Which of 0 to count - 1 are drawn, each by itself with probability rate (2^-64 less at most). Sorted."""
    if rate >= 1.0:
        return list(range(count))
    words = np.frombuffer(chance(WORD_BYTES * count), dtype="<u8")
    drawn: list[int] = np.flatnonzero(words < np.uint64(int(rate * 2.0**64))).tolist()
    return drawn


def add_noise(total: torch.Tensor, deviation: float, chance: Chance) -> None:
    """Adds Gaussian noise of this standard deviation to each element, in place."""
    flat_N = total.view(-1)
    for start in range(0, len(flat_N), NOISE_BLOCK):
        part_N = flat_N[start : start + NOISE_BLOCK]
        noise_N = torch.from_numpy(gaussian(len(part_N), chance) * deviation)
        part_N.copy_(part_N.cpu().double() + noise_N)


def gaussian(count: int, chance: Chance) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Independent standard normal numbers, fp64: Box-Muller over secret bits, 53 of them for each number."""
    pairs = (count + 1) // 2
    words = np.frombuffer(chance(WORD_BYTES * 2 * pairs), dtype="<u8") >> np.uint64(11)
    radius = np.sqrt(-2.0 * np.log((words[:pairs] + np.uint64(1)) * 2.0**-53))  # of (0, 1]: there is a logarithm
    angle = words[pairs:] * (2.0 * np.pi * 2.0**-53)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def _norm(gradients: Iterable[torch.Tensor]) -> float:
    """The norm of all of them together, summed in fp64 where the device has it."""
    norms = [
        torch.linalg.vector_norm(g, dtype=torch.float32 if g.device.type == "mps" else torch.float64) for g in gradients
    ]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
