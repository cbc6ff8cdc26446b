"""What the rest of the node asks of its self-state and memory: the face, its questions and what is told.

Rules: core, no more than an interface: node/self_state.py implements it, tests fake it. Nothing here waits but what is
marked async, which reads or writes the memory in its own thread. What is told is made of records and measurements only.
Source: SELF.md, "Surface"; INTERFACES.md, GET /api/v1/self and /api/v1/memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from node.consciousness import ConsciousnessState
from node.prediction import Prediction

RECALLED_MAX: Final = 100  # events of one answer
QUESTION_CHARS_MAX: Final = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is to be recalled, newest first. query: words that must all be there, or with by="meaning" a text that
    theirs is to be like, most alike first; empty: any. kind, subject: only events of these. n: at most."""

    query: str = ""
    kind: str | None = None
    subject: str | None = None
    by: Literal["words", "meaning"] = "words"
    n: int = 20


class SelfFace(Protocol):
    """A node's self-state and memory, as seen from its doors and from what decides."""

    @property
    def state(self) -> ConsciousnessState:
        """What was measured, now."""

    @property
    def prediction(self) -> Prediction | None:
        """What the node expects of the period under way; None before two periods were measured."""

    def told(self) -> dict[str, Any]:
        """JSON for GET /api/v1/self: at_ms, doing (a sentence), before (what the run before was doing when it ended),
        fields (a list of path, value, unit, formula, source, in the order of consciousness_fields.FIELDS; value null:
        not measured), prediction (from_ms, to_ms, figures: name -> value, naive, low, high; or null), memory
        (StoreStatistics of node/store.py, and queued, dropped), cost (cpu_s and share of the process's, by part)."""

    async def recall(self, question: Question) -> list[dict[str, Any]]:
        """Events as JSON: id, ts_ms, kind, hash (hex), body (null: forgotten), likeness (by meaning only).

        Raises BadRequest (bounds, no model that embeds), NotReady."""

    async def history(self, paths: tuple[str, ...], n: int) -> dict[str, Any]:
        """The newest n snapshots, oldest first: ts_ms (list), figures: path -> list of number or null, words alike.

        Raises BadRequest for a path that is none."""

    async def verify(self) -> dict[str, Any]:
        """Walk the whole chain, in steps: is_whole, events, head_id, head_hash, fault (null, or id and why)."""

    async def note(self, text: str, subject: str) -> int:
        """Remember a text; its id. Raises BadRequest, NotReady (it could not be written)."""

    async def forget(self, subject: str) -> int:
        """Erase all of a subject; how many events. Raises BadRequest, NotReady (it is not all done)."""
