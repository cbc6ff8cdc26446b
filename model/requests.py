"""What the engine is asked and what it gives back: plain values, no tensor.

Rules: core. Token ids are ints of the model's vocabulary; positions count the tokens of the answer from 0, delivered
ones included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from model.config import ModelFacts
from model.errors import ModelError
from model.step import Priority
from model.timings import EngineTimings


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParameters:
    """How tokens are chosen and when to end. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and the neutral
    penalties are off. logprobs: None for none, n for the chosen token's and the n best alternatives'."""

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One answer to make. delivered: the answer's first tokens, made elsewhere: they count toward max_tokens and are
    not given out again; delivered_chars: characters of the answer's text that the client already has. requester: who
    asks, of those of its priority; private: nothing computed for it is used for another, or counted in Openness."""

    request_id: str
    prompt: tuple[int, ...]
    delivered: tuple[int, ...] = ()
    delivered_chars: int = 0
    sampling: SamplingParameters = SamplingParameters()
    requester: str = ""
    priority: Priority = Priority.OWN
    private: bool = False


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


class Progress(NamedTuple):
    """How far a request is before its first token. queue_position 0: it runs."""

    queue_position: int
    prefilled_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Openness:
    """Sums over tokens that the engine chose: how open each was (model/openness.py says of which distribution).

    tokens: that were judged, of `chosen` in all; entropy_sum_nats, margin_sum (first less second probability): over the
    judged ones; cost_s: what judging took, steps_s: what the steps took that it is a share of."""

    tokens: int = 0
    chosen: int = 0
    entropy_sum_nats: float = 0.0
    margin_sum: float = 0.0
    cost_s: float = 0.0
    steps_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatistics:
    """The engine's state in numbers. The speeds are of the whole engine, measured over its real steps; 0: not yet.
    An encoder has no slots. timings, openness: None where no engine of ours measures them."""

    slots_total: int = 0
    slots_free: int = 0
    queue_length: int = 0
    queue_max: int = 0
    kv_tokens_total: int = 0
    kv_tokens_free: int = 0
    steps: int = 0
    decode_tok_s: float = 0.0
    prefill_tok_s: float = 0.0
    decoded_tokens: int = 0
    prefilled_tokens: int = 0
    queried_tokens: int = 0  # of requests that were admitted: those whose KV might have been there
    reused_tokens: int = 0  # of these, whose KV was there already
    recomputed_tokens: int = 0  # a second time, after a preemption
    preemptions: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    timings: EngineTimings | None = None
    openness: Openness | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """What the weights at `revision` gave to a text's tokens: nats is the sum of -ln p(token) over them; judged: of
    each, the probability of the token that the model held for likeliest, and whether it was that one."""

    revision: str
    nats: float
    judged: tuple[tuple[float, bool], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """Vectors in the order of the texts as little-endian fp32, which texts were cut, and the tokens read of each.
    passes: forward passes; padded: tokens that went through them, padding among them; seconds: all that it took, 0 if
    that was not measured."""

    facts: ModelFacts
    dimensions: int
    vectors: tuple[bytes, ...]
    truncated: tuple[bool, ...]
    lengths: tuple[int, ...]
    passes: int = 0
    padded: int = 0
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens read in all, without padding."""
        return sum(self.lengths)
