"""What may be asked of a node's own state and memory, and what is told: questions in the path, a note's body.

Rules: core. As node/web/schema.py: strict, unknown names refused and named, every refusal a BadRequest whose `param` is
the field. A question's values are text, so a number is read from it. A name that comes twice is refused where one is
meant: which of the two was meant cannot be known.
Source: INTERFACES.md, GET /api/v1/self and /api/v1/memory; node/self_face.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from node.errors import BadRequest
from node.events import KINDS, TEXT_CHARS_MAX
from node.self_face import QUESTION_CHARS_MAX, RECALLED_MAX
from node.web.schema import Strict, fitted

PATHS_MAX: Final = 16  # members of one history: a page of plots
PATH_CHARS_MAX: Final = 64  # as node.events.Name
SNAPSHOTS_MAX: Final = 1_000  # of one history: as store_recall.RECALL_MAX
SNAPSHOTS_DEFAULT: Final = 60  # an hour of them
SUBJECT_CHARS_MAX: Final = 128  # as node.events.Subject
Asked = TypeVar("Asked", bound="Query")
Path = Annotated[str, Field(min_length=1, max_length=PATH_CHARS_MAX)]
Subject = Annotated[str, Field(min_length=1, max_length=SUBJECT_CHARS_MAX)]
Kind = Literal[tuple(KINDS)]  # type: ignore[valid-type]  # made from the table of kinds


class Query(Strict):
    """What stands behind the question mark of a path."""

    model_config = ConfigDict(strict=False)


class HistoryAsked(Query):
    """GET /api/v1/self/history. path: members of the state, repeated; n: snapshots, the newest."""

    path: list[Path] = Field(min_length=1, max_length=PATHS_MAX)
    n: int = Field(default=SNAPSHOTS_DEFAULT, ge=1, le=SNAPSHOTS_MAX)


class RecallAsked(Query):
    """GET /api/v1/memory. q: words that must all be there, or a text that theirs is to be like."""

    q: str = Field(default="", max_length=QUESTION_CHARS_MAX)
    kind: Kind | None = None  # type: ignore[valid-type]  # see Kind
    subject: Subject | None = None
    by: Literal["words", "meaning"] = "words"
    n: int = Field(default=20, ge=1, le=RECALLED_MAX)


class ForgetAsked(Query):
    """DELETE /api/v1/memory."""

    subject: Subject


class NothingAsked(Query):
    """A path that takes no question."""


class NoteRequest(Strict):
    """POST /api/v1/memory: a text to remember. subject: what it can be forgotten by; empty: by nothing."""

    text: str = Field(min_length=1, max_length=TEXT_CHARS_MAX)
    subject: str = Field(default="", max_length=SUBJECT_CHARS_MAX)


def asked_of(pairs: Iterable[tuple[str, str]], kind: type[Asked]) -> Asked:
    """A question of this kind out of its names and values, in their order. Raises BadRequest."""
    given: dict[str, Any] = {}
    for name, value in pairs:
        if name == "path":
            given.setdefault(name, []).append(value)
        elif name in given:
            raise BadRequest(f"{name[:60]} came twice, wanted once", param=name[:60])
        else:
            given[name] = value
    return fitted(given, kind)


# --- what is told ---


class _Told(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ToldField(_Told):
    """One member of the state; value null: not measured."""

    path: str
    value: Any
    unit: str
    formula: str
    source: str


class SelfTold(_Told):
    """GET /api/v1/self. doing: a sentence; before: what the run before was doing when it ended."""

    at_ms: int
    doing: str
    before: str | None
    fields: list[ToldField]
    prediction: dict[str, Any] | None
    memory: dict[str, Any]
    cost: dict[str, Any]


class HistoryTold(_Told):
    """Oldest first; null where a snapshot does not have the member. As many values a path as there are times."""

    ts_ms: list[int]
    figures: dict[str, list[float | None]]
    words: dict[str, list[str | None]]


class RecalledEvent(_Told):
    """One event; body null: it was forgotten. likeness: the cosine, by meaning only."""

    id: int
    ts_ms: int
    kind: str
    hash: str
    body: dict[str, Any] | None
    likeness: float | None = None


class Recalled(_Told):
    """The newest first, by meaning the most alike."""

    events: list[RecalledEvent]


class Noted(_Told):
    """The event that has the text."""

    id: int


class ForgottenTold(_Told):
    """How many events were erased."""

    forgotten: int


class VerifiedFault(_Told):
    """The first event that is wrong; id 0: the file as a whole."""

    id: int
    why: str


class Verified(_Told):
    """What the walk over the chain found."""

    is_whole: bool
    events: int
    head_id: int | None
    head_hash: str | None
    fault: VerifiedFault | None
