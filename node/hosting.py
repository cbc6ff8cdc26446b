"""The model this node hosts: its engine, the one thread it runs in, and the answers that flow out of it.

Rules: torch runs in one worker thread, one turn a hop: the orders, a few texts to embed, one `step()`; so nobody waits
for more than that. One task (`run`) owns the runtime; requests reach it as orders that are carried out before the next
step. Every admitted request ends in exactly one of: Finished, an error, cancellation by its owner; what would wait
beyond the bounds of node/room.py is not admitted. The thread is lent (`borrow`) while there is no request, one short
act a hop: serving comes first. Weights change (`switch`) between requests: each answer is made by one revision, and
what is kept of answers (node/cache.py) by the one that serves now. They are made ready before, a piece a turn beside
the requests. Who waits for a moment without requests holds new ones back after SWITCH_S.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import trio

from model.config import ModelFacts
from model.errors import ComputeFailed, ModelError
from model.requests import EngineStatistics, Output
from model.runtime_face import Runtime
from node.admission import Admission
from node.cache import Cache
from node.embed_queue import EmbedTurn
from node.embedding import Embedding
from node.engine_words import finish_reason, generation_request, logprobs, request_error
from node.errors import NO_ROOM_RETRY_S, NotReady, RequestError, UnknownModel
from node.hosting_jobs import Beside, Job, Loan, Waiting
from node.kept_answers import Answers
from node.requester import OWN, Requester
from node.room import held_bytes
from node.work import AnswerItem, Embedded, EmbedWork, Finished, GenerateWork, Piece

CACHE_MB = 32  # of 10^6 bytes, unless the operator says otherwise
EMBED_SHARE = 0.5  # of a turn for texts while answers wait for their next token
PROGRESS_EVERY_S = 0.5
CHANGE_EVERY_S = 1.0  # while only rates change
SWITCH_S = 10.0  # for a moment without requests

T = TypeVar("T")
Turn = Callable[[], list[Output]]
Hop = Callable[[Turn], Awaitable[list[Output]]]  # runs a turn where it may block; not to be cancelled halfway


class Hosting:
    """Admission to the local engine and its loop. `on_change` is called (sync) whenever its capacity changed."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        peer: str,
        on_change: Callable[[], None],
        hop: Hop | None = None,
        cache_mb: int = CACHE_MB,
        admission: Admission | None = None,
    ) -> None:
        """hop: where turns run; None: in a worker thread of their own. cache_mb: of answers and vectors; 0: none.
        admission: who is let in by when it would be answered."""
        self.runtime = runtime
        self.admission = admission or Admission()
        self.answers = Answers(Cache(cache_mb * 1_000_000), peer=peer)
        self.embedding = Embedding(runtime, self.answers.cache, peer=peer)
        self.draining = False
        self._peer = peer
        self._on_change = on_change
        self._changed_at = -math.inf
        self._hop: Hop = hop or partial(trio.to_thread.run_sync, limiter=trio.CapacityLimiter(1))
        self._jobs: dict[str, Job] = {}
        self._waiting = Waiting()
        self._wake = trio.Event()
        self._open = 0  # requests whose owner has not left yet
        self._left = trio.lowlevel.ParkingLot()
        self._statistics = runtime.statistics()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Step the engine while there is work. Cancelled, it waits for the step under way and drops the rest."""
        task_status.started()
        while True:
            if not (self._jobs or self._waiting.is_something or self.embedding.has_next(is_held=False)):
                self._wake = trio.Event()
                await self._wake.wait()
            if self._waiting.loans and self._is_free():
                await self._lend(self._waiting.loans.popleft())
                continue
            starts, ends = list[Job](), list(self._waiting.ends)
            self._waiting.ends.clear()
            if not self._is_held():  # whoever left while it waited is not started
                starts = [job for job in self._waiting.next_starts() if job.key in self._jobs]
            share = EMBED_SHARE if starts or self.runtime.has_work else 1.0
            embed = self.embedding.take(is_held=self._is_held(), share=share)
            beside, began = self._waiting.next_beside(), trio.current_time()
            outputs = await self._hop(partial(self._turn, starts, ends, embed, beside))
            for output in outputs:
                self._deliver(output)
            if beside is not None and beside.has_ended:
                self._waiting.besides.popleft()
                beside.done.set()
            if embed is not None:
                self.embedding.settle(embed)
            self._tell_progress()
            self._tell_change()
            self.admission.turned(trio.current_time() - began, len(outputs), self._statistics)

    # the thread, for others

    async def borrow(self, act: Callable[[], T]) -> T:
        """Run something short (tens of milliseconds) in the engine's thread while there is no request.

        Raises the ModelError that it raises. If cancelled, it was not run, or it ran to its end and its result is lost.
        """
        result: T = await self._lent(Loan(act=act))
        return result

    async def switch(self, weights: object, revision: str) -> None:
        """Have the model go on under these weights (see Runtime.adopt), between two requests. Raises ModelError.

        If cancelled, it goes on under them or it does not; the weights may be read until the step under way is over.
        """
        beside = Beside(work=self.runtime.preparing(weights))
        self._waiting.besides.append(beside)
        self._wake.set()
        try:
            await beside.done.wait()
        finally:
            beside.is_left = True
        if beside.failure is not None:
            raise beside.failure
        act = partial(self.runtime.adopt, beside.result, revision)
        await self._lent(Loan(act=act, hold_at=trio.current_time() + SWITCH_S))
        self.answers.cache.forget(self.runtime.all_facts())
        self._changed_at = trio.current_time()
        self._on_change()

    async def _lent(self, loan: Loan) -> Any:
        self._waiting.loans.append(loan)
        self._wake.set()
        try:
            await loan.done.wait()
        finally:
            loan.is_left = True
            if loan.began:  # what it works on is its owner's again when it ends, and no sooner
                with trio.CancelScope(shield=True):
                    await loan.over.wait()
        if loan.failure is not None:
            raise loan.failure
        return loan.result

    def _is_free(self) -> bool:
        """Whether the thread may be lent now."""
        is_held = self._is_held()
        if self._waiting.ends or self.embedding.has_next(is_held=is_held):
            return False
        return not self.runtime.has_work if is_held else not self._jobs

    def _is_held(self) -> bool:
        """Whether new requests wait for a loan."""
        return any(loan.hold_at <= trio.current_time() for loan in self._waiting.loans)

    async def _lend(self, loan: Loan) -> None:
        if loan.is_left:
            await trio.lowlevel.checkpoint()
            return

        def act() -> list[Output]:
            loan.carry_out()
            return []

        loan.began = True
        try:
            await self._hop(act)
        finally:
            loan.over.set()
        loan.done.set()

    def statistics(self) -> EngineStatistics:
        """The engine's figures after its last step."""
        return self._statistics

    async def wait_idle(self) -> None:
        """Wait until no request is admitted, and the owner of each has taken its last item."""
        await trio.lowlevel.checkpoint()
        while self._open:
            await self._left.park()

    @property
    def accepting(self) -> bool:
        """Whether it takes new requests of peers."""
        return not self.draining

    def told(self) -> dict[str, Any]:
        """What the status says of this backend."""
        return {"kind": "transformers", "problem": ""}

    def details(self) -> dict[str, Any]:
        """What the status says of this backend's model beside the rest. queued_bytes: of all requests' texts."""
        return {
            "embedding": asdict(self.embedding.statistics()),
            "cache": asdict(self.answers.cache.statistics()),
            "starts_waiting": len(self._waiting.starts),
            "queued_bytes": self._waiting.room.bytes + self.embedding.queued_bytes,
            "foresight": self.admission.statistics(),
        }

    @property
    def revision(self) -> str:
        """Of the main model, now."""
        return self.runtime.facts.revision

    @property
    def requests_running(self) -> int:
        """Requests admitted and not ended."""
        return self._open

    @property
    def embeds_waiting(self) -> int:
        """Embedding requests not ended, the one under way included."""
        return len(self.embedding)

    def facts(self, kind: str) -> ModelFacts | None:
        """The model that answers requests of a kind (causal: text, encoder: vectors), None when there is none."""
        for facts in self.runtime.all_facts():
            if (kind == "encoder" and facts.embeds) or facts.kind == kind == "causal":
                return facts
        return None

    def serves(self, model: str | None, revision: str | None, kind: str) -> bool:
        """Whether a request for this model and revision can be answered here at all."""
        facts = self.facts(kind)
        return facts is not None and model in (None, facts.name) and revision in (None, facts.revision)

    def has_room(self) -> bool:
        """Whether a request admitted now would start at the next step, those not yet seen by the engine counted."""
        figures = self._statistics
        return len(self._jobs) < figures.slots_total and figures.queue_length == 0

    @asynccontextmanager
    async def generate(
        self, work: GenerateWork, requester: Requester = OWN
    ) -> AsyncIterator[trio.MemoryReceiveChannel[AnswerItem | RequestError]]:
        """Admit a request; its items come from the channel, an error as the last item, then the channel ends.

        Raises NotReady, UnknownModel, NoRoom. Leaving the block cancels the request in the engine within one step.
        """
        self._check(work.model, work.revision, "causal")
        send, receive = trio.open_memory_channel[AnswerItem | RequestError](math.inf)  # max_tokens items, and progress
        job = Job(work=work, requester=requester, size=held_bytes(work), send=send, key=self._waiting.next_key())
        if not self._answer_again(job):
            check = partial(self.admission.check, job, self._jobs.values(), self._statistics, trio.current_time())
            self._waiting.enter(job, self._statistics, check)
            self._jobs[job.key] = job
            self._wake.set()
        with self._admitted():
            try:
                yield receive
            finally:
                if job.key in self._jobs:
                    self._drop(job)
                    self._waiting.end(job)
                    self._wake.set()
                receive.close()

    async def embed(self, work: EmbedWork, requester: Requester = OWN) -> Embedded:
        """Embed texts, a few between two steps. Raises RequestError kinds. If cancelled, what is left is dropped."""
        self._check(work.model, None, "encoder")
        done = trio.Event()
        job = self.embedding.admit(work, requester, done.set)
        self._wake.set()
        with self._admitted():
            try:
                await done.wait()
            finally:
                self.embedding.leave(job)
        assert job.result is not None
        if isinstance(job.result, RequestError):
            raise job.result
        return job.result

    def _answer_again(self, job: Job) -> bool:
        """Give the answer that is kept for this requester, if there is one; whether there was."""
        facts = self.facts("causal")
        items = None if facts is None else self.answers.again(job.work, job.requester, facts)
        if items is None:
            return False
        for item in items:
            job.send.send_nowait(item)
        job.send.close()
        return True

    def _drop(self, job: Job) -> None:
        """The one place where a request leaves the engine's books."""
        del self._jobs[job.key]
        self._waiting.room.leave(job.requester, job.size)
        self.admission.left(job, trio.current_time())

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            self._left.unpark_all()

    def _check(self, model: str | None, revision: str | None, kind: str) -> None:
        if self.draining:
            raise NotReady("this node is stopping", retry_after_s=NO_ROOM_RETRY_S)
        if not self.serves(model, revision, kind):
            own = " and ".join({self.runtime.facts.name, self.runtime.embedding_facts.name})
            raise UnknownModel(f"model {model or revision!r} is not hosted here; this node hosts {own}", param="model")

    # in the worker thread

    def _turn(self, starts: list[Job], ends: list[str], embed: EmbedTurn | None, beside: Beside | None) -> list[Output]:
        for key in ends:
            self.runtime.cancel(key)
        outputs = [failure for job in starts if (failure := self._start(job)) is not None]
        if embed is not None:
            self.embedding.carry_out(embed)
        if self.runtime.has_work:
            outputs.extend(self.runtime.step())
        if beside is not None:
            beside.carry_on()
        return outputs

    def _start(self, job: Job) -> Output | None:
        work, facts = job.work, self.runtime.facts
        if work.revision not in (None, facts.revision):  # the model went on while it waited
            return Output(
                request_id=job.key,
                error=ComputeFailed(f"the model here is at revision {facts.revision} now, wanted {work.revision}"),
            )
        try:
            request = generation_request(self.runtime, job.key, work, job.requester)
            job.prompt_tokens = len(request.prompt)
            self.runtime.add(request)
        except ModelError as exc:
            return Output(request_id=job.key, error=exc)
        job.completion_tokens = len(work.delivered)
        job.recording = self.answers.recording(work, job.requester, facts)
        return None

    # on the loop

    def _deliver(self, output: Output) -> None:
        job = self._jobs.get(output.request_id)
        if job is None:
            return  # cancelled while the step ran
        if output.error is not None:
            job.is_failed = True
            self._drop(job)
            job.send.send_nowait(request_error(output.error))
            job.send.close()
            return
        job.start(self._peer, self.runtime.facts)
        if output.tokens or output.text:
            job.completion_tokens += len(output.tokens)
            job.wrote, job.wrote_at = True, trio.current_time()
            piece = Piece(tokens=output.tokens, text=output.text, logprobs=logprobs(output))
            job.send.send_nowait(piece)
            if job.recording is not None:
                job.recording.take(piece)
        if output.finish is not None:
            job.reason = reason = finish_reason(output)
            self._drop(job)
            if job.recording is not None:
                self.answers.keep(job.recording, job.prompt_tokens, reason)
            finished = Finished(reason=reason, prompt_tokens=job.prompt_tokens, completion_tokens=job.completion_tokens)
            job.send.send_nowait(finished)
            job.send.close()

    def _tell_progress(self) -> None:
        """Say at most every PROGRESS_EVERY_S, to requests that wait for their first token, how far they are."""
        now = trio.current_time()
        for job in self._jobs.values():
            if job.wrote or job.prompt_tokens == 0 or now - job.told_at < PROGRESS_EVERY_S:
                continue
            job.told_at = now
            job.start(self._peer, self.runtime.facts)
            figures, place = self.runtime.statistics(), self.runtime.progress(job.key)
            job.progress(figures.steps, place)

    def _tell_change(self) -> None:
        """Say at once that there is more or less room, and of rates now and then: a step must cost no advert."""
        before, self._statistics, now = self._statistics, self.runtime.statistics(), trio.current_time()
        fresh = self._statistics
        is_room = (fresh.slots_free, fresh.queue_length) != (before.slots_free, before.queue_length)
        if is_room or (fresh != before and now - self._changed_at >= CHANGE_EVERY_S):
            self._changed_at = now
            self._on_change()
