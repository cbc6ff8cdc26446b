"""A model without a node: load it, ask it, or keep it at work in a thread of its own.

    from model.service import initialize_model, run_model_inference, start_model_service

    model = initialize_model({"model_path": "default", "device": "cpu"})
    print(run_model_inference(model, "Once upon a time", max_tokens=40).text)

    with start_model_service({"model_path": "default"}) as service:  # ready when this returns
        answers = [service.submit(text) for text in ("One", "Two")]  # computed together
        print([answer.result().text for answer in answers])

Rules: sync. What comes out is what POST /api/v1/model/inference gives: vectors (the masked mean of the last hidden
states, of length 1) or text, by the model's type; the same model gives the same numbers. A text that was cut is
reported as truncated, a prompt that does not fit is an error. Every failure is a ModelError of model/errors.py.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from types import TracebackType

from model.config import ModelFacts
from model.errors import EngineFull, ModelError, NotLoaded
from model.jobs import Asked, Job, Jobs, asked_of
from model.runtime import Runtime
from model.settings import ModelSettings, settings_of

SUBMITTED_MAX = 1_024  # calls that a service has accepted and not ended
STOP_S_MAX = 30.0  # for what was accepted, when a service stops
_log = logging.getLogger("model.service")

Config = ModelSettings | Mapping[str, object] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens read, and made."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Inference:
    """What came of one call; embeddings, text, finish_reason and truncated are lists if the input was one. model_type
    says which of embeddings and text there is; the other is None. latency_ms counts from the call."""

    model: str
    revision: str
    model_type: str
    embeddings: list[float] | list[list[float]] | None = None
    text: str | list[str] | None = None
    finish_reason: str | list[str] | None = None
    truncated: bool | list[bool]
    usage: Usage
    latency_ms: float


class Model:
    """A loaded model. Any thread may ask it; calls take turns. Close it, or let it go, to free its memory."""

    def __init__(self, runtime: Runtime, settings: ModelSettings) -> None:
        """Use initialize_model()."""
        self.facts: ModelFacts = runtime.facts
        self._jobs: Jobs | None = Jobs(runtime, settings)
        self._turn = threading.Lock()  # a runtime is one thread's at a time

    def infer(self, asked: Asked) -> Inference:
        """One call to its end. Raises ModelError. Left by an exception (Ctrl-C), nothing of it stays."""
        began_s = time.monotonic()
        with self._turn:
            jobs, job = self._jobs, Job(asked)
            if jobs is None:
                raise NotLoaded(f"the model {self.facts.name} was closed: initialize it again")
            jobs.begin(job)
            try:
                while not job.is_done:
                    jobs.step()
            finally:
                jobs.cancel(job)
        return inference_of(job, self.facts, began_s)

    def close(self) -> None:
        """Free the model; who asks it afterwards gets NotLoaded."""
        with self._turn:
            self._jobs = None


def initialize_model(config: Config = None) -> Model:
    """Load a model by its settings (docs/operators/clients.md has the keys). Seconds of work.

    Raises BadSetting, NotLoaded (switched off), NotFound, BadModel, OutOfMemory, BadInput; then nothing stays loaded.
    """
    settings = settings_of(config)
    return Model(Runtime.load(settings.model_path, settings.runtime()), settings)


def run_model_inference(
    model: Model,
    input: str | Sequence[str],
    *,
    max_tokens: int | None = None,
    temperature: float | None = None,
    seed: int = 0,
) -> Inference:
    """Vectors or text of one text or several, by the model's type. None: as the model's settings say.

    Raises EmptyInput, BadInput (too long for the model), ComputeFailed, OutOfMemory, NotLoaded.
    """
    return model.infer(asked_of(input, max_tokens=max_tokens, temperature=temperature, seed=seed))


@dataclass(frozen=True, slots=True, eq=False)
class _Order:
    job: Job
    future: Future[Inference]
    began_s: float


class _Word(Enum):
    NOTHING = "nothing was put"
    LAST = "no more orders come"


class ModelService:
    """A model in a worker thread of its own. Any thread may submit; calls that overlap are computed together."""

    def __init__(self, settings: ModelSettings) -> None:
        """Use start_model_service()."""
        self._settings = settings
        self._orders: queue.SimpleQueue[_Order | _Word] = queue.SimpleQueue()
        self._open = 0  # accepted and not ended
        self._door = threading.Lock()  # of _open and _is_stopping: after LAST nothing is put
        self._is_stopping = False
        self._cut = threading.Event()
        self._ready: Future[ModelFacts] = Future()
        # a daemon, so that a program which forgets to stop it can end
        self._thread = threading.Thread(target=self._work, name="model-service", daemon=True)

    def __enter__(self) -> ModelService:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def facts(self) -> ModelFacts:
        """The model. Raises what its loading raised."""
        return self._ready.result()

    def submit(
        self,
        input: str | Sequence[str],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
    ) -> Future[Inference]:
        """As run_model_inference, at once; the result or its ModelError comes by the future. Cancelling that ends the
        call after at most one step. Raises EmptyInput, BadInput, EngineFull, NotLoaded (stopped)."""
        asked = asked_of(input, max_tokens=max_tokens, temperature=temperature, seed=seed)
        order = _Order(Job(asked), Future(), time.monotonic())
        with self._door:
            if self._is_stopping:
                raise NotLoaded("the model service has stopped: start another")
            if self._open >= SUBMITTED_MAX:
                raise EngineFull(f"{SUBMITTED_MAX} calls wait already (SUBMITTED_MAX): wait for some to end")
            self._open += 1
            self._orders.put(order)
        return order.future

    def stop(self, seconds_max: float = STOP_S_MAX) -> None:
        """Accept nothing more, finish what was accepted, end what lasts longer with NotLoaded. May be called again."""
        with self._door:
            if not self._is_stopping:
                self._is_stopping = True
                self._orders.put(_Word.LAST)
        self._thread.join(seconds_max)
        self._cut.set()
        self._thread.join()

    def _start(self) -> None:
        self._thread.start()
        self._ready.result()

    def _work(self) -> None:
        """The thread: load, say so, serve. However it ends, nobody waits for it afterwards."""
        running: dict[Job, _Order] = {}
        try:
            try:
                runtime = Runtime.load(self._settings.model_path, self._settings.runtime())
            except ModelError as exc:
                self._ready.set_exception(exc)
                return
            _log.info("the model %s %s is loaded and takes calls", runtime.facts.name, runtime.facts.revision)
            self._ready.set_result(runtime.facts)
            self._serve(Jobs(runtime, self._settings), running)
        finally:
            self._end(running)

    def _serve(self, jobs: Jobs, running: dict[Job, _Order]) -> None:
        is_last = False
        while not self._cut.is_set():
            while not is_last:
                order = self._next(wait=not jobs.has_work)
                if order is _Word.NOTHING:
                    break
                is_last = order is _Word.LAST
                if isinstance(order, _Order):
                    self._begin(jobs, order, running)
            if is_last and not jobs.has_work:
                return
            for job in [job for job, order in running.items() if order.future.cancelled()]:
                jobs.cancel(job)
                self._settle(running.pop(job), None)
            for job in jobs.step():
                self._settle(running.pop(job), job.error)

    def _next(self, *, wait: bool) -> _Order | _Word:
        """What was put next; NOTHING if nothing was and `wait` is false."""
        try:
            return self._orders.get(block=wait)
        except queue.Empty:
            return _Word.NOTHING

    def _begin(self, jobs: Jobs, order: _Order, running: dict[Job, _Order]) -> None:
        if order.future.cancelled():
            return self._settle(order, None)
        try:
            jobs.begin(order.job)
        except ModelError as exc:
            return self._settle(order, exc)
        running[order.job] = order

    def _settle(self, order: _Order, error: ModelError | None) -> None:
        with self._door:
            self._open -= 1
        if not order.future.set_running_or_notify_cancel():
            return
        if error is not None:
            order.future.set_exception(error)
        else:
            order.future.set_result(inference_of(order.job, self.facts, order.began_s))

    def _end(self, running: dict[Job, _Order]) -> None:
        """Nobody waits for a thread that is gone."""
        gone = NotLoaded("the model service has stopped: start another")
        with self._door:
            self._is_stopping = True
        if not self._ready.done():
            self._ready.set_exception(gone)
        for left in running.values():
            self._settle(left, gone)
        while (order := self._next(wait=False)) is not _Word.NOTHING:
            if isinstance(order, _Order):
                self._settle(order, gone)


def start_model_service(config: Config = None) -> ModelService:
    """A model in a thread of its own; ready when this returns. Stop it, or use it as a context manager.

    Raises what initialize_model raises; then no thread stays.
    """
    service = ModelService(settings_of(config))
    service._start()
    return service


def inference_of(job: Job, facts: ModelFacts, began_s: float) -> Inference:
    """The result of a job that is done. Raises the error that it ended in."""
    if job.error is not None:
        raise job.error
    latency_ms = round((time.monotonic() - began_s) * 1000, 3)
    one = 0 if not job.asked.several else None
    if facts.kind == "encoder":
        vectors = [list(vector) for vector in job.vectors]
        return Inference(
            model=facts.name,
            revision=facts.revision,
            model_type=facts.kind,
            embeddings=vectors if one is None else vectors[one],
            truncated=job.truncated if one is None else job.truncated[one],
            usage=Usage(prompt_tokens=job.read_tokens, completion_tokens=0),
            latency_ms=latency_ms,
        )
    texts = [each.text for each in job.made]
    reasons = [str(each.finish) for each in job.made]
    return Inference(
        model=facts.name,
        revision=facts.revision,
        model_type=facts.kind,
        text=texts if one is None else texts[one],
        finish_reason=reasons if one is None else reasons[one],
        truncated=[False] * len(texts) if one is None else False,  # a prompt that does not fit is an error
        usage=Usage(
            prompt_tokens=sum(each.prompt_tokens for each in job.made),
            completion_tokens=sum(each.tokens for each in job.made),
        ),
        latency_ms=latency_ms,
    )
