"""A Front that answers by a script: for the web's and the commands' tests."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio

from node.errors import RequestError, UnknownModel
from node.front import FrontStatistics, Measured, ModelRow, Readiness, RouteHint
from node.recent import Recent
from node.sealed import SealedCall
from node.self_face import SelfFace
from node.state import NoTraining
from node.training_wish import Begin, Join
from node.work import AnswerItem, Embedded, EmbedWork, Finished, GenerateWork, Piece, Started, TokenLogprob

PEER = "12D3KooWFakeFakeFakeFakeFakeFakeFakeFakeFakeFakeFake"
# an item to tell, an error to raise, or seconds to wait
Step = AnswerItem | RequestError | float


def started() -> Started:
    return Started(served_by=PEER, model="fairy", revision="sha256-0123456789ab", prompt_tokens=3)


def finished(tokens: int, reason: str = "length") -> Finished:
    return Finished(reason=reason, prompt_tokens=3, completion_tokens=tokens)


def tale(words: Sequence[str], *, step_s: float = 0.0) -> list[Step]:
    """An answer of one word a step."""
    steps: list[Step] = [started()]
    for number, word in enumerate(words):
        if step_s:
            steps.append(step_s)
        steps.append(Piece(tokens=(number,), text=word))
    return [*steps, finished(len(words))]


def told(words: Sequence[str]) -> list[Step]:
    """As `tale`, with logprobs."""
    pieces = [
        Piece(
            tokens=(n,),
            text=word,
            logprobs=(TokenLogprob(text=word, logprob=-0.5, top=((word, -0.5), ("x", float("-inf")))),),
        )
        for n, word in enumerate(words)
    ]
    return [started(), *pieces, finished(len(words), "stop")]


class FakeTraining:
    """Notes what the operator said."""

    def __init__(self) -> None:
        self.said: list[object] = []
        self.fails: RequestError | None = None
        self.tells: dict[str, Any] = NoTraining("").status()

    def status(self) -> dict[str, Any]:
        return self.tells

    async def begin(self, asked: Begin) -> dict[str, Any]:
        return {**await self._note(asked), "name": asked.name, "id": "ab" * 32}

    async def join(self, asked: Join) -> dict[str, Any]:
        return await self._note(asked)

    async def pause(self, *, is_paused: bool) -> dict[str, Any]:
        return await self._note("pause" if is_paused else "resume")

    async def leave(self) -> dict[str, Any]:
        return await self._note("leave")

    async def _note(self, said: object) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        if self.fails is not None:
            raise self.fails
        self.said.append(said)
        return self.status()


class FakeFront:
    """Records what was asked; `running` counts answers under way, `cancelled` those that were left early."""

    def __init__(self, script: Callable[[GenerateWork], list[Step]] | None = None) -> None:
        self.script = script or (lambda work: tale(["Once", " upon", " a", " time"]))
        self.works: list[GenerateWork] = []
        self.embeds: list[EmbedWork] = []
        self.hints: list[RouteHint] = []
        self.rows = [
            ModelRow(
                id="fairy", revision="sha256-0123456789ab", kind="causal", peers=2, context_tokens=1024, local=True
            ),
            ModelRow(id="org/enc", revision="sha256-enc", kind="encoder", peers=1, context_tokens=256, embeds=True),
        ]
        self.ready = Readiness(ready=True)
        self.running = 0
        self.cancelled = 0
        self.steps = 0
        self.items = 0
        self.changed = trio.Event()
        self.embed_wait_s = 0.0
        self.trains = FakeTraining()
        self.seals: list[tuple[SealedCall, str, str]] = []
        self.frames: list[bytes | RequestError] = []
        self.recent = Recent()
        self.itself: SelfFace | None = None

    def _change(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    async def until(self, condition: Callable[[FakeFront], bool]) -> None:
        """Wait for a condition on this front."""
        while not condition(self):
            await self.changed.wait()

    @asynccontextmanager
    async def answer(self, work: GenerateWork, route: RouteHint) -> AsyncIterator[AsyncIterator[AnswerItem]]:
        self.works.append(work)
        self.hints.append(route)
        self.running += 1
        self._change()
        whole = False

        async def items() -> AsyncIterator[AnswerItem]:
            nonlocal whole
            for step in self.script(work):
                if isinstance(step, RequestError):
                    whole = True
                    raise step
                if isinstance(step, float | int):
                    await trio.sleep(step)
                    self.steps += 1
                    continue
                await trio.lowlevel.checkpoint()
                whole = isinstance(step, Finished)
                self.items += 1
                yield step

        try:
            if work.model not in (None, *(row.id for row in self.rows)):
                whole = True
                raise UnknownModel(f"no live peer serves {work.model}", param="model")
            yield items()
        finally:
            self.running -= 1
            self.cancelled += not whole
            self._change()

    async def embed(self, work: EmbedWork, route: RouteHint) -> Embedded:
        self.embeds.append(work)
        self.hints.append(route)
        self.running += 1
        self._change()
        done = False
        try:
            await trio.sleep(self.embed_wait_s)
            done = True
        finally:
            self.running -= 1
            self.cancelled += not done
            self._change()
        return Embedded(
            served_by=PEER,
            model="org/enc",
            revision="sha256-enc",
            dimensions=3,
            vectors=tuple(struct.pack("<3f", 0.6, 0.8 * (n == 0), 0.0) for n in range(len(work.texts))),
            truncated=tuple(len(text) > 100 for text in work.texts),
            prompt_tokens=7,
        )

    @asynccontextmanager
    async def sealed(self, call: SealedCall, peer: str, account: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """The frames of `frames`; a RequestError among them is raised."""
        self.seals.append((call, peer, account))

        async def passing() -> AsyncIterator[bytes]:
            for frame in self.frames:
                await trio.lowlevel.checkpoint()
                if isinstance(frame, RequestError):
                    raise frame
                yield frame

        yield passing()

    async def sealing_key(self, peer: str) -> bytes:
        await trio.lowlevel.checkpoint()
        return f"statement of {peer}".encode()

    def models(self) -> list[ModelRow]:
        return self.rows

    def default_model(self, kind: str) -> str | None:
        return next((row.id for row in self.rows if row.kind == kind), None)

    def readiness(self) -> Readiness:
        return self.ready

    def status(self) -> dict[str, Any]:
        return {
            "node": {"peer_id": PEER, "network": "main"},
            "peering": {"connected": 1, "known": 3, "bootstrap": [], "refusals": [], "duplicate": None},
            "gossip": {},
            "inference": {},
            "model": {"name": "fairy"},
            "readiness": {"ready": self.ready.ready, "reason": self.ready.reason, "loading": self.ready.loading},
        }

    def measured(self) -> Measured:
        return Measured(training=self.trains.status())

    def peers(self) -> list[dict[str, Any]]:
        return [{"peer_id": PEER, "rtt_ms": 1.25, "models": [{"name": "fairy", "revision": "sha256-0123456789ab"}]}]

    @property
    def training(self) -> FakeTraining:
        return self.trains

    def statistics(self) -> FrontStatistics:
        return FrontStatistics()
