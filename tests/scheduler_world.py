"""A toy engine around model/scheduler.py: it counts instead of computing, and checks every plan.

A token of an answer depends on all tokens before it, so an answer that came out right was made of the right KV.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from model.chunk_pace import RESTS
from model.errors import BadInput, EngineFull
from model.fair_share import Account
from model.scheduler import Scheduler
from model.step import Outcome, Priority, SchedulerConfig, Span, Step
from tests.toy_kv import Reader, ToyKV

VOCABULARY = 7


def next_token(tokens: Sequence[int]) -> int:
    return (31 * sum(tokens) + 7 * len(tokens) + tokens[-1]) % VOCABULARY


def answer(prompt: Sequence[int], count: int) -> list[int]:
    """What the toy model says after a prompt, alone."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@dataclass(slots=True, kw_only=True)
class Asked:
    """One request. stop_after: its answer ends after so many tokens although more are allowed."""

    name: str
    prompt: list[int]
    max_tokens: int
    shared: int | None
    priority: Priority
    requester: str
    stop_after: int
    came: int
    fails: bool = False
    said: list[int] = field(default_factory=list)
    ended: int | None = None
    decoded_at: int | None = None  # the step of its last token, while nothing came between
    reader: Reader | None = None


def seconds(decodes: int, prefilled: int) -> float:
    """A step's time: weights read once, a little for each decode, and each token of a prompt."""
    return 0.010 + 0.0002 * decodes + 0.0005 * prefilled if decodes or prefilled else 0.0


def dear(decodes: int, prefilled: int) -> float:
    """A step's time where each decode costs what a whole pass costs at the least."""
    return 0.010 + 0.010 * decodes + 0.0005 * prefilled if decodes or prefilled else 0.0


