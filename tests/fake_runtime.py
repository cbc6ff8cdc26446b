"""A runtime without torch: token i of an answer is a function of (prompt, i), and time is what a test says.

Rules: it keeps to model/runtime_face.py (tests/test_hosting.py checks the signatures). `takes_s` says what the last
turn cost; `Turns` spends it on Trio's clock, so that a test on a MockClock needs no thread.
"""

from __future__ import annotations

import json
import struct
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import trio

from model.config import UNPACKED, LinearFacts, ModelFacts
from model.errors import BadInput, EngineFull, ModelError, TooLong
from model.requests import (
    Embeddings,
    EngineStatistics,
    GenerationRequest,
    Looked,
    Openness,
    Output,
    Progress,
    TokenLogprob,
)
from model.timings import Timings

VOCABULARY = 50_000
DIMENSIONS = 4
TALE = ModelFacts(
    name="tale",
    revision="r1",
    kind="causal",
    context_tokens=2_000,
    dtype="float32",
    parameters=7,
    vocabulary=VOCABULARY,
    embeds=True,
)


def token_at(prompt: Sequence[int], position: int) -> int:
    """The token of an answer at a position: whoever makes it makes the same."""
    return (sum(prompt) * 31 + len(prompt) * 7 + position * 101) % VOCABULARY


def text_of(prompt: Sequence[int], count: int) -> str:
    """The text of the first `count` tokens of an answer."""
    return "".join(f"w{token_at(prompt, position)} " for position in range(count))


@dataclass(slots=True)
class _Run:
    request: GenerationRequest
    prefilled: int = 0
    made: int = 0  # tokens of the answer, delivered ones included
    chars: int = 0  # of their text, given out

    @property
    def to_prefill(self) -> int:
        return len(self.request.prompt) + len(self.request.delivered)


