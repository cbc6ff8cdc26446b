"""What the node sees of a model: load, render, add, step, cancel, embed, statistics. Everything here is sync.

Rules: load() and all that touches the engine belong to one worker thread; facts and statistics() may be read from
any. An encoder serves vectors only; without an encoder the causal model's own states serve as vectors.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its OpenMP spins at barriers otherwise
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # too: a page of 4 KiB costs 2 us when it is first touched

import torch

from model.config import LinearFacts, ModelFacts, RuntimeConfig
from model.embed import Embedder
from model.engine import Engine
from model.errors import BadInput, BadSetting
from model.linears import PackedModel, Ready
from model.load import Loaded, device_free_bytes, load, resolve
from model.load_progress import OnProgress
from model.look import looking
from model.packing import packed
from model.participant import load_named
from model.requests import Embeddings, EngineStatistics, GenerationRequest, Looked, Output, Progress
from model.template import TakesNoTools, Turn


class Runtime:
    """One node's models: one that generates or embeds, and maybe a second that embeds."""

    def __init__(self, loaded: Loaded, encoder: Loaded | None, config: RuntimeConfig) -> None:
        """Use load(). Raises BadModel for a pooling that is not supported."""
        embedding = replace((encoder or loaded).facts, embeds=True)
        self._encoder = replace(encoder or loaded, facts=embedding)
        self._loaded = loaded if encoder is not None else self._encoder
        engine = config.engine(loaded.facts.kv_token_bytes)
        self._engine = Engine(self._loaded, engine) if loaded.facts.kind == "causal" else None
        self._embedder = Embedder(self._encoder)

    @classmethod
    def load(cls, name: str, config: RuntimeConfig | None = None, on_progress: OnProgress | None = None) -> Runtime:
        """Loads the model, and the embedding model if one is named. Seconds of work: use a worker thread.

        on_progress: told how many tensors of the model under way are there, and of how many.

        Raises NotFound, BadModel, OutOfMemory, BadInput (quantize on a GPU), BadSetting (model_type, max_length);
        nothing stays allocated then.
        """
        config = config or RuntimeConfig()
        if config.threads:
            torch.set_num_threads(config.threads)
        names = [name]
        if config.embedding_name and config.embedding_name != name:
            names.append(config.embedding_name)
        loaded, *encoder = (
            packed(
                load(resolve(each), device=config.device, dtype=config.dtype, on_progress=on_progress), config.quantize
            )
            for each in names
        )
        _check(loaded.facts, config)
        loaded, *encoder = (_within(each, config.max_length) for each in (loaded, *encoder))
        return cls(loaded, encoder[0] if encoder else None, config)

    @property
    def facts(self) -> ModelFacts:
        """The main model."""
        return self._loaded.facts

    @property
    def embedding_facts(self) -> ModelFacts:
        """The model that embed() uses; the main one when there is no other."""
        return self._encoder.facts

    def all_facts(self) -> tuple[ModelFacts, ...]:
        """Every model here: the main one, then a second one that embeds."""
        return (self.facts,) if self._encoder is self._loaded else (self.facts, self.embedding_facts)

    @property
    def has_work(self) -> bool:
        """Whether step() would do anything."""
        return self._engine is not None and self._engine.has_work

    def render(self, messages: Sequence[Turn], tools: Sequence[Mapping[str, Any]] | None = None) -> tuple[int, ...]:
        """(role, content) pairs, or messages as templates take them -> prompt ids. Raises BadInput."""
        try:
            return self._loaded.tokens.render(messages, tools)
        except TakesNoTools as exc:
            raise BadInput(
                f"{self.facts.name} takes no tools: {exc}; leave them out, or ask another model", param="tools"
            ) from exc

    def encode(self, text: str) -> tuple[int, ...]:
        """Plain text -> prompt ids. Raises BadInput."""
        return self._loaded.tokens.encode(text)

    def add(self, request: GenerationRequest) -> None:
        """Queues a request. Raises BadInput, EngineFull."""
        self._generating().add(request)

    def step(self) -> list[Output]:
        """One step of the engine: at most one new token for each request, and one chunk of prompt."""
        return self._generating().step()

    def cancel(self, request_id: str) -> None:
        """Frees a request's room at once; an unknown id is no error."""
        if self._engine is not None:
            self._engine.cancel(request_id)

    def progress(self, request_id: str) -> Progress:
        """Place in the queue and tokens prefilled. Raises BadInput for an unknown id."""
        return self._generating().progress(request_id)

    def embed(self, texts: Sequence[str | Sequence[int]]) -> Embeddings:
        """Vectors of length 1. Many or long texts take long: give a few at a call. Raises BadInput, ComputeFailed."""
        return self._embedder.embed(texts)

    def looking(self, text: str, piece: int) -> Generator[None, None, Looked | None]:
        """Read a text with the main model, `piece` tokens a pass, and yield after each (model/look.py); None: its
        weights changed meanwhile. Requests may run between two passes. Raises BadInput, ComputeFailed."""
        self._generating()
        loaded = self._loaded
        work = looking(loaded, loaded.tokens.encode(text), piece)
        while True:
            try:
                next(work)
            except StopIteration as end:
                result: Looked = end.value
                return result
            yield
            if self._loaded is not loaded:
                return None

    def statistics(self) -> EngineStatistics:
        """The engine's numbers, with no slots for an encoder. Costs microseconds."""
        return EngineStatistics() if self._engine is None else self._engine.statistics()

    def device_free_bytes(self) -> int:
        """Memory that is free on the model's device."""
        return device_free_bytes(self._loaded.device)

    def accelerator_bytes(self) -> int | None:
        """Memory of the model's device that this process holds, torch's own reserve among it; None on a CPU."""
        if self._loaded.device.type == "cuda":
            return int(torch.cuda.memory_reserved(self._loaded.device))
        if self._loaded.device.type == "mps":
            return int(torch.mps.driver_allocated_memory())
        return None

    @property
    def loaded(self) -> Loaded:
        """The main model itself, for who trains a copy of it. Its weights are those that serve now."""
        return self._loaded

    def preparing(self, weights: object) -> Generator[None, None, object]:
        """Make other weights of the main model (a mapping of names to fp32 tensors) ready for `adopt`, a piece at each
        step; requests may run meanwhile. Raises BadModel."""
        assert isinstance(weights, Mapping)
        if self._loaded.packed is None:
            return weights
        return (yield from self._loaded.packed.preparing(weights))

    def adopt(self, ready: object, revision: str) -> None:
        """Goes on under weights that are ready, and under their name.

        No request may be running: an answer is made by one revision. Raises BadModel, and then nothing has changed.
        """
        assert not self.has_work, "a request is running: its KV cache is of the weights before"
        if isinstance(self._loaded.packed, PackedModel):
            assert isinstance(ready, Ready)
            self._loaded.packed.put(ready)
        else:
            assert isinstance(ready, Mapping)
            load_named(self._loaded.model, ready)
        if self._engine is not None:
            self._engine.forget(revision)
        is_encoder_too = self._encoder is self._loaded
        self._loaded = replace(self._loaded, facts=self._loaded.facts.at(revision))
        if is_encoder_too:
            self._encoder = self._embedder.loaded = self._loaded

    @property
    def linears(self) -> LinearFacts:
        """How the main model's linear layers are computed."""
        return self._loaded.linears

    @property
    def device(self) -> str:
        """Where the model is: cpu, cuda:0, mps."""
        return str(self._loaded.device)

    def _generating(self) -> Engine:
        if self._engine is None:
            raise BadInput(f"{self.facts.name} is an encoder: it makes vectors, not text; ask another model")
        return self._engine


def _check(facts: ModelFacts, config: RuntimeConfig) -> None:
    """Whether the main model is what the settings say. Raises BadSetting."""
    if config.model_type not in ("auto", facts.kind):
        raise BadSetting(
            f"model_type is {config.model_type!r}, and {facts.name} is of the type {facts.kind}: "
            "mend one of the two, or leave model_type out",
            param="model_type",
        )
    if config.max_length > facts.context_tokens:
        raise BadSetting(
            f"max_length is {config.max_length:,}, and {facts.name} reads at most {facts.context_tokens:,} tokens: "
            "give that or less, or leave max_length out",
            param="max_length",
        )


def _within(loaded: Loaded, max_length: int) -> Loaded:
    """The same model, which is asked for so many tokens at most; 0: for what it reads."""
    facts = loaded.facts
    if not 0 < max_length < facts.context_tokens:
        return loaded
    return replace(loaded, facts=replace(facts, context_tokens=max_length))
