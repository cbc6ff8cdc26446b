"""The models that bench.serving measures: a Llama with random weights made in memory, and our engine over it.

Rules: no end token, so each answer has the length that was asked for. The tokenizer is byte-level BPE with as many
entries as the vocabulary: to make text of tokens, which an engine's steps do, costs what it costs with a real one.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.serving_asks import Shape
from model.config import EngineConfig, ModelFacts
from model.engine import Engine
from model.linears import kinds_here, pack
from model.linears_joined import join
from model.load import Found, Loaded, kv_token_bytes
from model.norms import quicken
from model.packing import trial
from model.tokens import Tokens

SLOTS: Final = 16
KV_TOKENS: Final = 8_192  # as many as the rivals are given
QUEUE_MAX: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model with linear layers of one kind. is_invariant: whether a row's bits in them are its own in any batch."""

    kind: str
    loaded: Loaded
    is_invariant: bool

    @property
    def slug(self) -> str:
        """The kind, as figures are named."""
        return self.kind.replace("-", "_")

    @property
    def path(self) -> str:
        """The kind, and whether it is invariant, as it stands beside a figure."""
        return f"{self.kind}, {'invariant' if self.is_invariant else 'not invariant'}"

    def engine(self, slots: int = SLOTS, kv_tokens: int = KV_TOKENS, queue_max: int = QUEUE_MAX) -> Engine:
        """A new one."""
        return Engine(self.loaded, EngineConfig(slots=slots, kv_tokens=kv_tokens, queue_max=queue_max))


def served(shape: Shape, kind: str) -> Served:
    """A model on the CPU, its linear layers joined and packed as a node does (model/packing.py); the rest, and the KV
    cache, in fp32. Raises as `pack` does."""
    loaded = loaded_of(llama_config(shape), f"llama {kind}", torch.float32, torch.device("cpu"))
    join(loaded.model, lambda: trial(loaded))
    quicken(loaded.model)
    return Served(kind=kind, loaded=loaded, is_invariant=pack(loaded.model, kind).is_invariant)


def kinds_to_measure() -> tuple[str, ...]:
    """Those that compute fast here; fp32 only where there is no other."""
    here = kinds_here()
    return tuple(kind for kind in here if kind != "fp32") or here


def llama_config(shape: Shape) -> LlamaConfig:
    """A Llama of these sizes, with transformers' own attention for the device."""
    return LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.context,
        attn_implementation="sdpa",
    )


def random_llama(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """Random weights, the same each time; generate() goes on to the length that is asked for."""
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def loaded_of(config: LlamaConfig, name: str, dtype: torch.dtype, device: torch.device) -> Loaded:
    """A random model as model.load would give it, without an end token."""
    model = random_llama(config, dtype, device)
    facts = ModelFacts(
        name=name,
        revision="random",
        kind="causal",
        context_tokens=config.max_position_embeddings,
        dtype=str(dtype).removeprefix("torch."),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocabulary=config.vocab_size,
        kv_token_bytes=kv_token_bytes(config, dtype),
    )
    nowhere = Path("/nonexistent")  # it has no files
    return Loaded(
        facts=facts,
        found=Found(name, nowhere, nowhere),
        read_as=facts.revision,
        model=model,
        tokens=tokens_of(config.vocab_size),
        end_tokens=frozenset(),
        device=device,
    )


def tokens_of(vocabulary: int) -> Tokens:
    """A tokenizer with so many words, each with its space."""
    bpe = {"type": "BPE", "vocab": {f"Ġw{n}": n for n in range(vocabulary)}, "merges": [], "byte_fallback": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        file.write_text(json.dumps({"version": "1.0", "added_tokens": [], "decoder": level, "model": bpe}))
        return Tokens(PreTrainedTokenizerFast(tokenizer_file=str(file)))
