"""What the scheduler is set up with, what it plans for one step, and what it is told of it: plain values.

Rules: core. A span [begin, end) counts a sequence's tokens, prompt and answer, from 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from model.blocks import BlockStatistics


class Priority(IntEnum):
    """Whose request it is; the lower number goes first."""

    OWN = 0  # of this node's user
    PEER = 1  # of a peer in good standing
    STRANGER = 2


# how much of queue_max a class and those after it may fill: a flood of strangers leaves room for the others
QUEUE_SHARE = {Priority.OWN: 1.0, Priority.PEER: 0.75, Priority.STRANGER: 0.5}


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Bounds of the scheduler."""

    slots: int = 4  # requests that run at a time
    blocks: int = 256  # of KV memory
    block_tokens: int = 64
    step_tokens: int = 260  # in one step, decoded and prefilled together
    chunk_min: int = 16  # tokens of prompt in a step while others decode, whatever the speeds: so that prompts end
    queue_max: int = 64
    requester_queue_max: int = 32  # for each that is not this node's own user
    age_steps: int = 2_048  # after so many a request is overdue; and the rest between two overdue ones that had to wait

    def __post_init__(self) -> None:
        """Raises ValueError with what came and what is wanted."""
        for name in ("slots", "blocks", "block_tokens", "chunk_min", "age_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} came, wanted at least 1")
        for name in ("queue_max", "requester_queue_max"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)} came, wanted 0 or more")
        if self.step_tokens < self.slots + self.chunk_min:
            raise ValueError(
                f"step_tokens = {self.step_tokens} came, wanted slots + chunk_min = {self.slots + self.chunk_min} or "
                "more: a prompt must get on while every other slot decodes"
            )


class Span(NamedTuple):
    """Tokens of one sequence that one forward pass takes in. samples: it reaches the last, so a token is chosen."""

    request_id: str
    begin: int
    end: int
    samples: bool


class Admitted(NamedTuple):
    """A request that runs from now on. reused: of its first tokens the KV is in its blocks already."""

    request_id: str
    reused: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step's work: drop the KV of `preempted`, take `admitted` in, then one forward pass for all spans.
    decodes: one token each; chunks: of prompts, and of what is computed anew."""

    preempted: tuple[str, ...] = ()
    admitted: tuple[Admitted, ...] = ()
    decodes: tuple[Span, ...] = ()
    chunks: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a step. sampled: the token chosen for each span that samples; finished: answers that end here;
    failed: requests that end since their pass failed, whose KV is worth nothing. seconds: of the forward pass; 0: not
    measured."""

    sampled: dict[str, int] = field(default_factory=dict)
    finished: frozenset[str] = frozenset()
    failed: frozenset[str] = frozenset()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStatistics:
    """The scheduler in numbers. queried: tokens of requests when they were admitted, again after a preemption;
    reused: of these, those whose KV was there when their request was admitted or its turn came;
    recomputed: tokens computed a second time, after a preemption."""

    slots_free: int
    queue_length: int
    blocks: BlockStatistics
    steps: int = 0
    preemptions: int = 0
    overdue: int = 0  # requests that were put first because of their age
    decoded: int = 0
    prefilled: int = 0
    queried: int = 0
    reused: int = 0
    recomputed: int = 0
