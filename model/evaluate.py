"""Held-out loss of a model, and the score of a delta: how far a share of it lowers that loss.

Rules: deterministic: fp32, no dropout, one row a forward pass, sums in fp64 in the order of the rows. A generator
yields after each row, so that serving can go in between; whatever ends it, weights and mode are again, to the bit, what
they were. Scores are this node's own judgement on its own held-out rows: they agree with nobody's.
Legend: N elements of the flat vector, B rows, T tokens of a row.
Source: TRAINING.md 4; Gauntlet, "Incentivizing Permissionless Distributed Learning of LLMs" (arXiv 2505.21684).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from model.delta import CHUNK, Delta
from model.errors import BadText, Diverged
from model.evidence import norm
from model.tokens import Tokens
from model.train import Trainer, next_token_loss

SHARE = 0.2  # of a delta that a score applies: of the whole, eight rows rejected 7 of 8 honest peers
SCORE_ROWS_MIN = 16
ROWS_MAX = 1_024  # some minutes of a volunteer's machine
SLICE = CHUNK << 8  # elements of a delta decoded at once, 4 MiB
LOSS_NATS_MAX = 100.0  # stands for a loss that is not finite: no wire form carries infinity


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutLoss:
    """nats_per_token: mean over `tokens` predicted ones; not above LOSS_NATS_MAX."""

    nats_per_token: float
    tokens: int

    def bits_per_byte(self, text_bytes: int) -> float:
        """For the bytes that those tokens stand for (bytes_predicted): compares models of different tokenizers."""
        return self.nats_per_token * self.tokens / math.log(2) / text_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """fall_nats: by how much a token's held-out loss fell from before_nats with `share` of a delta; below 0 is harm."""

    fall_nats: float
    before_nats: float
    share: float


def held_out_loss(model: Any, ids_BT: torch.Tensor) -> Generator[None, None, HeldOutLoss]:
    """Yields after each of the rows, ROWS_MAX at most; returns the loss."""
    assert 0 < len(ids_BT) <= ROWS_MAX, f"{len(ids_BT)} rows, wanted 1 to {ROWS_MAX}"
    device = next(model.parameters()).device
    was_training = model.training
    nats, tokens = 0.0, (ids_BT.shape[1] - 1) * len(ids_BT)
    model.eval()
    try:
        for ids_T in ids_BT:
            with torch.no_grad():
                nats += float(next_token_loss(model, ids_T[None].to(device))) * (len(ids_T) - 1)
            yield
    finally:
        model.train(was_training)
    loss = nats / tokens
    return HeldOutLoss(nats_per_token=loss if loss < LOSS_NATS_MAX else LOSS_NATS_MAX, tokens=tokens)  # NaN too


def scoring(
    trainer: Trainer,
    deltas: Iterable[Delta],
    ids_BT: torch.Tensor,
    *,
    share: float = SHARE,
    before_nats: float | None = None,
    norm_max: float = math.inf,
) -> Generator[Score | None, None, None]:
    """Judges deltas one after the other, applied to the start of the trainer's round. Yields None after each row, and
    the Score after each delta, in their order. From the first yield to the end the trainer must not be stepped.

    before_nats: the loss of the start on these rows, if it is known.
    norm_max: a longer delta is first brought down to it, as the merge does by the median norm: ten times a delta turned
    round may well lower the loss that it raises once it is clipped. Own delta's norm will do, which nobody else can
    choose.

    Raises BadText (fewer than SCORE_ROWS_MIN rows), Diverged (the start itself has no finite loss).
    """
    assert norm_max > 0.0, f"a norm of at most {norm_max}"
    if len(ids_BT) < SCORE_ROWS_MIN:
        raise BadText(
            f"a score needs {SCORE_ROWS_MIN} held-out rows and this text has {len(ids_BT)}: give "
            f"{math.ceil(SCORE_ROWS_MIN / len(ids_BT))} times as much text, or shorter rows"
        )
    own_N = trainer.layout.flatten(trainer.named)
    trainer.model.eval()
    try:
        before = before_nats
        if before is None:
            trainer.layout.load_into(trainer.named, trainer.start_vector_N)
            before = (yield from held_out_loss(trainer.model, ids_BT)).nats_per_token
        if before >= LOSS_NATS_MAX:
            raise Diverged("the weights that this round began with have no finite held-out loss; join the run anew")
        for delta in deltas:
            applied = share if norm_max == math.inf else share * (norm_max / max(norm(delta), norm_max))
            trainer.layout.load_into(trainer.named, _moved(trainer.start_vector_N, delta, applied))
            after = (yield from held_out_loss(trainer.model, ids_BT)).nats_per_token
            yield Score(fall_nats=before - after, before_nats=before, share=applied)
    finally:
        trainer.layout.load_into(trainer.named, own_N)
        trainer.model.train()


def score(
    trainer: Trainer, delta: Delta, ids_BT: torch.Tensor, *, share: float = SHARE, norm_max: float = math.inf
) -> Score:
    """`scoring` of one delta, at once. Raises BadText, Diverged."""
    *_, last = scoring(trainer, (delta,), ids_BT, share=share, norm_max=norm_max)
    assert last is not None
    return last


def bytes_predicted(ids_BT: torch.Tensor, tokens: Tokens) -> int:
    """UTF-8 bytes of all tokens but the first of each row. A character cut at a row's edge counts as three."""
    rows = [row.tolist() for row in ids_BT]
    return sum(len(tokens.decode(row).encode()) - len(tokens.decode(row[:1]).encode()) for row in rows)


def _moved(start_N: torch.Tensor, delta: Delta, share: float) -> torch.Tensor:
    """start - share * delta, decoded slice by slice: delta is start - end."""
    assert delta.n == len(start_N), f"the delta has {delta.n} elements, the layout {len(start_N)}"
    moved_N = start_N.clone()
    for begin in range(0, delta.n, SLICE):
        end = min(begin + SLICE, delta.n)
        moved_N[begin:end] -= delta.dense(begin, end) * share
    return moved_N
