"""Who runs and who waits: what each step of the engine works on, within bounds that each have a name.

An engine's step is: plan(), one forward pass for all spans, choose tokens, took().

Rules: core, no torch. A step decodes one token of every running answer, and takes in a chunk of the prompts that are
not through; never more than step_tokens. Prompts that end in it may have a step of their own (ChunkPace.alone), while
nobody waits for room and nobody is overdue: with a queue, tokens a second count for more than one prompt's wait. Who is
admitted has blocks for its prompt, not for its answer: when a decode needs a block and none is left, the one that came
last of the lowest class is preempted: it keeps its tokens, loses its KV, and waits at the front of its class to be
computed anew. Nobody overtakes who waits for room.

Order: classes as in Priority; in a class whoever was preempted, then the requester that was served least (FairShare),
then who came first. Ageing: the oldest request, once it was there for age_steps, is put before all others until it ends
and is never preempted; if it had to wait, the next one must wait age_steps more. So whatever others ask, a request ends
within (slots + queue_max + 1) * (age_steps + 2 * (A + (RESTS + 1) * (blocks * block_tokens / chunk_min + 1))) steps, A
being the longest answer in tokens: each request before it has at most one such turn, in which those that run end or are
preempted, and then it runs itself, first in everything.
Source: GeeeekExplorer/nano-vllm `nanovllm/engine/scheduler.py`; chunked prefill: Sarathi-Serve (arXiv 2403.02310).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from model.blocks import BlockManager
from model.chunk_pace import ChunkPace
from model.errors import BadInput, EngineFull
from model.fair_share import Account, FairShare
from model.requests import Progress
from model.step import QUEUE_SHARE, Admitted, Outcome, Priority, SchedulerConfig, SchedulerStatistics, Span, Step


@dataclass(slots=True, kw_only=True, eq=False)
class _Sequence:
    """A request. tokens: prompt and answer so far; computed: how many of them have their KV in its blocks; best: how
    many ever had."""

    request_id: str
    tokens: list[int]
    prompt_tokens: int
    max_tokens: int
    account: Account
    shared: int | None
    number: int  # in the order of arrival
    step: int  # at which it came
    computed: int = 0
    best: int = 0
    is_preempted: bool = False

    @property
    def pending(self) -> int:
        """Tokens that forward passes must take in before the next one can be chosen; 1 while decoding."""
        return len(self.tokens) - self.computed


class Scheduler:
    """All requests of one engine, and its KV blocks."""

    def __init__(self, config: SchedulerConfig, salt: bytes = b"") -> None:
        """salt: names the weights, as a model's revision does."""
        self._config = config
        self.blocks = BlockManager(config.blocks, config.block_tokens, salt)
        self._shares = FairShare()
        self._pace = ChunkPace(config.chunk_min, config.step_tokens)
        self._requests: dict[str, _Sequence] = {}  # all, the oldest first
        self._waiting: dict[str, _Sequence] = {}
        self._running: dict[str, _Sequence] = {}
        self._planned: dict[str, tuple[_Sequence, Span]] | None = None
        self._work = (0, 0)  # decodes, and tokens of chunks, of the step that is planned
        self._passed_over = 0  # decodes that wait for the prompts of that step
        self._first: _Sequence | None = None  # overdue: put before all others until it ends
        self._first_waited = False
        self._rest_until = 0
        self._counts: Counter[str] = Counter()

    # --- requests ---

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._requests)

    def add(
        self,
        request_id: str,
        prompt: Sequence[int],
        max_tokens: int,
        account: Account,
        shared: int | None = None,
    ) -> None:
        """Takes a request in; it runs when there is room. Of an answer that is taken over, what is delivered already
        belongs to `prompt` and not to `max_tokens`. shared: the KV of no more than its first so many tokens is used by
        another of its class, or another's by it; None: of all, 0: of none.

        Raises BadInput (its fault: empty, can never fit, id in use), EngineFull; and then holds nothing of it.
        """
        self._check(request_id, len(prompt), max_tokens)
        sequence = _Sequence(
            request_id=request_id,
            tokens=list(prompt),
            prompt_tokens=len(prompt),
            max_tokens=max_tokens,
            account=account,
            shared=shared,
            number=self._counts["added"],
            step=self._counts["steps"],
        )
        self._check_queue(sequence)
        self._counts["added"] += 1
        self._shares.join(sequence.account)
        self._requests[request_id] = self._waiting[request_id] = sequence

    def cancel(self, request_id: str) -> None:
        """Ends a request; its room is free at once. An unknown id is no error."""
        if request_id in self._requests:
            self._end(self._requests[request_id])

    def progress(self, request_id: str) -> Progress:
        """How far a request is. Raises BadInput for an unknown id."""
        if request_id not in self._requests:
            raise BadInput(f"there is no request {request_id!r}")
        sequence = self._requests[request_id]
        ahead = self._in_turn(self._waiting.values()).index(sequence) + 1 if request_id in self._waiting else 0
        return Progress(queue_position=ahead, prefilled_tokens=sequence.computed)

    def forget(self, salt: bytes) -> None:
        """The weights have changed: no KV of before is used by a request that is admitted from now on. To be called
        while nothing runs, if each answer is to be made by one revision."""
        self.blocks.forget(salt)

    def statistics(self) -> SchedulerStatistics:
        """The scheduler in numbers; costs microseconds."""
        return SchedulerStatistics(
            slots_free=self._config.slots - len(self._running),
            queue_length=len(self._waiting),
            blocks=self.blocks.statistics(),
            **{name: self._counts[name] for name in _COUNTED},
        )

    # --- steps ---

    def plan(self) -> Step:
        """What the next step works on. Then the engine owes one took()."""
        assert self._planned is None, "plan() was called twice without took()"
        self._counts["steps"] += 1
        self._choose_first()
        preempted = self._make_room()
        admitted = self._admit()
        decodes = tuple(_span(sequence, 1) for sequence in self._ranked() if sequence.pending == 1)
        chunks = tuple(self._alone(len(decodes)))
        self._passed_over = len(decodes) if chunks else 0
        if self._passed_over:
            decodes = ()
        else:
            chunks = tuple(self._chunks(len(decodes)))
        self._planned = {span.request_id: (self._running[span.request_id], span) for span in (*decodes, *chunks)}
        self._work = len(decodes), sum(span.end - span.begin for span in chunks)
        self._counts["decoded"] += self._work[0]
        self._counts["prefilled"] += self._work[1]
        return Step(preempted=preempted, admitted=admitted, decodes=decodes, chunks=chunks)

    def took(self, outcome: Outcome) -> tuple[str, ...]:
        """Takes note of the planned step; gives the ids of those that ended with it: finished, failed, or at their
        max_tokens. What was cancelled since plan() is passed over."""
        assert self._planned is not None, "took() was called without plan()"
        planned, self._planned = self._planned, None
        self._pace.note(*self._work, outcome.seconds, self._passed_over)
        ended = []
        for request_id, (sequence, span) in planned.items():
            if self._requests.get(request_id) is not sequence:
                continue
            if request_id in outcome.failed or self._is_done(sequence, span, outcome):
                ended.append(request_id)
                self._end(sequence)
        return tuple(ended)

    def _is_done(self, sequence: _Sequence, span: Span, outcome: Outcome) -> bool:
        """Notes what a span computed; whether the answer ends here."""
        fresh = max(0, span.end - max(span.begin, sequence.best))
        self._counts["recomputed"] += span.end - span.begin - fresh
        self._shares.serve(sequence.account, fresh)
        sequence.computed = span.end
        sequence.best = max(sequence.best, span.end)
        self.blocks.computed(sequence.request_id, sequence.tokens, span.end)
        if sequence.request_id in outcome.finished:
            return True
        if not span.samples:
            return False
        sequence.tokens.append(outcome.sampled[sequence.request_id])
        return len(sequence.tokens) >= sequence.prompt_tokens + sequence.max_tokens

    # --- the plan's parts, in their order ---

    def _choose_first(self) -> None:
        """Puts the oldest request first once it is overdue."""
        oldest = next(iter(self._requests.values()), None)
        if oldest is None or self._first is not None or self._counts["steps"] < self._rest_until:
            return
        if self._counts["steps"] - oldest.step > self._config.age_steps:
            self._first, self._first_waited = oldest, oldest.request_id in self._waiting
            self._counts["overdue"] += 1

    def _make_room(self) -> tuple[str, ...]:
        """A block for each decode that needs one, if need be by preemption."""
        preempted = []
        for sequence in self._ranked():
            while (
                sequence.request_id in self._running
                and sequence.pending == 1
                and not self.blocks.append(sequence.request_id, len(sequence.tokens))
            ):
                victim = self._ranked()[-1]
                self._preempt(victim)
                preempted.append(victim.request_id)
        return tuple(preempted)

    def _preempt(self, sequence: _Sequence) -> None:
        self.blocks.free(sequence.request_id)
        self._waiting[sequence.request_id] = self._running.pop(sequence.request_id)
        sequence.computed = 0
        sequence.is_preempted = True
        self._counts["preemptions"] += 1

    def _admit(self) -> tuple[Admitted, ...]:
        """Who waits and fits runs, in turn. A block stays spare for each that runs, so that who comes is not preempted
        at once."""
        admitted = []
        while self._waiting and len(self._running) < self._config.slots:
            sequence = self._in_turn(self._waiting.values())[0]
            running, account = len(self._running), sequence.account
            reused = self.blocks.allocate(
                sequence.request_id, sequence.tokens, sequence.shared, running, circle=account.priority
            )
            if reused is None:
                break
            sequence.computed = reused
            self._counts["queried"] += len(sequence.tokens)
            self._counts["reused"] += reused
            self._running[sequence.request_id] = self._waiting.pop(sequence.request_id)
            admitted.append(Admitted(sequence.request_id, reused))
        return tuple(admitted)

    def _alone(self, decodes: int) -> Iterable[Span]:
        """Prompts that end in this step, if they are to have it to themselves; none before decodes of a better
        class."""
        if self._waiting or self._first is not None or not decodes:
            return ()
        room = min(self._config.step_tokens, self._pace.alone(decodes))
        best = min(sequence.account.priority for sequence in self._running.values() if sequence.pending == 1)
        return self._spans(room, is_whole=True, lowest=best)

    def _chunks(self, decodes: int) -> Iterable[Span]:
        """Chunks of prompts beside so many decodes."""
        free = self._config.step_tokens - decodes
        if room := min(free, self._pace.chunk(decodes)):
            return self._spans(room)
        return self._spans(min(free, self._pace.at_once(decodes)), is_whole=True)

    def _spans(self, room: int, is_whole: bool = False, lowest: Priority = Priority.STRANGER) -> Iterable[Span]:
        """Chunks of prompts of these classes, the least served requester's first; is_whole: of those that end. A block
        that one computes in this step is not computed by another that could share it: it waits for the next step."""
        under_way: set[bytes] = set()
        for sequence in sorted(self._running.values(), key=self._prefill_turn):
            if sequence.pending == 1 or room == 0 or sequence.account.priority > lowest:
                continue
            name, tokens = sequence.request_id, sequence.tokens
            computed = self.blocks.reuse(name, tokens, sequence.computed)
            self._counts["reused"] += computed - sequence.computed
            sequence.computed = computed
            if is_whole and sequence.pending > room:
                continue
            if next(self.blocks.keys(name, tokens, len(tokens) - 1), None) in under_way:
                continue
            span = _span(sequence, min(room, sequence.pending))
            room -= span.end - span.begin
            under_way.update(self.blocks.keys(name, tokens, span.end))
            yield span

    # --- orders ---

    def _rank(self, sequence: _Sequence) -> tuple[bool, int, int]:
        """Who keeps its blocks, before whom."""
        return sequence is not self._first, sequence.account.priority, sequence.number

    def _ranked(self) -> list[_Sequence]:
        return sorted(self._running.values(), key=self._rank)

    def _in_turn(self, waiting: Iterable[_Sequence]) -> list[_Sequence]:
        """Who is admitted next, before whom; the preempted first in their class. Tokens that a running prompt is still
        to take count as served, or one requester would be given all the slots that are free at once."""
        owed: Counter[Account] = Counter()
        for sequence in self._running.values():
            owed[sequence.account] += sequence.pending

        def turn(sequence: _Sequence) -> tuple[bool, int, int, int]:
            account = sequence.account
            served = -1 if sequence.is_preempted else self._shares.served(account) + owed[account]
            return sequence is not self._first, account.priority, served, sequence.number

        return sorted(waiting, key=turn)

    def _prefill_turn(self, sequence: _Sequence) -> tuple[bool, int, int, int, int]:
        """Of one requester's prompts the shortest first: its user waits for it least, and the others hardly longer."""
        account, left = sequence.account, sequence.pending
        return sequence is not self._first, account.priority, self._shares.served(account), left, sequence.number

    # --- bounds ---

    def _check(self, request_id: str, prompt_tokens: int, max_tokens: int) -> None:
        if request_id in self._requests:
            raise BadInput(f"request id {request_id!r} is already in use; choose another")
        if not prompt_tokens:
            raise BadInput("the prompt has no tokens; give at least one")
        if max_tokens < 1:
            raise BadInput(f"max_tokens must be at least 1, not {max_tokens}", param="max_tokens")
        wanted = prompt_tokens + max_tokens - 1  # the last token is not fed again
        kv_tokens = self._config.blocks * self._config.block_tokens
        if wanted > kv_tokens:
            raise BadInput(
                f"the prompt has {prompt_tokens:,} tokens and max_tokens is {max_tokens:,}: together they need "
                f"{wanted:,} tokens of KV memory and this node has {kv_tokens:,}; ask for fewer tokens",
                param="max_tokens",
            )

    def _check_queue(self, newcomer: _Sequence) -> None:
        """Raises EngineFull if the queue, or the part of it that the newcomer's class or requester may fill, is full
        without those that the next step admits."""
        order = self._in_turn((*self._waiting.values(), newcomer))
        left = order[self._admissible(order) :]
        account, config = newcomer.account, self._config
        behind = sum(1 for other in left if other.account.priority >= account.priority)
        of_requester = sum(1 for other in left if other.account == account)
        class_max = math.ceil(config.queue_max * QUEUE_SHARE[account.priority])
        state = f"{len(self._running)} requests run and {len(self._waiting)} wait"
        if len(left) > config.queue_max:
            raise EngineFull(f"{state}; the queue is full at {config.queue_max}, try again later")
        if behind > class_max:
            raise EngineFull(
                f"{state}; with this one {behind} of class {account.priority.name.lower()} or lower would wait, which "
                f"may fill {class_max} of {config.queue_max} places; try again later"
            )
        if account.priority is not Priority.OWN and of_requester > config.requester_queue_max:
            raise EngineFull(
                f"{state}; with this one {of_requester} of this requester's would wait, which may have "
                f"{config.requester_queue_max} waiting; try again when one has ended"
            )

    def _admissible(self, order: list[_Sequence]) -> int:
        """How many of these, in this order, the next step would surely admit."""
        room = self.blocks.available
        for count, sequence in enumerate(order):
            running = len(self._running) + count
            room -= self.blocks.blocks_for(len(sequence.tokens))
            if running >= self._config.slots or room < running:
                return count
        return len(order)

    def _end(self, sequence: _Sequence) -> None:
        """The one place where a request leaves."""
        del self._requests[sequence.request_id]
        if self._running.pop(sequence.request_id, None) is not None:
            self.blocks.free(sequence.request_id)
        self._waiting.pop(sequence.request_id, None)
        self._shares.leave(sequence.account)
        if sequence is self._first:
            self._first = None
            if self._first_waited:
                self._rest_until = self._counts["steps"] + self._config.age_steps


_COUNTED = ("steps", "preemptions", "overdue", "decoded", "prefilled", "queried", "reused", "recomputed")


def _span(sequence: _Sequence, count: int) -> Span:
    end = sequence.computed + count
    return Span(sequence.request_id, sequence.computed, end, end == len(sequence.tokens))
