"""What a model is, in plain facts, and how an engine over it is set up.

Rules: core. A revision names the bytes of weights, configuration and tokenizer: equal revisions are equal models.
"""

from __future__ import annotations

from dataclasses import dataclass

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16", "float16")
KINDS = ("causal", "encoder")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """One loaded model. kind: "causal" makes text, "encoder" only vectors. parameters and vocabulary are counts."""

    name: str
    revision: str
    kind: str
    context_tokens: int
    dtype: str
    parameters: int
    vocabulary: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Bounds of the engine. kv_tokens: tokens of all running requests together, prompts and answers."""

    slots: int = 4
    kv_tokens: int = 16_384
    prefill_chunk: int = 256  # tokens of prompt in one step: bounds how long others wait for their next token
    queue_max: int = 64

    def __post_init__(self) -> None:
        """Raises ValueError for a bound below 1 (queue_max: below 0)."""
        if min(self.slots, self.kv_tokens, self.prefill_chunk) < 1 or self.queue_max < 0:
            raise ValueError(f"engine bounds must be at least 1 (queue_max 0), not {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """How a node runs its models. threads 0: leave torch's choice. embedding_name: "" for the model's own states."""

    device: str = "auto"
    dtype: str = "auto"
    threads: int = 0
    embedding_name: str = ""
    engine: EngineConfig = EngineConfig()

    def __post_init__(self) -> None:
        """Raises ValueError for a device or dtype that there is not."""
        if self.device not in DEVICES:
            raise ValueError(f"device must be one of {', '.join(DEVICES)}, not {self.device!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.threads < 0:
            raise ValueError(f"threads must be 0 (automatic) or more, not {self.threads}")