class World:
    """A scheduler, its KV memory, and all that was asked."""

    def __init__(
        self, config: SchedulerConfig | None = None, time: Callable[[int, int], float] = lambda decodes, prefilled: 0.0
    ) -> None:
        self.config = config or SchedulerConfig()
        self.scheduler = Scheduler(self.config)
        self.kv = ToyKV(self.scheduler.blocks)
        self.time = time
        self.asked: dict[str, Asked] = {}
        self.running: dict[str, Asked] = {}  # in the order of admission
        self.now = self.revision = 0
        self.preempted = 0
        self.passed_over = 0  # steps in which those who decode waited for prompts
        self.is_passed_over = False  # in the step before this
        self.times: list[float] = []

    # what happens

    def offer(
        self,
        prompt: list[int],
        max_tokens: int = 4,
        requester: str = "me",
        priority: Priority = Priority.OWN,
        shared: int | None = None,
        **more: int | bool,
    ) -> Asked | None:
        """A new request; None if it is refused, and then nothing is left of it."""
        name = f"r{len(self.asked)}"
        before = self.scheduler.statistics()
        try:
            self.scheduler.add(name, prompt, max_tokens, Account(priority, requester), shared)
        except (BadInput, EngineFull):
            assert self.scheduler.statistics() == before
            return None
        self.asked[name] = asked = Asked(
            name=name, prompt=prompt, max_tokens=max_tokens, shared=shared, priority=priority, requester=requester,
            came=self.now, stop_after=int(more.pop("stop_after", max_tokens)), fails=bool(more.pop("fails", False)),
        )  # fmt: skip
        assert not more
        self.check()
        return asked

    def ask(self, *wanted: Any, **more: Any) -> Asked:
        """The same where it must be taken."""
        asked = self.offer(*wanted, **more)
        assert asked is not None
        return asked

    def cancel(self, asked: Asked) -> None:
        self.scheduler.cancel(asked.name)
        if asked.ended is None:
            self._over(asked)
        self.check()

    def forget(self) -> None:
        self.revision += 1
        self.scheduler.forget(b"%d" % self.revision)
        self.check()

    def step(self, cancels: Callable[[Step], Asked | None] = lambda step: None) -> Step:
        """One step of an engine. cancels: who leaves while it computes."""
        self.now += 1
        step = self.scheduler.plan()
        self._follow(step)
        self._check_bounds(step)
        sampled, finished, failed = {}, set(), set()
        for span in (*step.decodes, *step.chunks):
            asked = self.running[span.request_id]
            self._compute(asked, span)
            if span.samples and asked.fails and len(asked.said) + 1 >= asked.stop_after:
                failed.add(asked.name)
            elif span.samples:
                token = next_token(self._reader(asked).tokens)
                sampled[asked.name] = token
                if len(asked.said) + 1 >= asked.stop_after:
                    finished.add(asked.name)
        if (left := cancels(step)) is not None:
            self.cancel(left)
        self.times.append(self.time(len(step.decodes), sum(span.end - span.begin for span in step.chunks)))
        ended = self.scheduler.took(
            Outcome(sampled=sampled, finished=frozenset(finished), failed=frozenset(failed), seconds=self.times[-1])
        )
        self._note(step, sampled, ended, left)
        self.check()
        return step

    def run(self, steps_max: int) -> None:
        """Until all have ended."""
        for _ in range(steps_max):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, f"not all ended within {steps_max} steps"

    # what must hold

    def bound(self) -> int:
        """Steps within which every request ends, as the scheduler promises."""
        config = self.config
        longest = max((asked.max_tokens for asked in self.asked.values()), default=1)
        turn = 2 * (longest + (RESTS + 1) * (config.blocks * config.block_tokens // config.chunk_min + 1))
        return (config.slots + config.queue_max + 1) * (config.age_steps + turn)

    def check(self) -> None:
        self.kv.check([self._reader(asked) for asked in self.running.values()])
        figures, config = self.scheduler.statistics(), self.config
        alive = sum(asked.ended is None for asked in self.asked.values())
        assert figures.slots_free == config.slots - len(self.running) >= 0
        assert figures.queue_length == alive - len(self.running)
        assert alive <= config.slots + config.queue_max
        assert self.scheduler.has_work == bool(alive)

    def check_end(self) -> None:
        """All have ended once, with the answer they would have had alone, and every block is there."""
        for asked in self.asked.values():
            assert asked.ended is not None
            assert asked.said == answer(asked.prompt, len(asked.said))
            assert len(asked.said) <= min(asked.max_tokens, asked.stop_after)
        blocks = self.scheduler.blocks.statistics()
        assert (blocks.used, blocks.free + blocks.cached) == (0, self.config.blocks)
        assert not self.scheduler._shares._requests
        assert not self.scheduler._waiting

    def _reader(self, asked: Asked) -> Reader:
        assert asked.reader is not None
        return asked.reader

    def _follow(self, step: Step) -> None:
        for name in step.preempted:
            asked = self.running.pop(name)
            asked.reader = asked.decoded_at = None
            self.preempted += 1
        for admitted in step.admitted:
            asked = self.asked[admitted.request_id]
            assert asked.ended is None
            assert asked.reader is None
            self.running[asked.name] = asked
            asked.reader = Reader(
                name=asked.name, tokens=asked.prompt + asked.said, shared=asked.shared, revision=self.revision,
                computed=admitted.reused,
            )  # fmt: skip

    def _check_bounds(self, step: Step) -> None:
        config, spans = self.config, (*step.decodes, *step.chunks)
        assert len({span.request_id for span in spans}) == len(spans)
        assert {span.request_id for span in spans} <= set(self.running)
        assert sum(span.end - span.begin for span in spans) <= config.step_tokens
        assert len(self.running) <= config.slots
        assert all(span.end - span.begin == 1 and span.samples for span in step.decodes)
        # whoever decodes gets a token in every step, whatever comes in beside; or in the next, after prompts that end
        decoding = {asked.name for asked in self.running.values() if asked.decoded_at is not None}
        if is_passed_over := bool(decoding) and not step.decodes:
            assert not self.is_passed_over, "twice in a row"
            assert not self.scheduler._waiting
            assert self.scheduler._first is None
            assert step.chunks
            assert all(span.samples for span in step.chunks)
            worst = max(self.asked[span.request_id].priority for span in step.chunks)
            assert worst <= min(self.asked[name].priority for name in decoding)
        else:
            assert decoding <= {span.request_id for span in step.decodes}
        self.is_passed_over = is_passed_over
        self.passed_over += is_passed_over
        if self.running:
            assert spans, "requests run and nothing is done"

    def _compute(self, asked: Asked, span: Span) -> None:
        reader = self._reader(asked)
        assert reader.computed <= span.begin < span.end <= len(reader.tokens)
        assert span.samples == (span.end == len(reader.tokens))
        reader.computed = span.begin  # more than before: others' work was taken over
        self.kv.check_reads(reader)
        self.kv.write(reader, span.end, [self._reader(other) for other in self.running.values()])
        reader.computed = span.end

    def _note(self, step: Step, sampled: dict[str, int], ended: tuple[str, ...], left: Asked | None) -> None:
        assert len(set(ended)) == len(ended)
        for name, token in sampled.items():
            asked = self.asked[name]
            if asked is not left:
                asked.said.append(token)
                self._reader(asked).tokens.append(token)
                asked.decoded_at = self.now
        for name in ended:
            asked = self.asked[name]
            assert asked.fails or len(asked.said) == min(asked.max_tokens, asked.stop_after)
            self._over(asked)

    def _over(self, asked: Asked) -> None:
        assert asked.ended is None, f"{asked.name} ended twice"
        asked.ended = self.now
        self.running.pop(asked.name, None)
