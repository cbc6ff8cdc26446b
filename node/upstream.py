"""A server behind this node that answers in its place: vLLM, llama.cpp, Ollama, or any OpenAI-compatible one.

Rules: keeps to node/backend.py, as node/hosting.py does. One task looks at the server (node/upstream_watch.py), one
tells those who wait how far they are, and each answer has one. At most `slots` requests are there at a time, the others
wait here, first come, first served. While the server cannot be asked, nothing is offered, requests are refused with a
time to try again, and the node stays up. What the server is may change when it comes back: the adverts then say so.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict
from typing import Any

import trio

from model.call_format import HERMES
from model.config import ModelFacts
from model.requests import EngineStatistics
from node.embed_queue import EMBED_QUEUE_MAX
from node.errors import NO_ROOM_RETRY_S, BadRequest, NoRoom, NotReady, PeerFailed, RequestError, UnknownModel
from node.hosting import CHANGE_EVERY_S, PROGRESS_EVERY_S
from node.requester import OWN, Requester
from node.upstream_answer import PIECES_HELD, Asking, Job
from node.upstream_dialect import Ask, ask_of
from node.upstream_health import QUEUE_PER_SLOT, State
from node.upstream_http import Server, Trouble
from node.upstream_look import EMBED_TEXTS_PER_ASK, Identity, vectors_of
from node.upstream_stream import Garbled
from node.upstream_telling import Telling
from node.upstream_watch import UpstreamConfig, Watch
from node.work import AnswerItem, Embedded, EmbedWork, GenerateWork, Progress, Started

SPECIAL_TOKENS_MAX = 16  # that a model may put around a text


class Upstream:
    """The server as this node's backend. `on_change` is called (sync) whenever its capacity changed."""

    def __init__(self, server: Server, config: UpstreamConfig, *, peer: str, on_change: Callable[[], None]) -> None:
        self.draining = False
        self._watch = Watch(server, config, peer, self._looked)
        self._asking = Asking(server, self._watch.health, self._watch.room)
        self._peer = peer
        self._on_change = on_change
        self._jobs: list[Job] = []
        self._embeds = 0
        self._open = 0  # requests whose owner has not left yet
        self._nursery: trio.Nursery | None = None
        self._left = trio.lowlevel.ParkingLot()
        self._told = (EngineStatistics(), False, -math.inf)  # figures, up, and when

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Stand for the server; started once it has answered. Raises ConfigError when it cannot be used as set."""
        async with self._watch.server:
            await self._watch.find()
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._watch.run)
                nursery.start_soon(self._tell_now_and_then)
                task_status.started()

    def _looked(self) -> None:
        """If it is down, whoever waits for it goes elsewhere at once. Answers that flow have a time of their own."""
        health = self._watch.health
        if health.state is State.DOWN:
            for job in [job for job in self._jobs if not job.telling.counted]:
                job.stop(PeerFailed(f"the server behind this node is down: {health.why}"))
        self._tell_change()

    async def _tell_now_and_then(self) -> None:
        while True:
            await trio.sleep(PROGRESS_EVERY_S)
            place = 0
            for job in self._jobs:
                place += not job.is_there
                self._tell_progress(job, 0 if job.is_there else place)
            self._tell_change()

    def _tell_progress(self, job: Job, place: int) -> None:
        if job.telling.counted or job.is_over:
            return
        now = trio.current_time()
        if now >= job.first_by:
            job.stop(PeerFailed(f"no token within {now - job.began:.0f} s, most of the request's time"))
            return
        progress = Progress(
            engine_steps=self._watch.room.steps, prefilled_tokens=job.prefilled_tokens, queue_position=place
        )
        if now - job.began < PROGRESS_EVERY_S or progress == job.told:
            return
        job.told = progress
        for item in (*job.telling.start(), progress):
            try:
                job.send.send_nowait(item)
            except (trio.WouldBlock, trio.BrokenResourceError):  # who reads so slowly misses no token by it
                return

    def _tell_change(self) -> None:
        """Say at once that there is more or less room, and of rates now and then."""
        figures, is_up, now = self.statistics(), self._watch.health.is_up, trio.current_time()
        before, was_up, at = self._told
        is_room = (figures.slots_free, figures.queue_length, is_up) != (before.slots_free, before.queue_length, was_up)
        if is_room or (figures != before and now - at >= CHANGE_EVERY_S):
            self._told = (figures, is_up, now)
            self._on_change()

    # what there is

    @property
    def runtime(self) -> Identity:
        """What is served."""
        return self._watch.found

    @property
    def accepting(self) -> bool:
        """Whether it takes new requests of peers."""
        return not self.draining and self._watch.health.is_up

    @property
    def revision(self) -> str:
        """Of the main model, now."""
        return self._watch.found.facts.revision

    @property
    def requests_running(self) -> int:
        """Requests admitted and not ended."""
        return len(self._jobs) + self._embeds

    @property
    def embeds_waiting(self) -> int:
        """Embedding requests not ended."""
        return self._embeds

    def details(self) -> dict[str, Any]:
        """Nothing: that server has its own."""
        return {}

    def told(self) -> dict[str, Any]:
        """For the status; no key is in it."""
        health, identity = self._watch.health, self._watch.identity
        problem = (
            "" if health.is_up else f"the server at {self._watch.server.base} is {health.state.value}: {health.why}"
        )
        return {
            "kind": "openai",
            "server": None if identity is None else identity.device,
            "url": self._watch.server.base,
            "model": None if identity is None else identity.main.id,
            "state": health.state.value,
            "problem": problem,
            "answers": None if identity is None else asdict(identity.abilities),
            "failures": dict(health.failures),
        }

    def statistics(self) -> EngineStatistics:
        """The figures, as far as the server or its answers tell them."""
        main = None if self._watch.identity is None else self._watch.identity.main
        running, slots = self.requests_running, self._watch.room.slots
        own, waiting = min(running, slots), max(0, running - slots)
        return self._watch.room.statistics(main, own, waiting, is_up=self._watch.health.is_up)

    async def wait_idle(self) -> None:
        """Wait until no request is admitted, and the owner of each has taken its last item."""
        await trio.lowlevel.checkpoint()
        while self._open:
            await self._left.park()

    def facts(self, kind: str) -> ModelFacts | None:
        """The model that answers requests of a kind, None when there is none."""
        for facts in self._watch.found.all_facts():
            if (kind == "encoder" and facts.embeds) or facts.kind == kind == "causal":
                return facts
        return None

    def serves(self, model: str | None, revision: str | None, kind: str) -> bool:
        """Whether a request for this model and revision can be answered here at all."""
        facts = self.facts(kind)
        return facts is not None and model in (None, facts.name) and revision in (None, facts.revision)

    def has_room(self) -> bool:
        """Whether a request admitted now would start at once."""
        figures = self.statistics()
        return figures.slots_free > 0 and figures.queue_length == 0

    # requests

    @asynccontextmanager
    async def generate(
        self, work: GenerateWork, requester: Requester = OWN
    ) -> AsyncIterator[trio.MemoryReceiveChannel[AnswerItem | RequestError]]:
        """Admit a request; its items come from the channel, an error as the last item, then the channel ends.

        Raises NotReady, UnknownModel, NoRoom. Leaving the block closes the connection that the server answers on.
        """
        facts = self._admit(work.model, work.revision, "causal")
        assert self._nursery is not None
        send, receive = trio.open_memory_channel[AnswerItem | RequestError](PIECES_HELD)
        calls = None if work.tools is None else HERMES  # as node/upstream_telling.py writes what the server calls
        started = Started(served_by=self._peer, model=facts.name, revision=facts.revision, prompt_tokens=0, calls=calls)
        job = Job(work=work, telling=Telling(work, started), send=send, began=trio.current_time())
        self._jobs.append(job)
        self._nursery.start_soon(self._answer, job)
        self._tell_change()
        with self._counted():
            try:
                yield receive
            finally:
                job.leave()
                receive.close()

    async def _answer(self, job: Job) -> None:
        """The task of one request."""
        failure: RequestError | None = None
        with job.send:
            try:
                with job.scope:
                    failure = await self._answered(job)
                failure = failure or job.failure
                if failure is not None:
                    await job.send.send(failure)
            except trio.BrokenResourceError:
                pass  # its owner left with the last item on its way
            finally:
                self._jobs.remove(job)
                self._count(job, failure)
                self._watch.look_soon()
                self._tell_change()

    async def _answered(self, job: Job) -> RequestError | None:
        try:
            if len(job.work.delivered) >= job.work.sampling.max_tokens:
                for item in job.telling.whole():
                    await job.send.send(item)
                return None
            self._ask(job)  # what cannot be asked need not wait
            async with self._watch.places:
                await self._asking.answer(job, self._ask(job))
        except RequestError as exc:
            return exc
        return None

    def _ask(self, job: Job) -> Ask:
        """What to ask of the server as it is now. Raises PeerFailed, BadRequest."""
        found = self._watch.found
        if found.facts.revision != job.telling.revision:  # it waited meanwhile
            raise PeerFailed(f"the server behind this node is at revision {found.facts.revision} now")
        if job.work.messages is None and not found.abilities.text:
            raise BadRequest("the server of this model takes chats only: send messages", param="prompt")
        ask = ask_of(job.work, found.main.dialect, found.main.id)
        job.telling.joins_after(ask.seam)
        return ask

    def _count(self, job: Job, failure: RequestError | None) -> None:
        room = self._watch.room
        room.finished += job.is_over
        room.failed += failure is not None
        room.cancelled += failure is None and not job.is_over

    async def embed(self, work: EmbedWork, requester: Requester = OWN) -> Embedded:
        """Embed texts, a few at a time. Raises RequestError kinds. If cancelled, what is left is dropped."""
        facts = self._admit(work.model, None, "encoder")
        if len({isinstance(text, str) for text in work.texts}) > 1:
            raise BadRequest("the server of this model takes texts or token ids, not both at once", param="input")
        vectors, tokens = list[bytes](), 0
        with self._counted():
            self._embeds += 1
            try:
                async with self._watch.places:
                    for begin in range(0, len(work.texts), EMBED_TEXTS_PER_ASK):
                        made, read = await self._embed_some(work, begin)
                        vectors, tokens = vectors + made, tokens + read
            finally:
                self._embeds -= 1
                self._watch.look_soon()
        if len({len(vector) for vector in vectors}) > 1:
            raise PeerFailed("the server behind this node made vectors of different lengths")
        return Embedded(
            served_by=self._peer,
            model=facts.name,
            revision=facts.revision,
            dimensions=len(vectors[0]) // 4,
            vectors=tuple(vectors),
            truncated=tuple(self._is_cut(text, facts) for text in work.texts),
            prompt_tokens=tokens,
        )

    async def _embed_some(self, work: EmbedWork, begin: int) -> tuple[list[bytes], int]:
        served = self._watch.found.vectors
        assert served is not None
        texts = work.texts[begin : begin + EMBED_TEXTS_PER_ASK]
        try:
            return await vectors_of(self._watch.server, served.id, texts, work.remaining_ms / 1000)
        except (Trouble, Garbled) as exc:
            raise self._asking.error_of(exc, is_mid=False) from exc

    def _is_cut(self, text: str | tuple[int, ...], facts: ModelFacts) -> bool | None:
        """Whether a text was cut: not when the server refuses long ones, or it cannot be long; else nobody knows."""
        tokens_max = (len(text.encode()) if isinstance(text, str) else len(text)) + SPECIAL_TOKENS_MAX
        return False if self._watch.found.main.dialect.refuses_long or tokens_max <= facts.context_tokens else None

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            self._left.unpark_all()

    def _admit(self, model: str | None, revision: str | None, kind: str) -> ModelFacts:
        """Who may come in; the model that will answer. Raises NotReady, UnknownModel, NoRoom."""
        health, now = self._watch.health, trio.current_time()
        if self.draining or self._nursery is None:
            raise NotReady("this node is stopping, or not ready yet", retry_after_s=NO_ROOM_RETRY_S)
        if not self.serves(model, revision, kind):
            own = " and ".join({facts.name for facts in self._watch.found.all_facts()})
            raise UnknownModel(f"model {model or revision!r} is not hosted here; this node hosts {own}", param="model")
        if health.state is State.FULL:
            raise NoRoom(f"the server behind this node is full: {health.why}", retry_after_s=health.retry_after_s(now))
        if not health.is_up:
            raise NotReady(
                f"the server behind this node is {health.state.value}", retry_after_s=health.retry_after_s(now)
            )
        waiting = self.requests_running - self._watch.room.slots
        if waiting >= min(QUEUE_PER_SLOT * self._watch.room.slots, EMBED_QUEUE_MAX):
            raise NoRoom(f"{waiting} requests are waiting here", retry_after_s=NO_ROOM_RETRY_S)
        facts = self.facts(kind)
        assert facts is not None
        return facts
