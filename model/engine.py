"""The engine: step() admits, decodes one token of every running request, and prefills one chunk of prompts.

Rules: sync, one thread. A request's answer depends on nothing but itself: each has its own KV cache and its own
forward pass, so its numbers are those of a request alone, and one that fails ends alone. No step prefills more than
prefill_chunk tokens, so none is long. Delivered tokens are replayed as text, then prefilled like a prompt.
Source: step() as schedule, run, take note: GeeeekExplorer/nano-vllm `nanovllm/engine/llm_engine.py`.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from model.config import EngineConfig
from model.errors import FOREIGN, BadInput, ComputeFailed, ModelError, OutOfMemory, first_line
from model.forward import KV, Forward
from model.load import Loaded
from model.requests import EngineStatistics, GenerationRequest, Output, Progress, TokenLogprob
from model.sample import choose
from model.schedule import Schedule
from model.text import TextStream

REPLAY_TOKENS_MAX = 4_096  # delivered tokens turned into text in one step: 10 us each
RATE_WEIGHT = 0.1  # of the newest step in the measured speeds
OUT_OF_MEMORY_TEXT = ("can't allocate memory", "out of memory")


@dataclass(slots=True)
class _Sequence:
    """One running request. tokens: prompt and answer so far; cached: how many of them are in the KV cache."""

    request: GenerationRequest
    text: TextStream
    kv: KV
    prompt_set: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    generated: Counter[int] = field(default_factory=Counter)
    cached: int = 0
    answer_length: int = 0
    replayed: int = 0
    carry: str = ""  # text of delivered tokens that the client does not have yet

    @property
    def pending(self) -> int:
        """Tokens that the next forward passes must take in; 1 while decoding."""
        return len(self.tokens) - self.cached


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
        """`clock` gives seconds, for the measured speeds only."""
        self._loaded = loaded
        self._config = config or EngineConfig()
        self._clock = clock
        self._forward = Forward(loaded)
        self._schedule = Schedule(self._config)
        self._requests: dict[str, GenerationRequest] = {}
        self._running: dict[str, _Sequence] = {}
        self._turns: deque[str] = deque()  # whose prompt is prefilled next
        self._decode_rate = Rate()
        self._prefill_rate = Rate()
        self._counts: Counter[str] = Counter()

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._requests)

    def add(self, request: GenerationRequest) -> None:
        """Takes a request in; it runs when there is room. Raises BadInput, EngineFull, and then holds nothing of it."""
        self._check(request)
        self._schedule.add(request.request_id, len(request.prompt) + request.sampling.max_tokens)
        self._requests[request.request_id] = request

    def cancel(self, request_id: str) -> None:
        """Ends a request without an output; its room is free at once. An unknown id is no error."""
        if request_id in self._requests:
            self._end(request_id, "cancelled")

    def progress(self, request_id: str) -> Progress:
        """How far a request is. Raises BadInput for an unknown id."""
        position = self._schedule.position(request_id)
        if position is None:
            raise BadInput(f"there is no request {request_id!r}")
        sequence = self._running.get(request_id)
        return Progress(queue_position=position, prefilled_tokens=0 if sequence is None else sequence.cached)

    def statistics(self) -> EngineStatistics:
        """The engine's state; costs microseconds."""
        return EngineStatistics(
            slots_total=self._config.slots,
            slots_free=self._schedule.slots_free,
            queue_length=self._schedule.queue_length,
            queue_max=self._config.queue_max,
            kv_tokens_total=self._config.kv_tokens,
            kv_tokens_free=self._schedule.kv_tokens_free,
            steps=self._counts["steps"],
            decode_tok_s=self._decode_rate.value,
            prefill_tok_s=self._prefill_rate.value,
            decoded_tokens=self._counts["decoded"],
            prefilled_tokens=self._counts["prefilled"],
            finished=self._counts["finished"],
            failed=self._counts["failed"],
            cancelled=self._counts["cancelled"],
        )

    def step(self) -> list[Output]:
        """One round: admit, one token for each request that decodes, one chunk of prompts. Never raises for a
        request's fault: that request ends with Output.error."""
        self._counts["steps"] += 1
        outputs: list[Output] = []
        for request_id in self._schedule.admit():
            outputs += self._guarded(request_id, partial(self._start, self._requests[request_id]))
        outputs += self._decode()
        outputs += self._prefill()
        for output in outputs:
            if output.error is not None:
                self._end(output.request_id, "failed")
            elif output.finish is not None:
                self._end(output.request_id, "finished")
        return outputs

    def _check(self, request: GenerationRequest) -> None:
        facts = self._loaded.facts
        if not request.prompt:
            raise BadInput("the prompt has no tokens; give at least one")
        max_tokens = request.sampling.max_tokens
        if max_tokens < 1:
            raise BadInput(f"max_tokens must be at least 1, not {max_tokens}", param="max_tokens")
        wanted = len(request.prompt) + max_tokens
        if wanted > facts.context_tokens:
            raise BadInput(
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

    def _start(self, request: GenerationRequest) -> None:
        """A running sequence for an admitted request."""
        self._running[request.request_id] = _Sequence(
            request=request,
            text=self._loaded.tokens.stream(request.prompt, request.sampling.stop, request.delivered_chars),
            kv=self._forward.new_kv(),
            prompt_set=frozenset(request.prompt),
            tokens=list(request.prompt),
        )
        self._turns.append(request.request_id)

    def _end(self, request_id: str, how: str) -> None:
        """The one place where a request leaves the engine."""
        del self._requests[request_id]
        self._schedule.release(request_id)
        if self._running.pop(request_id, None) is not None and request_id in self._turns:
            self._turns.remove(request_id)
        self._counts[how] += 1

    def _decode(self) -> list[Output]:
        ready = [s for r, s in self._running.items() if r not in self._turns]
        if not ready:
            return []
        begin = self._clock()
        outputs: list[Output] = []
        for sequence in ready:
            outputs += self._guarded(sequence.request.request_id, partial(self._advance, sequence, 1))
        self._counts["decoded"] += len(ready)
        self._decode_rate.note(len(ready), self._clock() - begin)
        return outputs

    def _prefill(self) -> list[Output]:
        outputs: list[Output] = []
        room = self._config.prefill_chunk
        begin = self._clock()
        for _ in range(len(self._turns)):
            request_id = self._turns[0]
            sequence = self._running[request_id]
            if sequence.replayed < len(sequence.request.delivered):
                made = self._guarded(request_id, partial(self._replay, sequence))
            elif room > 0:
                count = self._forward.piece(min(room, sequence.pending))
                made = self._guarded(request_id, partial(self._advance, sequence, count))
                room -= count
            else:
                break
            self._turns.rotate(-1)
            if made:
                outputs += made
                self._turns.remove(request_id)
        done = self._config.prefill_chunk - room
        self._counts["prefilled"] += done
        self._prefill_rate.note(done, self._clock() - begin)
        return outputs

    def _replay(self, sequence: _Sequence) -> Output | None:
        """Turns delivered tokens into text again, a bounded number; an output only if they end the answer."""
        delivered = sequence.request.delivered
        until = min(len(delivered), sequence.replayed + REPLAY_TOKENS_MAX)
        for token in delivered[sequence.replayed : until]:
            text, finish = self._take(sequence, token)
            sequence.carry += text
            if finish is not None:
                return Output(request_id=sequence.request.request_id, text=sequence.carry, finish=finish)
        sequence.replayed = until
        return None

    def _guarded(self, request_id: str, act: Callable[[], Output | None]) -> list[Output]:
        """Does one thing for one request; what it makes, or its error, which ends this request alone."""
        try:
            output = act()
        except ModelError as exc:
            output = Output(request_id=request_id, error=exc)
        except (MemoryError, torch.OutOfMemoryError) as exc:
            output = Output(request_id=request_id, error=_out_of_memory(exc))
        except FOREIGN as exc:
            if any(text in str(exc) for text in OUT_OF_MEMORY_TEXT):
                return [Output(request_id=request_id, error=_out_of_memory(exc))]
            error = ComputeFailed(f"the model failed on this request ({type(exc).__name__}: {first_line(exc)})")
            error.__cause__ = exc
            output = Output(request_id=request_id, error=error)
        return [] if output is None else [output]

    def _advance(self, sequence: _Sequence, count: int) -> Output | None:
        """Feeds `count` pending tokens; when none is left, chooses the next one. Raises what the model raises."""
        begin = sequence.cached
        logits_V = self._forward.logits(sequence.kv, sequence.tokens, begin, begin + count)
        sequence.cached += count
        if logits_V is None:
            return None
        request, sampling = sequence.request, sequence.request.sampling
        token = choose(logits_V, sampling, sequence.answer_length, sequence.generated, sequence.prompt_set)
        logprobs = () if sampling.logprobs is None else (self._logprob(logits_V, token, sampling.logprobs),)
        text, finish = self._take(sequence, token)
        text, sequence.carry = sequence.carry + text, ""
        return Output(request_id=request.request_id, tokens=(token,), text=text, logprobs=logprobs, finish=finish)

    def _take(self, sequence: _Sequence, token: int) -> tuple[str, str | None]:
        """Appends a token of the answer; the text that became certain, and why the answer ends here if it does."""
        sequence.tokens.append(token)
        sequence.generated[token] += 1
        sequence.answer_length += 1
        if token in self._loaded.end_tokens:
            return sequence.text.finish(), "stop"
        text = sequence.text.push(token)
        if sequence.text.stopped:
            return text, "stop"
        if sequence.answer_length >= sequence.request.sampling.max_tokens:
            text += sequence.text.finish()
            return text, "stop" if sequence.text.stopped else "length"
        return text, None

    def _logprob(self, logits_V: torch.Tensor, token: int, alternatives: int) -> TokenLogprob:
        decode = self._loaded.tokens.decode_token
        logprobs_V = torch.log_softmax(logits_V, 0)
        best_K, ids_K = torch.topk(logprobs_V, min(alternatives, logprobs_V.shape[0]))
        top = tuple((decode(i), p) for i, p in zip(ids_K.tolist(), best_K.tolist(), strict=True))
        return TokenLogprob(text=decode(token), logprob=float(logprobs_V[token]), top=top)


def _out_of_memory(exc: BaseException) -> OutOfMemory:
    """Without its cause: the traceback's frames would hold the very memory that is short."""
    return OutOfMemory(f"the device has no memory left for this request ({first_line(exc)}); try a shorter one")
