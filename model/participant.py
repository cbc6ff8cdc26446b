"""One member's part in a run, as numbers: what it sends of its own training, what it makes of what the others sent.

Rules: sync, one call at a time. What was sent leaves the error feedback only when the round took it up, so that a round
that did without it loses nothing. Training may go on after the round's update was written: the update stays as it is,
and what came after it is noted once, when the round is over here. What changes the weights is a function of the
committed round alone, in the order of its manifest, so that every member has the same bits; a round whose contributions
make no update leaves them as they are, everywhere alike. A state is the weights as little-endian fp32, then the outer
momentum if the run has one.
Legend: N elements of the run's flat vector, B rows, T tokens of a row.
Source: TRAINING.md 1, 3 and 4.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from crypto.digest import Digest
from model.adapters import AdapterConfig, add_adapters, merged
from model.batches import Batches
from model.budget import Budget
from model.codecs import decode
from model.config import TrainConfig
from model.data import TrainingText
from model.delta import Codec, Delta
from model.errors import BadModel, BadState, BadUpdate, CannotMerge
from model.evaluate import SCORE_ROWS_MIN, SHARE, held_out_loss, scoring
from model.evidence import norm, overlaps_with
from model.feedback import DECAY, Feedback
from model.load import Loaded
from model.merge import Contribution, OuterStep, merge_and_step
from model.private import PrivateTrainer
from model.rules import Rule, check
from model.train import MicroStep, Trainer
from model.train_memory import training_copy
from model.update import Expected, read_update, write_update

FP32_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What a run fixes of the arithmetic. outer_rate, momentum: of the outer step. has_adapters: they alone are
    trained."""

    run: Digest
    codec: Codec
    rule: Rule
    outer_rate: float = 1.0
    momentum: float = 0.0
    has_adapters: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """A member's update, read and sound. norm: of its delta."""

    delta: Delta
    norm: float
    steps: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One share of a committed round that has a weight. Parts of gate.ONE."""

    payload: Payload
    weight_parts: int
    clip_parts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What a round did: by which rule, why, and how far the weights moved (Euclidean)."""

    rule: str
    why: str
    moved: float


