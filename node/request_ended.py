"""A request that has ended, and the event that the memory has of it.

Rules: core. Metadata only, unless the operator opted in to text; of a request that is private or was sealed there is no
event at all: it counts in sums (load, the latency of a minute) and nowhere else. Text is of this node's own clients
alone, never of what came through a peer. The subject is the account, or the peer, so that both can be forgotten.
Source: SELF.md, "Memory"; docs/PRIVACY.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from node.events import TEXT_CHARS_MAX, Event, Inference
from node.work import EmbedWork, GenerateWork

OK: Final = "ok"
CANCELLED: Final = "cancelled"  # the client left
SUBJECT_CHARS_MAX: Final = 128  # as node.events.Subject
WORD_CHARS_MAX: Final = 256
COUNT_MAX: Final = (1 << 53) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a request ended here. account: whose it was; outcome: "ok", "cancelled", or the code of a RequestError;
    served_by: a peer's id, '' for this node; text: opted in, or None."""

    account: str
    is_hidden: bool  # private, or sealed
    model: str
    revision: str
    prompt_tokens: int
    answer_tokens: int
    took_s: float
    outcome: str
    served_by: str = ""
    text: str | None = None


def to_event(ended: Ended, ts_ms: int) -> Event | None:
    """Its event; None for one that is to leave none."""
    if ended.is_hidden:
        return None
    return Event(
        ts_ms=ts_ms,
        body=Inference(
            subject=word(ended.account, SUBJECT_CHARS_MAX),
            model=word(ended.model),
            revision=word(ended.revision),
            prompt_tokens=min(ended.prompt_tokens, COUNT_MAX),
            answer_tokens=min(ended.answer_tokens, COUNT_MAX),
            duration_ms=min(round(1000 * max(0.0, ended.took_s)), COUNT_MAX),
            outcome=ended.outcome,
            served_by=word(ended.served_by),
            text=None if ended.text is None else word(ended.text, TEXT_CHARS_MAX),
        ),
    )


def word(text: str, chars_max: int = WORD_CHARS_MAX) -> str:
    """As much of it as an event takes; what no bytes stand for becomes question marks."""
    return text[:chars_max].encode("utf-8", "replace").decode()


def text_of(work: GenerateWork | EmbedWork, answer: str) -> str | None:
    """What was said in a request and its answer, each at most half of what an event takes: of the question the end, of
    the answer the beginning. None for a request without words (token ids, texts to embed)."""
    if isinstance(work, EmbedWork):
        return None
    if work.messages is not None:
        asked = "\n".join(f"{message.role}: {message.content}" for message in work.messages if message.content)
    elif work.text is not None:
        asked = work.text
    else:
        return None
    half = TEXT_CHARS_MAX // 2 - 1
    return f"{asked[-half:]}\n\n{answer[:half]}"
