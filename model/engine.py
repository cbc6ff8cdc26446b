"""The engine: step() plans, runs one forward pass for all that is planned, chooses tokens, and takes note.

Rules: sync, one thread. model/scheduler.py says who runs, model/execute.py how. A request's answer depends on nothing
but itself, and one that fails ends alone: a pass that fails is run again, request by request, to see whose fault it is.
Source: GeeeekExplorer/nano-vllm `nanovllm/engine/llm_engine.py`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from model.answer import Answer
from model.config import EngineConfig
from model.errors import FOREIGN, BadInput, ComputeFailed, EngineFull, ModelError, OutOfMemory, TooLong, first_line
from model.execute import Task, executor_for
from model.fair_share import Account
from model.load import Loaded
from model.openness import Judge
from model.requests import EngineStatistics, GenerationRequest, Output, Progress, TokenLogprob
from model.sample import choose, greedy, is_plain
from model.scheduler import Scheduler
from model.step import Outcome, Step
from model.timings import Timings

RATE_WEIGHT = 0.1  # of the newest step in the measured speeds
OUT_OF_MEMORY_TEXT = ("can't allocate memory", "out of memory")

T = TypeVar("T")


class Rate:
    """Tokens per second, an exponentially weighted mean over steps; 0 until measured."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def note(self, tokens: int, seconds: float) -> None:
        """Takes in one step's work."""
        if tokens > 0 and seconds > 0.0:
            now = tokens / seconds
            self.value = now if self.value == 0.0 else self.value + RATE_WEIGHT * (now - self.value)


