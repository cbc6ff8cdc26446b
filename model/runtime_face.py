"""The face of a runtime, for those who drive one or stand in for one: what node/ needs, with no torch imported.

Rules: model/runtime.py has the real one; a test checks that it keeps to this face.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, Protocol

from model.config import LinearFacts, ModelFacts
from model.requests import Embeddings, EngineStatistics, GenerationRequest, Looked, Output, Progress


class Served(Protocol):
    """What is served, in facts, here or by a server behind the node."""

    @property
    def facts(self) -> ModelFacts:
        """The main model."""

    @property
    def embedding_facts(self) -> ModelFacts:
        """The model that makes vectors."""

    @property
    def device(self) -> str:
        """Where the model is: cpu, cuda:0, mps, or the kind of server."""

    @property
    def linears(self) -> LinearFacts | None:
        """How the main model's linear layers are computed; None: not here."""

    def all_facts(self) -> tuple[ModelFacts, ...]:
        """Every model here."""

    def device_free_bytes(self) -> int:
        """Memory that is free there; 0: not known."""

    def accelerator_bytes(self) -> int | None:
        """Memory of an accelerator that this process holds; None: it uses none."""


class Runtime(Served, Protocol):
    """Generation and vectors from this machine's models. Sync; one thread at a time."""

    @property
    def linears(self) -> LinearFacts:
        """How the main model's linear layers are computed."""

    @property
    def has_work(self) -> bool:
        """Whether step() would do anything."""

    def render(
        self, messages: Sequence[tuple[str, str] | Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[int, ...]:
        """(role, content) pairs, or messages as templates take them -> prompt ids. Raises BadInput."""

    def encode(self, text: str) -> tuple[int, ...]:
        """Plain text -> prompt ids. Raises BadInput."""

    def add(self, request: GenerationRequest) -> None:
        """Queues a request. Raises BadInput, EngineFull."""

    def step(self) -> list[Output]:
        """At most one new token for each request, and one chunk of prompt."""

    def cancel(self, request_id: str) -> None:
        """Frees a request's room at once; an unknown id is no error."""

    def progress(self, request_id: str) -> Progress:
        """Place in the queue and tokens prefilled. Raises BadInput for an unknown id."""

    def embed(self, texts: Sequence[str | Sequence[int]]) -> Embeddings:
        """Vectors of length 1. Raises BadInput, ComputeFailed."""

    def looking(self, text: str, piece: int) -> Generator[None, None, Looked | None]:
        """Read a text with the main model, `piece` tokens a pass, and yield after each; None: its weights changed
        meanwhile. Raises BadInput, ComputeFailed."""

    def statistics(self) -> EngineStatistics:
        """The engine's numbers."""

    def preparing(self, weights: object) -> Generator[None, None, object]:
        """Make other weights of the main model, by name, ready for `adopt`, a piece at each step; requests may run
        meanwhile. Raises BadModel."""

    def adopt(self, ready: object, revision: str) -> None:
        """Goes on under weights that are ready, and under their name. No request may be running.

        Raises BadModel, and then nothing has changed.
        """
