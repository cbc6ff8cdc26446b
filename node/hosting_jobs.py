"""What waits for the engine's thread: requests, texts to embed, loans; and how model/'s words become the node's.

Rules: no task and no clock; node/hosting.py owns them and says when.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

import trio

from model.errors import BadInput, EngineFull, ModelError
from model.requests import Embeddings, Output, SamplingParameters
from node.errors import NO_ROOM_RETRY_S, BadRequest, InternalError, NoRoom, RequestError
from node.work import AnswerItem, Embedded, EmbedWork, GenerateWork, Progress, TokenLogprob

EMBED_TEXTS_PER_TURN = 32
EMBED_LENGTH_PER_TURN = 4_096  # letters or token ids: under half a second of a small encoder on two cores
LOGPROB_MIN = -9999.0  # stands for minus infinity, which no wire form carries


@dataclass(slots=True, kw_only=True)
class Job:
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
class EmbedJob:
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


@dataclass(slots=True, kw_only=True)
class Beside:
    """Work that goes on beside the requests, a piece a turn, and what came of it."""

    work: Generator[None, None, object]
    done: trio.Event = field(default_factory=trio.Event)
    has_ended: bool = False
    result: object = None
    failure: ModelError | None = None
    is_left: bool = False

    def carry_on(self) -> None:
        """The next piece. In the worker thread. An error that is a bug is not caught."""
        try:
            next(self.work)
        except StopIteration as end:
            self.result, self.has_ended = end.value, True
        except ModelError as exc:
            self.failure, self.has_ended = exc, True


@dataclass(slots=True)
class Waiting:
    """All that waits. ends: keys of requests whose owners left."""

    starts: deque[Job] = field(default_factory=deque)
    ends: deque[str] = field(default_factory=deque)
    embeds: deque[EmbedJob] = field(default_factory=deque)
    loans: deque[Loan] = field(default_factory=deque)
    besides: deque[Beside] = field(default_factory=deque)

    @property
    def is_something(self) -> bool:
        """Whether there is a turn to take, but for requests in the engine."""
        return bool(self.ends or self.embeds or self.loans or self.besides)

    def next_beside(self) -> Beside | None:
        """Whose next piece comes; those whose owners left are dropped."""
        while self.besides and self.besides[0].is_left:
            self.besides.popleft().work.close()
        return self.besides[0] if self.besides else None

    def next_embed(self, *, is_held: bool) -> EmbedJob | None:
        """Whose texts come next; while new work is held back, only one that has begun."""
        first = self.embeds[0] if self.embeds else None
        return None if is_held and first is not None and not first.made else first


def parameters(work: GenerateWork) -> SamplingParameters:
    """How the engine is to choose tokens."""
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


def logprobs(output: Output) -> tuple[TokenLogprob, ...]:
    """Of an output's tokens, finite as every wire form wants them."""
    return tuple(
        TokenLogprob(
            text=item.text,
            logprob=max(LOGPROB_MIN, item.logprob),
            top=tuple((text, max(LOGPROB_MIN, logprob)) for text, logprob in item.top),
        )
        for item in output.logprobs
    )


def request_error(error: ModelError) -> RequestError:
    """What a client is told of an error of model/."""
    if isinstance(error, EngineFull):
        return NoRoom(str(error), retry_after_s=NO_ROOM_RETRY_S)
    if isinstance(error, BadInput):
        return BadRequest(str(error), param=error.param)
    return InternalError(str(error))
