"""How open the next token was: entropy and margin of the model's own distribution, summed over tokens that it chose.

Rules: of softmax(logits) at temperature 1, before penalties, top-k, top-p and min-p: what the model itself gave to each
token, however a request then has it chosen; the same for greedy answers as for drawn ones. Logits are read, never
changed. One token after another, each answer of a step in its turn, and only while all of it has taken at most SHARE of
the steps' time: which tokens are judged follows from the times alone, there is no chance in it. Of short and of crowded
steps fewer are judged. Nothing is judged of requests that are marked private, the node's own probes among them.
Legend: V vocabulary.
Source: Shannon, "A Mathematical Theory of Communication" (1948), section 6. One row at a time: 16 rows of 32,000 logits
at once took four times as long on a CPU (they leave its cache).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import torch

from model.requests import Openness

SHARE: Final = 0.005  # of the steps' time
LEAST: Final = -1_000.0  # below the best logit: exp of it is 0, and 0 times it is 0, which it is not of -infinity


class Judge:
    """The sums of one engine."""

    def __init__(self, clock: Callable[[], float], share: float = SHARE) -> None:
        """clock: seconds; share: of the steps' time that judging may take."""
        self._clock, self._share = clock, share
        self._tokens = self._chosen = self._turn = 0
        self._entropy_nats = self._margin = 0.0
        self._cost_s = self._steps_s = 0.0

    def judge(self, rows: Sequence[torch.Tensor], chosen: int, seconds: float) -> None:
        """Takes in one step: fp32 logits_V of the tokens that may be judged, how many tokens were chosen in all, and
        what the step took. To be called when the device has nothing left to do for the step."""
        self._chosen += chosen
        self._steps_s += seconds
        begin = self._turn % len(rows) if rows else 0
        for logits_V in (*rows[begin:], *rows[:begin]):
            if self._cost_s > self._share * self._steps_s:
                return
            began = self._clock()
            entropy_nats, margin = openness_of(logits_V)
            if math.isfinite(entropy_nats) and math.isfinite(margin):
                self._tokens += 1
                self._entropy_nats += entropy_nats
                self._margin += margin
            self._turn += 1
            self._cost_s += self._clock() - began

    def read(self) -> Openness:
        """All so far."""
        return Openness(
            tokens=self._tokens,
            chosen=self._chosen,
            entropy_sum_nats=self._entropy_nats,
            margin_sum=self._margin,
            cost_s=self._cost_s,
            steps_s=self._steps_s,
        )


@torch.inference_mode()
def openness_of(logits_V: torch.Tensor) -> tuple[float, float]:
    """(entropy in nats, 0 or more; first less second probability, 0 to 1) of softmax(logits); not finite where the
    logits are not. With z = logits - max and s = sum exp z: ln s - (sum z exp z) / s, and (1 - second exp z) / s."""
    assert (logits_V.dtype, logits_V.ndim) == (torch.float32, 1), f"{logits_V.dtype} of shape {logits_V.shape}"
    z_V = (logits_V - logits_V.amax()).clamp_(min=LEAST)
    best = z_V.argmax()
    e_V = z_V.exp()
    total = e_V.sum()
    entropy = total.log() - torch.dot(e_V, z_V) / total
    e_V[best] = 0.0
    entropy_nats, margin = torch.stack((entropy, (1.0 - e_V.amax()) / total)).tolist()
    return max(entropy_nats, 0.0), margin  # rounding may step below 0