@dataclass(slots=True)
class FakeRuntime:
    """Adjust its fields at any time. ends_at: the answer's length at which it stops by itself (None: never)."""

    facts: ModelFacts = TALE
    slots: int = 2
    queue_max: int = 4
    step_s: float = 0.1
    read_s: float = 0.0  # a token of a prompt
    prefill_chunk: int = 10_000
    ends_at: int | None = None
    logprob: float = -0.5
    fails: ModelError | None = None  # every running request ends with it at the next step
    device: str = "cpu"
    embed_s: float = 0.1  # a text
    embed_pass_s: float = 0.0  # a call
    embed_error: ModelError | None = None
    added: list[GenerationRequest] = field(default_factory=list)
    adopted: list[object] = field(default_factory=list)
    pieces: int = 0  # of making weights ready
    piece_s: float = 0.1
    pieces_made: int = 0
    linears: LinearFacts = UNPACKED
    embedded: list[int] = field(default_factory=list)  # texts of each embed() call
    takes_s: float = 0.0
    look_s: float = 0.01  # a pass
    look_passes: int = 2
    look_error: ModelError | None = None
    look_nats: float | None = None  # of a slice; None: as many as it has characters
    looks: list[tuple[str, int]] = field(default_factory=list)  # texts looked at, and the piece of each
    openness: Openness = field(default_factory=Openness)
    _waiting: deque[_Run] = field(default_factory=deque)
    _running: list[_Run] = field(default_factory=list)
    _steps: int = 0
    _prefilled: int = 0
    _timings: Timings = field(default_factory=Timings)

    @property
    def embedding_facts(self) -> ModelFacts:
        return self.facts

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def busy(self) -> int:
        """Slots in use."""
        return len(self._running)

    @property
    def holds(self) -> int:
        """Requests running or waiting."""
        return len(self._running) + len(self._waiting)

    def all_facts(self) -> tuple[ModelFacts, ...]:
        return (self.facts,)

    def preparing(self, weights: object) -> Generator[None, None, object]:
        for _ in range(self.pieces):
            self.pieces_made += 1
            self.takes_s += self.piece_s
            yield
        if isinstance(weights, ModelError):
            raise weights
        return ("ready", weights)

    def adopt(self, ready: object, revision: str) -> None:
        assert not self.has_work
        self.adopted.append(ready)
        self.facts = self.facts.at(revision)

    def render(
        self, messages: Sequence[tuple[str, str] | Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[int, ...]:
        rows = [f"{row[0]}:{row[1]}\n" if isinstance(row, tuple) else f"{json.dumps(row)}\n" for row in messages]
        return self.encode("".join(rows) + ("" if tools is None else json.dumps(tools)))

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(ord(letter) % VOCABULARY for letter in text)

    def add(self, request: GenerationRequest) -> None:
        wanted = len(request.prompt) + request.sampling.max_tokens
        if not request.prompt:
            raise BadInput("the prompt has no tokens; give at least one")
        if wanted > self.facts.context_tokens:
            raise TooLong(f"{wanted} tokens are more than the {self.facts.context_tokens}", param="max_tokens")
        if any(token >= VOCABULARY for token in request.delivered):
            raise BadInput("a token id is outside the vocabulary")
        if self.holds >= self.slots + self.queue_max:
            raise EngineFull(f"{self.queue_max} requests are queued here already")
        self.added.append(request)
        self._waiting.append(_Run(request))
        self._timings.came(request.request_id, self._steps * self.step_s)

    def step(self) -> list[Output]:
        outputs = self._stepped()
        now = self._steps * self.step_s
        self._timings.stepped(len(outputs), {output.request_id for output in outputs if output.tokens}, now)
        for output in outputs:
            if output.error is not None or output.finish is not None:
                self._timings.ended(output.request_id, now, is_finished=output.error is None)
        return outputs

    def _stepped(self) -> list[Output]:
        self._steps += 1
        self.takes_s += self.step_s
        while self._waiting and len(self._running) < self.slots:
            self._running.append(self._waiting.popleft())
            self._timings.runs([self._running[-1].request.request_id], (self._steps - 1) * self.step_s)
        outputs, room = [], self.prefill_chunk
        for run in list(self._running):
            if self.fails is not None:
                outputs.append(Output(request_id=run.request.request_id, error=self.fails))
                self._running.remove(run)
                continue
            if run.prefilled < run.to_prefill:
                taken = min(room, run.to_prefill - run.prefilled)
                room -= taken
                run.prefilled += taken
                self._prefilled += taken
                self.takes_s += taken * self.read_s
                run.made = len(run.request.delivered)
                run.chars = run.request.delivered_chars
                if run.prefilled < run.to_prefill:
                    continue
            output = self._one_more(run)
            outputs.append(output)
            if output.finish is not None:
                self._running.remove(run)
        self.fails = None
        return outputs

    def _one_more(self, run: _Run) -> Output:
        """The next token; the text of every second one is held back for one step, as of half a character."""
        prompt, most = run.request.prompt, run.request.sampling.max_tokens
        end = most if self.ends_at is None else min(most, self.ends_at)
        fresh = () if run.made >= end else (token_at(prompt, run.made),)
        run.made += len(fresh)
        is_end = run.made >= end
        certain = text_of(prompt, run.made if is_end else run.made - run.made % 2)
        text, run.chars = certain[run.chars :], max(run.chars, len(certain))
        logprobs = (TokenLogprob(text="w", logprob=self.logprob, top=(("w", self.logprob),)),) if fresh else ()
        return Output(
            request_id=run.request.request_id,
            tokens=fresh,
            text=text,
            logprobs=logprobs if run.request.sampling.logprobs is not None else (),
            finish=("length" if run.made >= most else "stop") if is_end else None,
        )

    def cancel(self, request_id: str) -> None:
        self._timings.ended(request_id, 0.0, is_finished=False)
        self._waiting = deque(run for run in self._waiting if run.request.request_id != request_id)
        self._running = [run for run in self._running if run.request.request_id != request_id]

    def progress(self, request_id: str) -> Progress:
        for run in self._running:
            if run.request.request_id == request_id:
                return Progress(0, run.prefilled)
        for place, run in enumerate(self._waiting, 1):
            if run.request.request_id == request_id:
                return Progress(place, 0)
        raise BadInput(f"there is no request {request_id!r}")

    def embed(self, texts: Sequence[str | Sequence[int]]) -> Embeddings:
        self.takes_s += self.embed_s * len(texts) + self.embed_pass_s
        self.embedded.append(len(texts))
        if self.embed_error is not None:
            raise self.embed_error
        if (place := next((place for place, text in enumerate(texts) if not text), None)) is not None:
            raise BadInput("a text is empty", param="input", place=place)
        return Embeddings(
            facts=self.facts,
            dimensions=DIMENSIONS,
            vectors=tuple(vector_of(text) for text in texts),
            truncated=tuple(len(text) > self.facts.context_tokens for text in texts),
            lengths=tuple(len(text) for text in texts),
            passes=1,
            padded=len(texts) * max(len(text) for text in texts),
            seconds=self.embed_s * len(texts) + self.embed_pass_s,
        )

    def looking(self, text: str, piece: int) -> Generator[None, None, Looked | None]:
        """Two tokens are judged, of which one is right, at a confidence of 0.75."""
        self.looks.append((text, piece))
        before = self.facts
        for _ in range(self.look_passes):
            self.takes_s += self.look_s
            if self.look_error is not None:
                raise self.look_error
            yield
            if self.facts is not before:
                return None
        nats = float(len(text)) if self.look_nats is None else self.look_nats
        return Looked(revision=before.revision, nats=nats, judged=((0.75, True), (0.75, False)))

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(
            slots_total=self.slots,
            slots_free=max(0, self.slots - len(self._running)),
            queue_length=len(self._waiting),
            queue_max=self.queue_max,
            kv_tokens_total=1_000_000,
            kv_tokens_free=1_000_000,
            steps=self._steps,
            decode_tok_s=10.0,
            prefill_tok_s=100.0,
            prefilled_tokens=self._prefilled,
            timings=self._timings.read(),
            openness=self.openness,
        )

    def device_free_bytes(self) -> int:
        return 1 << 30

    def accelerator_bytes(self) -> int | None:
        return None


def vector_of(text: str | Sequence[int]) -> bytes:
    """A text's vector, whoever makes it."""
    seed = sum(map(ord, text)) if isinstance(text, str) else sum(text)
    return struct.pack(f"<{DIMENSIONS}f", *(float((seed + place) % 97) for place in range(DIMENSIONS)))


def facts(**changes: object) -> ModelFacts:
    """The facts of `tale`, changed."""
    return replace(TALE, **changes)  # type: ignore[arg-type]  # a test's own fields


class Turns:
    """Stands in for the engine's worker thread: a turn takes Trio's time, and cannot be cancelled, as a thread."""

    def __init__(self, runtime: FakeRuntime) -> None:
        self._runtime = runtime

    async def __call__(self, turn: Callable[[], list[Output]]) -> list[Output]:
        self._runtime.takes_s = 0.0
        outputs = turn()
        with trio.CancelScope(shield=True):
            await trio.sleep(self._runtime.takes_s)
        return outputs
