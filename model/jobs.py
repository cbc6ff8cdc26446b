"""Calls of a model, carried out a step at a time: texts in, vectors or text out by the model's type.

Rules: sync, one thread. Many jobs go through the engine together; each ends by itself, whole or in an error, and what
is asked for beyond the engine's queue waits here. A text that an encoder cut is reported; a prompt that does not fit
is an error, so an answer is never made from half a prompt.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from model.errors import BadInput, EmptyInput, EngineFull, ModelError
from model.requests import GenerationRequest, Output, SamplingParameters
from model.runtime_face import Runtime
from model.settings import ModelSettings

TEXTS_MAX = 256  # of one call
TEXTS_A_STEP = 16  # through an encoder, so that a long call lets others in between


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One call. several: it came as a list, and so does its result. None: as the settings say."""

    texts: tuple[str, ...]
    several: bool
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int = 0


@dataclass(slots=True)
class Made:
    """What one text of a causal model's job has come to."""

    prompt_tokens: int = 0
    tokens: int = 0
    text: str = ""
    finish: str | None = None


@dataclass(slots=True, eq=False)
class Job:
    """One call under way. Its end is `error`, or all of its texts done."""

    asked: Asked
    key: int = 0
    error: ModelError | None = None
    made: list[Made] = field(default_factory=list)
    vectors: list[array[float]] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)
    read_tokens: int = 0

    @property
    def is_done(self) -> bool:
        """Whether nothing more comes of it."""
        count = len(self.asked.texts)
        whole = len(self.vectors) == count or (bool(self.made) and all(each.finish for each in self.made))
        return self.error is not None or whole


def asked_of(given: object, *, max_tokens: int | None, temperature: float | None, seed: int) -> Asked:
    """A call from what a caller gives: a text or a list of texts. Raises EmptyInput, BadInput."""
    several = not isinstance(given, str)
    if several and not isinstance(given, Sequence):
        raise BadInput(f"input is of the type {type(given).__name__}, wanted a text or a list of texts", param="input")
    texts = tuple(given) if isinstance(given, list | tuple) else (given,)
    if not texts:
        raise EmptyInput("input holds no text, wanted at least one", param="input")
    if len(texts) > TEXTS_MAX:
        raise BadInput(f"input holds {len(texts)} texts, at most {TEXTS_MAX} are taken at a time", param="input")
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            kind = type(text).__name__
            raise BadInput(f"text {place} of input is of the type {kind}, wanted a text", param="input", place=place)
        if not text:
            raise EmptyInput(f"text {place} of input is empty, wanted a character or more", param="input", place=place)
    if max_tokens is not None and max_tokens < 1:
        raise BadInput(f"max_tokens must be at least 1, not {max_tokens}", param="max_tokens")
    if temperature is not None and not 0.0 <= temperature <= 10.0:
        raise BadInput(f"temperature must be from 0 to 10, not {temperature}", param="temperature")
    return Asked(texts=texts, several=several, max_tokens=max_tokens, temperature=temperature, seed=seed)


class Jobs:
    """The jobs of one runtime."""

    def __init__(self, runtime: Runtime, settings: ModelSettings) -> None:
        self._runtime = runtime
        self._settings = settings
        self._count = 0
        self._running: dict[str, tuple[Job, int]] = {}  # by the engine's name of each request
        self._waiting: deque[tuple[Job, GenerationRequest]] = deque()
        self._embedding: deque[Job] = deque()

    @property
    def has_work(self) -> bool:
        """Whether step() would do anything."""
        return bool(self._running or self._waiting or self._embedding)

    def begin(self, job: Job) -> None:
        """Take a job in. Raises BadInput for a text that is no prompt; then nothing of it stays."""
        job.key = self._count = self._count + 1
        if self._runtime.facts.kind == "encoder":
            self._embedding.append(job)
            return
        prompts = [self._runtime.encode(text) for text in job.asked.texts]
        job.made = [Made(prompt_tokens=len(prompt)) for prompt in prompts]
        for place, prompt in enumerate(prompts):
            name = f"{job.key}-{place}"
            request = GenerationRequest(request_id=name, prompt=prompt, sampling=self._sampling(job.asked, place))
            self._waiting.append((job, request))

    def step(self) -> list[Job]:
        """One step for all; the jobs that ended with it."""
        ended = self._admit()
        if self._runtime.has_work:
            for output in self._runtime.step():
                if output.request_id in self._running and (job := self._note(output)) is not None:
                    ended.append(job)
        if self._embedding:
            ended += self._embed()
        return ended

    def cancel(self, job: Job) -> None:
        """Leave a job: nothing more comes of it."""
        self._waiting = deque(each for each in self._waiting if each[0] is not job)
        for name in [name for name, (whose, _) in self._running.items() if whose is job]:
            self._runtime.cancel(name)
            del self._running[name]
        if job in self._embedding:
            self._embedding.remove(job)

    def _sampling(self, asked: Asked, place: int) -> SamplingParameters:
        """As the HTTP door has it: text i has the seed plus i, and who names no limit gets half the context at most."""
        settings, context = self._settings, self._runtime.facts.context_tokens
        temperature = settings.temperature if asked.temperature is None else asked.temperature
        tokens = asked.max_tokens or max(1, min(settings.max_tokens, context // 2))
        return SamplingParameters(max_tokens=tokens, temperature=temperature, seed=asked.seed + place)

    def _admit(self) -> list[Job]:
        """As many of those who wait as the engine takes."""
        ended: list[Job] = []
        while self._waiting:
            job, request = self._waiting[0]
            try:
                self._runtime.add(request)
            except EngineFull:
                break  # they wait here
            except ModelError as exc:
                self._fail(job, exc)
                ended.append(job)
                continue
            self._waiting.popleft()
            self._running[request.request_id] = (job, int(request.request_id.rpartition("-")[2]))
        return ended

    def _note(self, output: Output) -> Job | None:
        """Take an output in; its job, if that has ended."""
        job, place = self._running[output.request_id]
        if output.error is not None:
            del self._running[output.request_id]
            self._fail(job, output.error)
            return job
        made = job.made[place]
        made.text += output.text
        made.tokens += len(output.tokens)
        if output.finish is not None:
            made.finish = output.finish
            del self._running[output.request_id]
        return job if job.is_done else None

    def _embed(self) -> list[Job]:
        """Some texts of the job whose turn it is."""
        job = self._embedding.popleft()
        begin = len(job.vectors)
        try:
            embedded = self._runtime.embed(job.asked.texts[begin : begin + TEXTS_A_STEP])
        except ModelError as exc:
            exc.place = None if exc.place is None else begin + exc.place
            self._fail(job, exc)
            return [job]
        job.vectors += [numbers_of(vector) for vector in embedded.vectors]
        job.truncated += embedded.truncated
        job.read_tokens += embedded.tokens
        if job.is_done:
            return [job]
        self._embedding.append(job)
        return []

    def _fail(self, job: Job, error: ModelError) -> None:
        job.error = error
        self.cancel(job)


def numbers_of(vector: bytes) -> array[float]:
    """The numbers of a little-endian fp32 vector."""
    values = array("f", vector)
    if array("H", b"\x01\x00")[0] != 1:  # a big-endian machine
        values.byteswap()
    return values
