"""The model this node hosts: its engine, the one thread it runs in, and the answers that flow out of it.

Rules: torch runs in one worker thread, one turn a hop: the orders, a few texts to embed, one `step()`; so nobody waits
for more than that. One task (`run`) owns the runtime; requests reach it as orders that are carried out before the next
step. Every admitted request ends in exactly one of: Finished, an error, cancellation by its owner.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial

import trio

from model.config import ModelFacts
from model.errors import BadInput, EngineFull, ModelError
from model.requests import Embeddings, EngineStatistics, GenerationRequest, Output, SamplingParameters
from model.runtime_face import Runtime
from node.errors import NO_ROOM_RETRY_S, BadRequest, InternalError, NoRoom, NotReady, RequestError, UnknownModel
from node.work import (
    AnswerItem,
    Embedded,
    EmbedWork,
    Finished,
    GenerateWork,
    Piece,
    Progress,
    Started,
    TokenLogprob,
)

PROGRESS_EVERY_S = 0.5
EMBED_QUEUE_MAX = 64
EMBED_TEXTS_PER_TURN = 32
EMBED_LENGTH_PER_TURN = 4_096  # letters or token ids: under half a second of a small encoder on two cores
CHANGE_EVERY_S = 1.0  # while only rates change
LOGPROB_MIN = -9999.0  # stands for minus infinity, which no wire form carries

Turn = Callable[[], list[Output]]
Hop = Callable[[Turn], Awaitable[list[Output]]]  # runs a turn where it may block; not to be cancelled halfway


@dataclass(slots=True, kw_only=True)
class _Job:
    """One request in the engine: where its items go, and what has been told so far."""

    work: GenerateWork
    send: trio.MemorySendChannel[AnswerItem | RequestError]
    key: str  # unique in the engine, where a client's request id may come twice
    prompt_tokens: int = 0
    completion_tokens: int = 0
    admitted: bool = False
    wrote: bool = False  # a first piece came: from now on its pieces say how far it is
    told_at: float = -math.inf
    told: Progress | None = None


@dataclass(slots=True, kw_only=True)
class _EmbedJob:
    work: EmbedWork
    done: trio.Event = field(default_factory=trio.Event)
    made: list[Embeddings] = field(default_factory=list)
    result: Embedded | RequestError | None = None
    cancelled: bool = False

    def next_texts(self) -> list[str | tuple[int, ...]]:
        """The next few texts, as many as one turn may take."""
        begin = sum(len(part.vectors) for part in self.made)
        texts, length = list[str | tuple[int, ...]](), 0
        for text in self.work.texts[begin : begin + EMBED_TEXTS_PER_TURN]:
            length += len(text)
            if texts and length > EMBED_LENGTH_PER_TURN:
                break
            texts.append(text)
        return texts


class Hosting:
    """Admission to the local engine and its loop. `on_change` is called (sync) whenever its capacity changed."""

    def __init__(self, runtime: Runtime, *, peer: str, on_change: Callable[[], None], hop: Hop | None = None) -> None:
        """hop: where turns run; None: in a worker thread of their own."""
        self.runtime = runtime
        self.draining = False
        self._peer = peer
        self._on_change = on_change
        self._changed_at = -math.inf
        self._hop: Hop = hop or partial(trio.to_thread.run_sync, limiter=trio.CapacityLimiter(1))
        self._jobs: dict[str, _Job] = {}
        self._orders: deque[Callable[[], Output | None]] = deque()  # an output is an order's own failure
        self._embeds: deque[_EmbedJob] = deque()
        self._wake = trio.Event()
        self._open = 0  # requests whose owner has not left yet
        self._left = trio.lowlevel.ParkingLot()
        self._count = 0
        self._statistics = runtime.statistics()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Step the engine while there is work. Cancelled, it waits for the step under way and drops the rest."""
        task_status.started()
        while True:
            if not (self._orders or self._embeds or self._jobs):
                self._wake = trio.Event()
                await self._wake.wait()
            orders = list(self._orders)
            self._orders.clear()
            embed = self._embeds[0] if self._embeds else None
            for output in await self._hop(partial(self._turn, orders, embed)):
                self._deliver(output)
            if embed is not None and (embed.cancelled or embed.result is not None):
                self._embeds.popleft()
                embed.done.set()
            self._tell_progress()
            self._tell_change()

    def statistics(self) -> EngineStatistics:
        """The engine's figures after its last step."""
        return self._statistics

    async def wait_idle(self) -> None:
        """Wait until no request is admitted, and the owner of each has taken its last item."""
        await trio.lowlevel.checkpoint()
        while self._open:
            await self._left.park()

    @property
    def requests_running(self) -> int:
        """Requests admitted and not ended."""
        return self._open

    @property
    def embeds_waiting(self) -> int:
        """Embedding requests not ended, the one under way included."""
        return len(self._embeds)

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
    async def generate(self, work: GenerateWork) -> AsyncIterator[trio.MemoryReceiveChannel[AnswerItem | RequestError]]:
        """Admit a request; its items come from the channel, an error as the last item, then the channel ends.

        Raises NotReady, UnknownModel, NoRoom. Leaving the block cancels the request in the engine within one step.
        """
        self._check(work.model, work.revision, "causal")
        send, receive = trio.open_memory_channel[AnswerItem | RequestError](
            math.inf
        )  # max_tokens items, and progress while it waits
        self._count += 1
        job = _Job(work=work, send=send, key=f"{self._count}")
        self._jobs[job.key] = job
        self._order(partial(self._start, job))
        with self._admitted():
            try:
                yield receive
            finally:
                if self._jobs.pop(job.key, None) is not None:
                    self._order(partial(self._cancel, job.key))
                receive.close()

    async def embed(self, work: EmbedWork) -> Embedded:
        """Embed texts, a few between two steps. Raises RequestError kinds. If cancelled, what is left is dropped."""
        self._check(work.model, None, "encoder")
        if len(self._embeds) >= EMBED_QUEUE_MAX:
            raise NoRoom(f"{EMBED_QUEUE_MAX} embedding requests are waiting here", retry_after_s=NO_ROOM_RETRY_S)
        job = _EmbedJob(work=work)
        self._embeds.append(job)
        self._wake.set()
        with self._admitted():
            try:
                await job.done.wait()
            finally:
                job.cancelled = True
        assert job.result is not None
        if isinstance(job.result, RequestError):
            raise job.result
        return job.result

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

    def _order(self, order: Callable[[], Output | None]) -> None:
        self._orders.append(order)
        self._wake.set()

    # in the worker thread

    def _turn(self, orders: list[Callable[[], Output | None]], embed: _EmbedJob | None) -> list[Output]:
        outputs = [failure for order in orders if (failure := order()) is not None]
        if embed is not None and not embed.cancelled:
            embed.result = self._embed_some(embed)
        if self.runtime.has_work:
            outputs.extend(self.runtime.step())
        return outputs

    def _cancel(self, key: str) -> None:
        self.runtime.cancel(key)

    def _start(self, job: _Job) -> Output | None:
        work = job.work
        try:
            if work.tokens is not None:
                prompt = tuple(work.tokens)
            elif work.messages is not None:
                prompt = self.runtime.render([(m.role, m.content) for m in work.messages])
            else:
                prompt = self.runtime.encode(work.text or "")
            job.prompt_tokens = len(prompt)
            self.runtime.add(
                GenerationRequest(
                    request_id=job.key,
                    prompt=prompt,
                    delivered=tuple(work.delivered),
                    delivered_chars=work.delivered_chars,
                    sampling=_parameters(work),
                )
            )
        except ModelError as exc:
            return Output(request_id=job.key, error=exc)
        job.completion_tokens = len(work.delivered)
        return None

    def _embed_some(self, job: _EmbedJob) -> Embedded | RequestError | None:
        """Embed the next few texts; the result when these were the last."""
        try:
            job.made.append(self.runtime.embed(job.next_texts()))
        except ModelError as exc:
            return _request_error(exc)
        vectors = tuple(vector for part in job.made for vector in part.vectors)
        if len(vectors) < len(job.work.texts):
            return None
        facts = self.runtime.embedding_facts
        return Embedded(
            served_by=self._peer,
            model=facts.name,
            revision=facts.revision,
            dimensions=job.made[0].dimensions,
            vectors=vectors,
            truncated=tuple(cut for part in job.made for cut in part.truncated),
            prompt_tokens=sum(part.tokens for part in job.made),
        )

    # on the loop

    def _deliver(self, output: Output) -> None:
        job = self._jobs.get(output.request_id)
        if job is None:
            return  # cancelled while the step ran
        if output.error is not None:
            del self._jobs[job.key]
            job.send.send_nowait(_request_error(output.error))
            job.send.close()
            return
        self._tell_started(job)
        if output.tokens or output.text:
            job.completion_tokens += len(output.tokens)
            job.wrote = True
            job.send.send_nowait(Piece(tokens=output.tokens, text=output.text, logprobs=_logprobs(output)))
        if output.finish is not None:
            del self._jobs[job.key]
            job.send.send_nowait(
                Finished(
                    reason="length" if output.finish == "length" else "stop",
                    prompt_tokens=job.prompt_tokens,
                    completion_tokens=job.completion_tokens,
                )
            )
            job.send.close()

    def _tell_started(self, job: _Job) -> None:
        if not job.admitted:
            job.admitted = True
            facts = self.runtime.facts
            job.send.send_nowait(
                Started(
                    served_by=self._peer,
                    model=facts.name,
                    revision=facts.revision,
                    prompt_tokens=job.prompt_tokens,
                )
            )

    def _tell_progress(self) -> None:
        """Say at most every PROGRESS_EVERY_S, to requests that wait for their first token, how far they are."""
        now = trio.current_time()
        for job in self._jobs.values():
            if job.wrote or job.prompt_tokens == 0 or now - job.told_at < PROGRESS_EVERY_S:
                continue
            job.told_at = now
            self._tell_started(job)
            figures, place = self.runtime.statistics(), self.runtime.progress(job.key)
            progress = Progress(
                engine_steps=figures.steps,
                prefilled_tokens=place.prefilled_tokens,
                queue_position=place.queue_position,
            )
            if progress != job.told:
                job.told = progress
                job.send.send_nowait(progress)

    def _tell_change(self) -> None:
        """Say at once that there is more or less room, and of rates now and then: a step must cost no advert."""
        before, self._statistics, now = self._statistics, self.runtime.statistics(), trio.current_time()
        fresh = self._statistics
        is_room = (fresh.slots_free, fresh.queue_length) != (before.slots_free, before.queue_length)
        if is_room or (fresh != before and now - self._changed_at >= CHANGE_EVERY_S):
            self._changed_at = now
            self._on_change()


def _parameters(work: GenerateWork) -> SamplingParameters:
    s = work.sampling
    return SamplingParameters(
        max_tokens=s.max_tokens,
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
        min_p=s.min_p,
        frequency_penalty=s.frequency_penalty,
        presence_penalty=s.presence_penalty,
        repetition_penalty=s.repetition_penalty,
        seed=s.seed,
        stop=s.stop,
        logprobs=s.logprobs,
    )


def _logprobs(output: Output) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            text=item.text,
            logprob=max(LOGPROB_MIN, item.logprob),
            top=tuple((text, max(LOGPROB_MIN, logprob)) for text, logprob in item.top),
        )
        for item in output.logprobs
    )


def _request_error(error: ModelError) -> RequestError:
    if isinstance(error, EngineFull):
        return NoRoom(str(error), retry_after_s=NO_ROOM_RETRY_S)
    if isinstance(error, BadInput):
        return BadRequest(str(error), param=error.param)
    return InternalError(str(error))
