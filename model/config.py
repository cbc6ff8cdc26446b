"""What a model is, in plain facts, and how an engine over it is set up.

Rules: core. A revision names the bytes of weights, configuration and tokenizer: equal revisions are equal models.
Quantized weights are other weights, with a revision of their own: an answer that a peer began in fp32 is not gone on
with in int8. The number type that is computed in (fp32, bf16) is no part of it: it rounds the same weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from model.step import SchedulerConfig

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16", "float16")
KINDS = ("causal", "encoder")
QUANTIZATIONS = ("none", "int8", "int4")
MODEL_TYPES = ("auto", *KINDS)
AUTOCAST = ("auto", "on", "off")
SEED_MAX = (1 << 63) - 1
CHUNK_MIN = 8  # tokens of prompt in a step while others decode, however slow they are: so that prompts end


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """One loaded model. kind: "causal" makes text, "encoder" only vectors. embeds: embed() uses this model.
    parameters and vocabulary are counts; kv_token_bytes is what one token takes in the KV cache. dtype: what is
    computed in, and what the weights are in unless quantization says otherwise. calls: how it calls functions
    (model/call_format.py), None: in no way that is known."""

    name: str
    revision: str
    kind: str
    context_tokens: int
    dtype: str
    parameters: int
    vocabulary: int
    kv_token_bytes: int = 0
    embeds: bool = False
    quantization: str = "none"
    calls: str | None = None

    @property
    def numbers(self) -> str:
        """What the weights are in, for who chooses a peer by it."""
        return self.dtype if self.quantization == "none" else self.quantization

    @property
    def weights_revision(self) -> str:
        """Of the weights before they were quantized: what a run of training calls them."""
        return self.revision.removesuffix(self._suffix)

    def at(self, weights_revision: str) -> ModelFacts:
        """The same model under other weights, quantized alike."""
        return replace(self, revision=weights_revision + self._suffix)

    def quantized(self, quantization: str) -> ModelFacts:
        """The same weights, quantized so: another revision."""
        return replace(self, quantization=quantization).at(self.weights_revision)

    @property
    def _suffix(self) -> str:
        return "" if self.quantization == "none" else f"-{self.quantization}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearFacts:
    """How a model's linear layers are computed, for people. kind: of packed layers, or `plain`. problem: why it is not
    what was asked for; "" if it is."""

    kind: str
    told: str
    problem: str = ""


UNPACKED = LinearFacts(kind="plain", told="plain")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Bounds of the engine. kv_tokens: tokens of all running requests together, prompts and answers."""

    slots: int = 16
    kv_tokens: int = 16_384
    prefill_chunk: int = 256  # tokens in one step: bounds how long others wait for their next token
    queue_max: int = 64
    block_tokens: int = 32  # of KV memory: what is given out, and shared, at once

    def __post_init__(self) -> None:
        """Raises ValueError for a bound below 1 (queue_max: below 0)."""
        if min(self.slots, self.kv_tokens, self.prefill_chunk, self.block_tokens) < 1 or self.queue_max < 0:
            raise ValueError(f"engine bounds must be at least 1 (queue_max 0), not {self}")

    def scheduler(self) -> SchedulerConfig:
        """The scheduler's bounds. A requester that is not this node's user may fill a quarter of the queue."""
        block_tokens = min(self.block_tokens, self.kv_tokens)
        chunk_min = max(1, min(CHUNK_MIN, self.prefill_chunk - self.slots))
        return SchedulerConfig(
            slots=self.slots,
            blocks=self.kv_tokens // block_tokens,
            block_tokens=block_tokens,
            step_tokens=max(self.prefill_chunk, self.slots + chunk_min),
            chunk_min=chunk_min,
            queue_max=self.queue_max,
            requester_queue_max=-(-self.queue_max // 4),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """How a node runs its models. quantize: of all weights of linear layers, on a CPU. threads 0: torch's choice.
    embedding_name "": vectors from the main model's states. kv_tokens 0: as many as kv_cache_mb (10**6 bytes each)
    holds for this model. model_type: what the main model must be, auto: whatever it is. max_length: tokens that prompt
    and answer, or a text to embed, may have together; 0: what the model reads."""

    device: str = "auto"
    dtype: str = "auto"
    quantize: str = "none"
    threads: int = 0
    embedding_name: str = ""
    slots: int = 16
    kv_cache_mb: int = 256
    kv_tokens: int = 0
    queue_max: int = 64
    prefill_chunk: int = 256
    model_type: str = "auto"
    max_length: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for a word that there is not, or a number below its bound."""
        if self.device not in DEVICES:
            raise ValueError(f"device must be one of {', '.join(DEVICES)}, not {self.device!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.quantize not in QUANTIZATIONS:
            raise ValueError(f"quantize must be one of {', '.join(QUANTIZATIONS)}, not {self.quantize!r}")
        if self.model_type not in MODEL_TYPES:
            raise ValueError(f"model_type must be one of {', '.join(MODEL_TYPES)}, not {self.model_type!r}")
        if min(self.threads, self.kv_tokens, self.max_length) < 0 or self.kv_cache_mb < 1:
            raise ValueError(f"threads, kv_tokens and max_length must be 0 or more, kv_cache_mb 1 or more, not {self}")

    def engine(self, kv_token_bytes: int) -> EngineConfig:
        """The engine's bounds for a model whose KV cache takes `kv_token_bytes` a token."""
        kv_tokens = self.kv_tokens or max(1, self.kv_cache_mb * 1_000_000 // max(1, kv_token_bytes))
        return EngineConfig(
            slots=self.slots, kv_tokens=kv_tokens, prefill_chunk=self.prefill_chunk, queue_max=self.queue_max
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One node's own training. A step is `accumulation` micro-batches. rate: AdamW's, after warmup_steps of growth.

    seed: order of rows, and dropout; each node draws its own. autocast: in bf16, where the device computes in it.
    """

    seed: int
    rate: float = 3e-4
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    accumulation: int = 1
    checkpointing: bool = False  # keep one state a layer and compute the rest again: less memory, a third more work
    autocast: str = "auto"

    def __post_init__(self) -> None:
        """Raises ValueError for a number out of its range, or an autocast that there is not."""
        if not 0 <= self.seed <= SEED_MAX or self.warmup_steps < 0 or self.accumulation < 1:
            raise ValueError(f"seed is 0 to 2^63 - 1, warmup_steps 0 or more, accumulation 1 or more, not {self}")
        if not (0.0 < self.rate < 1.0 and 0.0 <= self.weight_decay < 1.0 and 0.0 < self.clip_norm < math.inf):
            raise ValueError(f"rate is between 0 and 1, weight_decay 0 to 1, clip_norm above 0, not {self}")
        if self.autocast not in AUTOCAST:
            raise ValueError(f"autocast must be one of {', '.join(AUTOCAST)}, not {self.autocast!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyConfig:
    """What example-level privacy is to cost. No defaults: each is the operator's choice.

    noise_multiplier: standard deviation of the noise on a step's summed gradient, in units of clip_norm. 0: none, and
    then one step spends an infinite epsilon. clip_norm: to which norm each row's gradient is cut; inf: not, without
    noise only. (epsilon, delta): the promise, add or remove one row; epsilon_max: what may be spent; inf: count only.
    """

    noise_multiplier: float
    clip_norm: float
    delta: float
    epsilon_max: float

    def __post_init__(self) -> None:
        """Raises ValueError for a number out of its range."""
        if not 0.0 <= self.noise_multiplier < math.inf or not self.clip_norm > 0.0:
            raise ValueError(f"noise_multiplier is 0 or more and finite, clip_norm above 0, not {self}")
        if math.isinf(self.clip_norm) and self.noise_multiplier > 0.0:
            raise ValueError(f"noise is measured by clip_norm, which must be finite then, not {self}")
        if not 0.0 < self.delta < 1.0 or not self.epsilon_max > 0.0:
            raise ValueError(f"delta is between 0 and 1, epsilon_max above 0, not {self}")
