"""What waits for the engine's thread: requests and loans.

Rules: no task and no clock; node/hosting.py owns them and says when.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from model.errors import ModelError
from node.errors import RequestError
from node.kept_answers import Recording
from node.requester import Requester
from node.room import Room
from node.work import AnswerItem, GenerateWork, Progress

START_BYTES_PER_TURN = 128 << 10  # of prompts: a tenth of a second of a tokenizer


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One request in the engine: where its items go, and what has been told so far. size: bytes that its texts take;
    recording: of an answer that will be kept, from its start on."""

    work: GenerateWork
    requester: Requester
    size: int
    send: trio.MemorySendChannel[AnswerItem | RequestError]
    key: str  # unique in the engine, where a client's request id may come twice
    prompt_tokens: int = 0
    completion_tokens: int = 0
    admitted: bool = False
    wrote: bool = False  # a first piece came: from now on its pieces say how far it is
    told_at: float = -math.inf
    told: Progress | None = None
    recording: Recording | None = None


@dataclass(slots=True, kw_only=True)
class Loan:
    """An act for the engine's thread that is no request, and what came of it."""

    act: Callable[[], object]
    hold_at: float = math.inf  # from then on no request starts before it
    done: trio.Event = field(default_factory=trio.Event)
    began: bool = False
    over: trio.Event = field(default_factory=trio.Event)  # it does not run any more, however it ended
    result: object = None
    failure: ModelError | None = None
    is_left: bool = False

    def carry_out(self) -> None:
        """In the worker thread. An error that is a bug is not caught."""
        try:
            self.result = self.act()
        except ModelError as exc:
            self.failure = exc


@dataclass(slots=True)
class Waiting:
    """All that waits for the thread, but texts to embed. ends: keys of requests whose owners left."""

    starts: deque[Job] = field(default_factory=deque)
    ends: deque[str] = field(default_factory=deque)
    loans: deque[Loan] = field(default_factory=deque)
    room: Room = field(default_factory=lambda: Room("requests"))  # requests in the engine counted

    def end(self, job: Job) -> None:
        """The owner of a request has left."""
        if job in self.starts:  # the engine has not heard of it
            self.starts.remove(job)
        else:
            self.ends.append(job.key)

    def next_starts(self) -> list[Job]:
        """Who starts in the next turn; not all at once, since each has its prompt turned into tokens there."""
        starts, size = list[Job](), 0
        while self.starts and (not starts or size + self.starts[0].size <= START_BYTES_PER_TURN):
            starts.append(self.starts.popleft())
            size += starts[-1].size
        return starts