class Participant:
    """One run's member over its trainer, whose model is the run's."""

    def __init__(self, trainer: Trainer, course: Course, peer: str) -> None:
        self.trainer, self.course, self._peer = trainer, course, peer
        self.layout = trainer.layout
        self._outer = OuterStep(course.outer_rate, course.momentum)
        self._feedback = Feedback(self.layout.size, decay=DECAY)
        self._sent: Delta | None = None  # announced, and not settled yet
        self._is_unnoted = False  # something was trained in this round that is not in the feedback yet
        self._written_N: torch.Tensor | None = None  # the weights when the update was written, if they went on from it
        self._expected(0, Digest(bytes(32)), peer)  # raises for a codec whose payload would be too large

    # ---- own work ----

    @property
    def is_written(self) -> bool:
        """Whether this round's update is: what is trained from now on is for the next."""
        return self._sent is not None

    def step(self) -> MicroStep:
        """One micro-batch. Raises as Trainer.micro_step."""
        if self.is_written and self._written_N is None:
            self._written_N = self.layout.flatten(self.trainer.named)
        done = self.trainer.micro_step()
        self._is_unnoted = self._is_unnoted or done.stepped
        return done

    def write(self, number: int, base: Digest, *, steps: int, tokens: int) -> bytes:
        """The update that says what was trained in this round. Raises ComputeFailed, and then nothing is noted."""
        assert self._written_N is None, "an announced update stays as it is: what was trained since is for the next"
        expected = self._expected(number, base, self._peer)
        self._note()
        sections = self._feedback.encode(expected.codec)
        self._sent = decode(sections, expected.codec, expected.n)
        return write_update(expected, sections, steps=steps, tokens=tokens)

    @property
    def payload_bytes_max(self) -> int:
        """Of any member's update in this run."""
        return self._expected(0, Digest(bytes(32)), self._peer).limits.bytes_max

    # ---- others' work ----

    def own(self, *, steps: int, tokens: int) -> Payload:
        """What `write` wrote, as `read` would read it."""
        assert self._sent is not None, "nothing was written in this round"
        return Payload(delta=self._sent, norm=norm(self._sent), steps=steps, tokens=tokens)

    def read(self, raw: bytes, number: int, base: Digest, peer: str) -> Payload:
        """What a peer sent in this round. Raises BadUpdate for what every member would refuse."""
        update, delta = read_update(raw, self._expected(number, base, peer))
        size = norm(delta)
        if not size < float("inf"):
            raise BadUpdate(f"the update's norm is {size}: it is not finite")
        return Payload(delta=delta, norm=size, steps=update.steps, tokens=update.tokens)

    def overlaps(self, one: Payload, others: Sequence[Payload]) -> list[float]:
        """With each, the share of indices that both sent, of the lesser; 0 when everything is sent anyway."""
        if not one.delta.sparse:
            return [0.0] * len(others)
        return overlaps_with(one.delta, [other.delta for other in others])

    def judge(self, ids_BT: torch.Tensor) -> Generator[None, None, float]:
        """Yields after each row; the held-out loss, nats a token, of the weights that this round began with.

        The trainer must not be stepped before the end.
        """
        trainer = self.trainer
        own_N = self.layout.flatten(trainer.named)
        try:
            self.layout.load_into(trainer.named, trainer.start_vector_N)
            return (yield from held_out_loss(trainer.model, ids_BT)).nats_per_token
        finally:
            self.layout.load_into(trainer.named, own_N)

    def score(
        self, payload: Payload, ids_BT: torch.Tensor, before_nats: float | None, norm_max: float = math.inf
    ) -> Generator[None, None, float | None]:
        """Yields after each row; by how much the held-out loss falls with a share of it, nats a token.

        before_nats: as `judge` found it on these rows. norm_max: a longer delta is first cut to it. None: there is too
        little held-out text. The trainer must not
        be stepped before the end. Raises Diverged.
        """
        if len(ids_BT) < SCORE_ROWS_MIN:
            return None
        share = SHARE * min(1.0, norm_max / payload.norm) if payload.norm else SHARE
        for score in scoring(self.trainer, (payload.delta,), ids_BT, share=share, before_nats=before_nats):
            if score is not None:
                return score.fall_nats
            yield
        raise AssertionError("scoring ends with a score")

    # ---- rounds ----

    def settle(self, lines: Sequence[Line], *, took_ours: bool) -> Settled:
        """A round is committed: take the weights on by it, in place of what was trained here since.

        took_ours: whether our contribution counts in it; else, or when the round makes no update, it stays in the
        feedback. So does training that is in no update yet.
        """
        self._note()
        theta_N = self.trainer.start_vector_N
        contributions = [
            Contribution(delta=line.payload.delta, weight_parts=line.weight_parts, clip_parts=line.clip_parts)
            for line in lines
        ]
        try:
            made = merge_and_step(contributions, self.course.rule, self._outer, theta_N)
        except CannotMerge as exc:
            rule, why, moved = "none", f"the weights stay: {exc}", 0.0
        else:
            rule, why, moved, theta_N = str(made.plan.rule), made.plan.why, made.moved, made.theta
            if took_ours and self._sent is not None:
                self._feedback.take(self._sent)
        self._begin(theta_N)
        return Settled(rule=rule, why=why, moved=moved)

    def makes_update(self, count: int) -> bool:
        """Whether a round in which so many have a weight changes the weights by the run's rule."""
        try:
            check(self.course.rule, count, self.course.codec.name.startswith("ef"))
        except CannotMerge:
            return False
        return True

    def _note(self) -> None:
        """What was trained since the round began, or since its update was written, goes into the feedback, once."""
        self._add_unnoted(self._feedback)
        self._is_unnoted, self._written_N = False, None

    def _add_unnoted(self, feedback: Feedback) -> None:
        if not self._is_unnoted:
            return
        start_N = self.trainer.start_vector_N if self._written_N is None else self._written_N
        feedback.add_moved(lambda: self.layout.moved(start_N, self.trainer.named), fades=self._written_N is None)

    def _begin(self, theta_N: torch.Tensor) -> None:
        """theta_N: new, or what was before."""
        self.trainer.rebase(theta_N, is_given=True)
        self._sent = None

    # ---- states ----

    @property
    def state_bytes(self) -> int:
        """Of `state`."""
        return FP32_BYTES * self.layout.size * (2 if self.course.momentum else 1)

    def state(self) -> bytes | memoryview:
        """The weights with which this round began, and the outer momentum: the same bytes at every member. To be read
        only; the weights are never changed in place."""
        return state_of(
            self.trainer.start_vector_N, self._outer.velocity if self.course.momentum else None, self.course
        )

    def adopt(self, raw: bytes, *, took_ours: bool = False) -> None:
        """Go on from such bytes. took_ours: as in `settle`, of the round that was open here. Raises BadState, and then
        nothing has changed."""
        if len(raw) != self.state_bytes:
            raise BadState(f"a state of {len(raw):,} bytes came, this run's have {self.state_bytes:,}")
        whole = torch.frombuffer(bytearray(raw), dtype=torch.float32)
        if not whole.isfinite().all():
            raise BadState("the state has numbers that are not finite")
        self._note()
        if took_ours and self._sent is not None:
            self._feedback.take(self._sent)
        if self.course.momentum:
            self._outer.velocity = whole[self.layout.size :].clone()
        self._begin(whole[: self.layout.size].clone())

    def unsent(self) -> bytes:
        """What was trained and not sent yet, to be kept over a restart; nothing changes here.

        What was sent and is not settled counts as sent: most rounds take it, and after a restart nobody could tell.
        """
        kept = Feedback(self.layout.size, decay=DECAY)
        kept.unsent_N.copy_(self._feedback.unsent_N)
        self._add_unnoted(kept)
        if self._sent is not None:
            kept.take(self._sent)
        return kept.save(self.layout.digest)

    def restore_unsent(self, raw: bytes) -> None:
        """Raises BadState."""
        try:
            self._feedback = Feedback.load(raw, self.layout.digest, self.layout.size, decay=DECAY)
        except BadModel as exc:
            raise BadState(str(exc)) from exc

    def weights(self) -> dict[str, torch.Tensor]:
        """What serves under the weights with which this round began: by the names of the plain model, fp32; to be read
        only. Of a run of adapters: the layers that have some, with these merged in."""
        named = self.layout.views(self.trainer.start_vector_N)
        return merged(self.trainer.model, named) if self.course.has_adapters else named

    def _expected(self, number: int, base: Digest, peer: str) -> Expected:
        return Expected(
            run=self.course.run,
            round=number,
            base=base,
            peer=peer,
            layout=self.layout.digest,
            n=self.layout.size,
            codec=self.course.codec,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How a run trains: rows of `context` tokens, `rows` of them in a micro-batch."""

    context: int
    rows: int


def make_trainer(
    loaded: Loaded,
    text: TrainingText,
    shape: Shape,
    config: TrainConfig,
    *,
    adapters: tuple[AdapterConfig, Digest] | None = None,
    budget: Budget | None = None,
) -> Trainer:
    """A copy of a model, ready to be trained on this text. Takes a second and memory: call it in a worker thread.

    adapters: of this kind, for a run of this id, which alone are trained. budget: train privately, within it.
    Raises BadText, BadInput, BadModel, OutOfMemory.
    """
    batches = Batches(text, context=shape.context, rows=shape.rows)
    model = training_copy(loaded, batches, config)
    if adapters is not None:
        add_adapters(model, *adapters)
    if budget is not None:
        return PrivateTrainer(model, batches, config, budget)
    return Trainer(model, batches, config)


def state_of(theta_N: torch.Tensor, velocity_N: torch.Tensor | None, course: Course) -> bytes | memoryview:
    """The bytes of a state; without momentum those of theta_N itself. velocity_N: None before the first step of a run
    with momentum: zeros."""
    assert sys.byteorder == "little", "fp32 is written as the machine has it"
    if not course.momentum:
        return theta_N.contiguous().numpy().data.cast("B")
    parts = (theta_N, torch.zeros_like(theta_N) if velocity_N is None else velocity_N)
    return b"".join(part.contiguous().numpy().data.cast("B") for part in parts)


def load_named(model: Any, named: Mapping[str, torch.Tensor]) -> None:
    """Write weights into a model that serves, cast to its dtype, on its device. Raises BadModel, before any is."""
    own = dict(model.named_parameters())
    for name, value in named.items():
        if name not in own or own[name].shape != value.shape:
            raise BadModel(f"the model that serves has no {name} of shape {list(value.shape)}")
    with torch.no_grad():
        for name, value in named.items():
            own[name].copy_(value)