class Engine:
    """Answers for many requests over one causal language model."""

    def __init__(
        self, loaded: Loaded, config: EngineConfig | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """`clock` gives seconds, for what is measured only."""
        self._loaded = loaded
        self._config = config or EngineConfig()
        self._clock = clock
        schedule = self._config.scheduler()
        self._executor = executor_for(loaded, schedule.blocks, schedule.block_tokens)
        self._scheduler = Scheduler(replace(schedule, blocks=self._executor.blocks), loaded.facts.revision.encode())
        self._requests: dict[str, GenerationRequest] = {}
        self._answers: dict[str, Answer] = {}  # of those that were admitted
        self._whole: set[str] = set()  # delivered whole: only replayed, and not scheduled
        self._decode_rate = Rate()
        self._prefill_rate = Rate()
        self._timings = Timings()
        self._judge = Judge(clock)
        self._counts: Counter[str] = Counter()

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._requests)

    @property
    def why_single(self) -> str:
        """Why this model's requests go one by one; "" if they share a pass."""
        return self._executor.why

    def add(self, request: GenerationRequest) -> None:
        """Takes a request in; it runs when there is room. Raises BadInput, EngineFull, and then holds nothing of it."""
        self._check(request)
        name, left = request.request_id, request.sampling.max_tokens - len(request.delivered)
        if name in self._requests:
            raise BadInput(f"request id {name!r} is already in use; choose another")
        if left:
            account = Account(request.priority, request.requester)
            self._scheduler.add(
                name, (*request.prompt, *request.delivered), left, account, self._shared_tokens(request)
            )
            self._timings.came(name, self._clock())
        elif len(self._whole) > self._config.queue_max:
            raise EngineFull(f"{len(self._whole)} answers are being replayed; try again later")
        else:
            self._whole.add(name)
        self._requests[name] = request

    def cancel(self, request_id: str) -> None:
        """Ends a request without an output; its room is free at once. An unknown id is no error."""
        if request_id in self._requests:
            self._scheduler.cancel(request_id)
            self._end(request_id, "cancelled")

    def progress(self, request_id: str) -> Progress:
        """How far a request is. Raises BadInput for an unknown id."""
        if request_id in self._whole:
            return Progress(queue_position=0, prefilled_tokens=0)
        return self._scheduler.progress(request_id)

    def forget(self, revision: str) -> None:
        """The weights have changed: nothing computed before is used again. To be called while no request is here."""
        self._scheduler.forget(revision.encode())

    def statistics(self) -> EngineStatistics:
        """The engine's state; costs microseconds."""
        scheduled = self._scheduler.statistics()
        blocks, size = scheduled.blocks, self._scheduler.blocks.block_tokens
        return EngineStatistics(
            slots_total=self._config.slots,
            slots_free=scheduled.slots_free,
            queue_length=scheduled.queue_length,
            queue_max=self._config.queue_max,
            kv_tokens_total=self._scheduler.blocks.blocks * size,
            kv_tokens_free=(blocks.free + blocks.cached) * size,
            steps=self._counts["steps"],
            decode_tok_s=self._decode_rate.value,
            prefill_tok_s=self._prefill_rate.value,
            decoded_tokens=scheduled.decoded,
            prefilled_tokens=scheduled.prefilled,
            queried_tokens=scheduled.queried,
            reused_tokens=scheduled.reused,
            recomputed_tokens=scheduled.recomputed,
            preemptions=scheduled.preemptions,
            finished=self._counts["finished"],
            failed=self._counts["failed"],
            cancelled=self._counts["cancelled"],
            timings=self._timings.read(),
            openness=self._judge.read(),
        )

    def step(self) -> list[Output]:
        """One round: at most one token for each running request, and one chunk of prompts. Never raises for a request's
        fault: that request ends with Output.error."""
        self._counts["steps"] += 1
        outputs = self._replay(list(self._whole))
        plan = self._scheduler.plan()
        for name in plan.preempted:
            self._executor.drop(name)
        errors = {o.request_id: o for o in self._admit(plan)}
        tasks = self._tasks(plan, errors.keys())
        began = self._clock()
        self._timings.runs((name for name, _ in plan.admitted), began)
        logits = self._run(tasks, errors)
        seconds = self._clock() - began
        made = {o.request_id: o for o in self._chosen(logits)}
        chosen = [name for name, output in made.items() if output.tokens]
        rows = [logits[name] for name in chosen if not self._requests[name].private]
        self._judge.judge(rows, len(chosen), self._clock() - began)
        errors |= {name: output for name, output in made.items() if output.error is not None}
        outcome = Outcome(
            sampled={name: output.tokens[0] for name, output in made.items() if output.tokens},
            finished=frozenset(name for name, output in made.items() if output.finish is not None),
            failed=frozenset(errors),
            seconds=seconds,
        )
        self._scheduler.took(outcome)
        self._note(plan, seconds)
        self._timings.stepped(sum(task.end - task.begin for task in tasks), outcome.sampled, began + seconds)
        for name in errors:
            self._scheduler.cancel(name)  # no error for one that took() has ended
        ended = made | errors
        outputs += self._replay([s.request_id for s in plan.chunks if s.request_id not in ended])
        outputs += ended.values()
        for output in outputs:
            if output.error is not None:
                self._end(output.request_id, "failed")
            elif output.finish is not None:
                self._end(output.request_id, "finished")
        return outputs

    def _shared_tokens(self, request: GenerationRequest) -> int | None:
        """How much of a request's KV others may use, and it theirs: what is the same to the bit whoever computes it."""
        if request.private or not self._executor.shares:
            return 0
        return None if self._executor.shares_answers else len(request.prompt)

    def _check(self, request: GenerationRequest) -> None:
        facts = self._loaded.facts
        if not request.prompt:
            raise BadInput("the prompt has no tokens; give at least one")
        max_tokens = request.sampling.max_tokens
        if max_tokens < 1:
            raise BadInput(f"max_tokens must be at least 1, not {max_tokens}", param="max_tokens")
        wanted = len(request.prompt) + max_tokens
        if wanted > facts.context_tokens:
            raise TooLong(
                f"the prompt has {len(request.prompt):,} tokens and max_tokens is {max_tokens:,}: together "
                f"{wanted:,}, more than the {facts.context_tokens:,} of {facts.name}; shorten one of them",
                param="max_tokens",
            )
        if len(request.delivered) > max_tokens:
            raise BadInput(
                f"{len(request.delivered):,} tokens are delivered already, more than max_tokens {max_tokens:,}"
            )
        ids = (*request.prompt, *request.delivered)
        if min(ids) < 0 or max(ids) >= facts.vocabulary:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise BadInput(
                f"token id {wrong} is outside the vocabulary of {facts.name} (0 to {facts.vocabulary - 1:,})"
            )

    # --- a step's parts, in their order ---

    def _replay(self, names: Iterable[str]) -> list[Output]:
        """Some of the delivered tokens of each of these; the outputs of answers that end with them, or fail."""
        outputs = []
        for name in names:
            if name not in self._answers:
                outputs += self._admitted([name])
            if (answer := self._answers.get(name)) is not None and answer.is_behind:
                ended, error = _guarded(name, answer.replay)
                outputs += [output for output in (ended, error) if output is not None]
        for output in outputs:
            self._scheduler.cancel(output.request_id)
        return outputs

    def _admit(self, plan: Step) -> list[Output]:
        """Answers for requests that run from now on; the errors of those that cannot."""
        return self._admitted(name for name, _ in plan.admitted if name not in self._answers)

    def _admitted(self, names: Iterable[str]) -> list[Output]:
        errors = []
        for name in names:
            make = partial(Answer, self._requests[name], self._loaded.tokens, self._loaded.end_tokens)
            answer, error = _guarded(name, make)
            if answer is not None:
                self._answers[name] = answer
            if error is not None:
                errors.append(error)
        return errors

    def _tasks(self, plan: Step, without: Iterable[str]) -> list[Task]:
        table, left_out = self._scheduler.blocks.table, set(without)
        return [
            Task(
                request_id=span.request_id,
                table=table(span.request_id),
                tokens=self._answers[span.request_id].tokens,
                begin=span.begin,
                end=span.end,
                samples=span.samples,
                prompt=len(self._requests[span.request_id].prompt),
            )
            for span in (*plan.decodes, *plan.chunks)
            if span.request_id not in left_out
        ]

    def _run(self, tasks: list[Task], errors: dict[str, Output]) -> dict[str, torch.Tensor]:
        """Logits of the tasks that sample; adds the errors of those whose pass failed."""
        if self._executor.shares and len(tasks) > 1:
            made, error = _guarded("", partial(self._executor.run, tasks))
            if error is None and made is not None:
                return made
        logits: dict[str, torch.Tensor] = {}
        for task in tasks:
            alone, error = _guarded(task.request_id, partial(self._executor.run, [task]))
            if error is not None:
                errors[task.request_id] = error
            logits |= alone or {}
        return logits

    def _chosen(self, logits: dict[str, torch.Tensor]) -> Iterable[Output]:
        """The next token of each, or its error."""
        plain = [name for name in logits if is_plain(self._requests[name].sampling)]
        best = dict(zip(plain, greedy([logits[name] for name in plain]), strict=True))
        for name, logits_V in logits.items():
            output, error = _guarded(name, partial(self._next, self._answers[name], logits_V, best.get(name)))
            if (done := output or error) is not None:
                yield done

    def _next(self, answer: Answer, logits_V: torch.Tensor, token: int | None) -> Output:
        while answer.is_behind:  # never long: a step replays more tokens than it computes
            if (ended := answer.replay()) is not None:
                return ended
        sampling = answer.request.sampling
        if token is None:
            token = choose(logits_V, sampling, answer.length, answer.generated, answer.prompt_set)
        logprobs = () if sampling.logprobs is None else (self._logprob(logits_V, token, sampling.logprobs),)
        return answer.push(token, logprobs)

    def _note(self, plan: Step, seconds: float) -> None:
        """Measured speeds; of a mixed step the decodes are taken to go at their own speed."""
        decodes, chunks = len(plan.decodes), sum(span.end - span.begin for span in plan.chunks)
        if not chunks:
            self._decode_rate.note(decodes, seconds)
        else:
            alone_s = decodes / self._decode_rate.value if self._decode_rate.value else 0.0
            self._prefill_rate.note(chunks, max(seconds - alone_s, seconds / 2))

    def _end(self, request_id: str, how: str) -> None:
        """The one place where a request leaves the engine."""
        del self._requests[request_id]
        self._answers.pop(request_id, None)
        self._whole.discard(request_id)
        self._executor.drop(request_id)
        self._timings.ended(request_id, self._clock(), is_finished=how == "finished")
        self._counts[how] += 1

    def _logprob(self, logits_V: torch.Tensor, token: int, alternatives: int) -> TokenLogprob:
        decode = self._loaded.tokens.decode_token
        logprobs_V = torch.log_softmax(logits_V, 0)
        best_K, ids_K = torch.topk(logprobs_V, min(alternatives, logprobs_V.shape[0]))
        top = tuple((decode(i), p) for i, p in zip(ids_K.tolist(), best_K.tolist(), strict=True))
        return TokenLogprob(text=decode(token), logprob=float(logprobs_V[token]), top=top)


def _guarded(request_id: str, act: Callable[[], T]) -> tuple[T | None, Output | None]:
    """Does one thing for one request: what it makes, or the output with its error, which ends this request alone."""
    try:
        return act(), None
    except ModelError as exc:
        return None, Output(request_id=request_id, error=exc)
    except (MemoryError, torch.OutOfMemoryError) as exc:
        return None, Output(request_id=request_id, error=_out_of_memory(exc))
    except FOREIGN as exc:
        if any(text in str(exc) for text in OUT_OF_MEMORY_TEXT):
            return None, Output(request_id=request_id, error=_out_of_memory(exc))
        error = ComputeFailed(f"the model failed on this request ({type(exc).__name__}: {first_line(exc)})")
        error.__cause__ = exc
        return None, Output(request_id=request_id, error=error)


def _out_of_memory(exc: BaseException) -> OutOfMemory:
    """Without its cause: the traceback's frames would hold the very memory that is short."""
    return OutOfMemory(f"the device has no memory left for this request ({first_line(exc)}); try a shorter one")
