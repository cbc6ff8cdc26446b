"""What the engine is asked and what it gives back: plain values, no tensor.

Rules: core. Token ids are ints of the model's vocabulary; positions count the tokens of the answer from 0, delivered
ones included.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a token is chosen. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and the neutral penalties are off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One answer to make. delivered: the answer's first tokens, made elsewhere: they count toward max_tokens and are
    not given out again; delivered_chars: characters of the answer's text that the client already has.
    logprobs: None for none, n for the chosen token's and the n best alternatives'."""

    request_id: str
    prompt: tuple[int, ...]
    max_tokens: int
    delivered: tuple[int, ...] = ()
    delivered_chars: int = 0
    sampling: SamplingParams = SamplingParams()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Natural-log probability of a chosen token under the model's own distribution, and the best alternatives."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What one step made for one request. finish: "stop" or "length" with its last output. error: its end without
    an answer; then nothing more comes for it."""

    request_id: str
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: str | None = None
    error: ModelError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a request is before its first token. queue_position 0: it runs."""

    queue_position: int
    prefilled_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatistics:
    """The engine's state in numbers. The speeds are of the whole engine, measured over its real steps; 0: not yet."""

    slots_total: int
    slots_free: int
    queue_length: int
    queue_max: int
    kv_tokens_total: int
    kv_tokens_free: int
    steps: int
    decode_tok_s: float
    prefill_tok_s: float
    decoded_tokens: int
    prefilled_tokens: int
    finished: int
    failed: int
    cancelled: int
