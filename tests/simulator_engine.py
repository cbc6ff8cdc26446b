"""The simulator's engine: slots, a queue, and the one right token of each answer at each position.

Rules: no weights, only time; what it answers can be checked by anybody who knows the prompt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from crypto.identity import PeerId
from gossip.messages import ModelKind
from model.config import ModelFacts
from node.errors import NoRoom, RequestError
from node.work import AnswerItem, Finished, GenerateWork, Piece, Progress, Started
from tests.simulator_net import Timer

REVISION = "r1"
PROGRESS_S = 0.5
VOCABULARY = 50_000


class Machine(Protocol):
    """The process around an engine."""

    @property
    def peer_id(self) -> PeerId: ...
    @property
    def now(self) -> float: ...
    def after(self, seconds: float, call: Callable[[], None]) -> Timer: ...
    def offer(self) -> None: ...


def token_at(prompt: tuple[int, ...], position: int) -> int:
    """The one right token of an answer at a position."""
    return (sum(prompt) * 31 + len(prompt) * 7 + position * 101) % VOCABULARY


def text_at(prompt: tuple[int, ...], position: int) -> str:
    return f"w{token_at(prompt, position)} "


@dataclass(slots=True, eq=False)
class Job:
    """One request in an engine."""

    work: GenerateWork
    emit: Callable[[AnswerItem | RequestError], None]
    prompt: tuple[int, ...]
    began: float = 0.0
    made: int = 0
    prefilled: bool = False


class Engine:
    """Slots, a queue, and a token for each running request at each step."""

    revision = "r1"  # of every model here

    def __init__(
        self, process: Machine, model: str, *, slots: int = 2, queue_max: int = 4, step_s: float = 0.08
    ) -> None:
        self.slots, self.queue_max, self.step_s = slots, queue_max, step_s
        self.running: list[Job] = []
        self.waiting: deque[Job] = deque()
        self.model = model
        self._process = process
        self._steps = 0
        self._stepping = False
        self._told_at = 0.0
        self.first_token_s: float | None = None  # a running mean

    def serves(self, model: str | None, revision: str | None, kind: str) -> bool:
        return model in (None, self.model) and revision in (None, REVISION) and kind == ModelKind.CAUSAL

    def facts(self, kind: str) -> ModelFacts | None:
        return None  # nobody here has a shorter context than another

    def has_room(self) -> bool:
        return len(self.running) + len(self.waiting) < self.slots

    def add(self, work: GenerateWork, emit: Callable[[AnswerItem | RequestError], None]) -> Job:
        """Raises NoRoom."""
        if len(self.waiting) >= self.queue_max:
            raise NoRoom(f"{self.queue_max} requests wait here")
        assert work.tokens is not None
        job = Job(work, emit, work.tokens, self._process.now)
        self.waiting.append(job)
        emit(
            Started(served_by=self._process.peer_id, model=self.model, revision=REVISION, prompt_tokens=len(job.prompt))
        )
        if not self._stepping:
            self._stepping = True
            self._process.after(self.step_s, self._step)
        self._process.offer()
        return job

    def remove(self, job: Job) -> None:
        """Cancelled: its slot is free from now on."""
        if job in self.running:
            self.running.remove(job)
        elif job in self.waiting:
            self.waiting.remove(job)
        self._process.offer()

    def _step(self) -> None:
        self._steps += 1
        while self.waiting and len(self.running) < self.slots:
            self.running.append(self.waiting.popleft())
        for job in list(self.running):
            self._advance(job)
        if self._process.now - self._told_at >= PROGRESS_S:
            self._told_at = self._process.now
            for place, job in enumerate([*self.waiting]):
                job.emit(Progress(engine_steps=self._steps, prefilled_tokens=0, queue_position=place))
        self._stepping = bool(self.running or self.waiting)
        if self._stepping:
            self._process.after(self.step_s, self._step)
        self._process.offer()

    def _advance(self, job: Job) -> None:
        if not job.prefilled:
            job.prefilled, job.made = True, len(job.work.delivered)
            return
        if job.made < job.work.sampling.max_tokens:
            token, text = token_at(job.prompt, job.made), text_at(job.prompt, job.made)
            if job.made == len(job.work.delivered):
                took_s = self._process.now - job.began
                mean_s = took_s if self.first_token_s is None else self.first_token_s
                self.first_token_s = mean_s + 0.2 * (took_s - mean_s)
            job.made += 1
            job.emit(Piece(tokens=(token,), text=text))
        if job.made >= job.work.sampling.max_tokens and job in self.running:
            self.running.remove(job)
            job.emit(Finished(reason="length", prompt_tokens=len(job.prompt), completion_tokens=job.made))
