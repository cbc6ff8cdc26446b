"""How the requests of this node's own clients went: by model how many, how they ended and how long they took.

Rules: core. A request is a Passage; what comes for it and how it ends is told to that. No text, account or address
enters here; a model's name does only when a server answered under it or this node serves it, and of at most ROWS_MAX
of others', the rest being one row, OTHER. The revisions of a run of training are one (`revision_label`): a row for each
round would be one more without end. Times are seconds of one monotonic clock.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from model.histogram import FIRST_TOKEN_S, REQUEST_S, TOKEN_S, Distribution, Histogram, merged
from node.lineage import lineage_of
from node.work import TEXTS_MAX, TOKENS_MAX, AnswerItem, Embedded, Finished, Piece, Started

ROWS_MAX = 32
OTHER: Final = ("other", "")
NONE: Final = ("", "")  # no model was found for the request
WINDOW_S = 60
PERCENTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


@dataclass(slots=True, kw_only=True, eq=False)
class Row:
    """The requests that one model answered. finished: text, by reason (stop, length); errors: by code."""

    model: str
    revision: str
    finished: Counter[str] = field(default_factory=Counter)
    embedded: int = 0
    cancelled: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    generation_tokens: int = 0
    first_token_s: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_S))
    token_s: Histogram = field(default_factory=lambda: Histogram(TOKEN_S))
    request_s: Histogram = field(default_factory=lambda: Histogram(REQUEST_S))  # of finished texts
    embed_s: Histogram = field(default_factory=lambda: Histogram(REQUEST_S))  # of finished vectors


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStatistics:
    """A snapshot of a Row."""

    model: str
    revision: str
    finished: dict[str, int]
    embedded: int
    cancelled: int
    errors: dict[str, int]
    prompt_tokens: int
    generation_tokens: int
    first_token_s: Distribution
    token_s: Distribution
    request_s: Distribution
    embed_s: Distribution


@dataclass(slots=True, kw_only=True, eq=False)
class Passage:
    """One request, from its arrival to its end. Make it with Tallies.enter."""

    model: str | None  # that was asked for, or is asked now
    began: float
    row: Row | None = None  # once it is known who answers
    is_cached: bool = False
    last_at: float | None = None  # when the latest tokens came
    prompt_tokens: int = 0
    answer_tokens: int = 0
    reason: str = ""
    served: tuple[str, str, str] = ("", "", "")  # by which model, at which revision, by which peer
    said: list[str] | None = None  # the answer's text, where it is to be remembered


class Tallies:
    """All requests since start, and the rates of the last minute."""

    def __init__(self, now: float) -> None:
        self._rows: dict[tuple[str, str], Row] = {}
        self._rates = Rates(now)

    def know(self, model: str, revision: str) -> None:
        """This node serves the model: it has a row, be it one of zeros, and whatever the bound."""
        self._made((model, revision_label(revision)))

    def enter(self, model: str | None, now: float) -> Passage:
        """A request comes that asks for this model."""
        self._rates.note(now, requests=1)
        return Passage(model=model, began=now)

    def take(self, passage: Passage, item: AnswerItem, now: float) -> None:
        """An item of its answer came that the client gets."""
        match item:
            case Piece():
                if passage.said is not None:
                    passage.said.append(item.text)
                if item.tokens:
                    self._wrote(passage, len(item.tokens), now)
            case Started():
                passage.row = self._row(item.model, item.revision)
                passage.served = item.model, item.revision, item.served_by
                passage.is_cached, passage.prompt_tokens = item.cached, _plausible(item.prompt_tokens)
            case Finished():
                passage.reason, passage.prompt_tokens = item.reason, _plausible(item.prompt_tokens)

    def embedded(self, passage: Passage, vectors: Embedded) -> None:
        """Its vectors came."""
        passage.row = self._row(vectors.model, vectors.revision)
        passage.served = vectors.model, vectors.revision, vectors.served_by
        passage.prompt_tokens = _plausible(vectors.prompt_tokens, TEXTS_MAX)

    def end(self, passage: Passage, error: str, *, is_whole: bool, now: float) -> None:
        """It ended: whole, with an error's code, or ('' and not whole) since its client left."""
        row = passage.row or self._at_fault(passage.model)
        row.prompt_tokens += passage.prompt_tokens
        self._rates.note(now, prompt=passage.prompt_tokens, errors=int(bool(error)))
        took_s = now - passage.began
        if error:
            row.errors[error] += 1
        elif not is_whole:
            row.cancelled += 1
        elif passage.reason:
            row.finished[passage.reason] += 1
            row.request_s.observe(took_s)
        else:
            row.embedded += 1
            row.embed_s.observe(took_s)

    def statistics(self) -> tuple[RowStatistics, ...]:
        """All rows."""
        return tuple(_read(row) for row in self._rows.values())

    def latency(self) -> dict[str, dict[str, Any]]:
        """Percentiles since start over all models: see `percentiles`. ttft_s: from a request's arrival to its first
        token; token_s: from token to token; e2e_s: from its arrival to its end, of texts that finished."""
        rows = list(self._rows.values())
        return {
            "ttft_s": percentiles(merged((row.first_token_s.read() for row in rows), FIRST_TOKEN_S)),
            "token_s": percentiles(merged((row.token_s.read() for row in rows), TOKEN_S)),
            "e2e_s": percentiles(merged((row.request_s.read() for row in rows), REQUEST_S)),
        }

    @property
    def generation_tokens(self) -> int:
        """That clients got, since start."""
        return sum(row.generation_tokens for row in self._rows.values())

    def throughput(self, now: float) -> dict[str, float]:
        """Rates of the last window_s seconds: requests that came, tokens, errors."""
        return self._rates.read(now)

    def _wrote(self, passage: Passage, tokens: int, now: float) -> None:
        row = passage.row or self._at_fault(passage.model)
        row.generation_tokens += tokens
        passage.answer_tokens += tokens
        self._rates.note(now, generation=tokens)
        if passage.last_at is None:
            row.first_token_s.observe(now - passage.began)
        elif not passage.is_cached:  # that it came fast tells nothing of the model's speed
            row.token_s.observe((now - passage.last_at) / tokens, tokens)
        passage.last_at = now

    def _row(self, model: str, revision: str) -> Row:
        key = (model, revision_label(revision))
        if (row := self._rows.get(key)) is not None:
            return row
        return self._made(key if len(self._rows) < ROWS_MAX else OTHER)

    def _at_fault(self, model: str | None) -> Row:
        """Where a request counts that nobody answered: at the latest row of the model's name, if there is one."""
        for row in reversed(self._rows.values()):
            if row.model == model:
                return row
        return self._made(NONE)

    def _made(self, key: tuple[str, str]) -> Row:
        return self._rows.setdefault(key, Row(model=key[0], revision=key[1]))


class Rates:
    """Counts of the last WINDOW_S whole seconds, one place a second."""

    KINDS = ("requests", "prompt", "generation", "errors")

    def __init__(self, now: float) -> None:
        self._began = now
        self._places: deque[tuple[int, list[int]]] = deque()  # (second, counts in the order of KINDS)

    def note(self, now: float, *, requests: int = 0, prompt: int = 0, generation: int = 0, errors: int = 0) -> None:
        """So many came."""
        second = int(now)
        if not self._places or self._places[-1][0] != second:
            self._forget(second)
            self._places.append((second, [0, 0, 0, 0]))
        counts = self._places[-1][1]
        counts[0] += requests
        counts[1] += prompt
        counts[2] += generation
        counts[3] += errors

    def read(self, now: float) -> dict[str, float]:
        """Each a second, over window_s: WINDOW_S, or the time since start."""
        self._forget(int(now))
        window_s = min(max(now - self._began, 1.0), float(WINDOW_S))
        requests, prompt, generation, errors = (
            round(sum(counts[kind] for _, counts in self._places) / window_s, 3) for kind in range(len(self.KINDS))
        )
        return {
            "window_s": round(window_s, 1),
            "requests_per_s": requests,
            "prompt_tok_s": prompt,
            "generation_tok_s": generation,
            "errors_per_s": errors,
        }

    def _forget(self, second: int) -> None:
        while self._places and self._places[0][0] <= second - WINDOW_S:
            self._places.popleft()


def _plausible(tokens: int, texts: int = 1) -> int:
    """What a peer says of the prompts, as far as they can have been so long."""
    return min(tokens, TOKENS_MAX * texts)


def revision_label(revision: str) -> str:
    """The revision, or of a run of training the run."""
    return lineage_of(revision) or revision


def percentiles(spread: Distribution) -> dict[str, Any]:
    """{"p50", "p95", "p99": seconds, or None while there is nothing to tell of; "count": of how many}."""
    known = {name: spread.quantile(share) for name, share in PERCENTILES.items()}
    return {name: None if value is None else round(value, 6) for name, value in known.items()} | {"count": spread.count}


def model_rows(rows: Iterable[RowStatistics]) -> list[dict[str, Any]]:
    """JSON for GET /api/v1/metrics/model."""
    return [_model_row(row) for row in rows]


def _model_row(row: RowStatistics) -> dict[str, Any]:
    answered = sum(row.finished.values()) + row.embedded
    took_s = row.request_s.sum + row.embed_s.sum
    return {
        "model": row.model or None,
        "revision": row.revision or None,
        "inference_count": answered,
        "average_latency_ms": round(1000 * took_s / answered, 3) if answered else None,
        "error_count": sum(row.errors.values()),
        "cancelled_count": row.cancelled,
        "errors": row.errors,
        "finished": row.finished,
        "embeddings": row.embedded,
        "prompt_tokens": row.prompt_tokens,
        "generation_tokens": row.generation_tokens,
        "ttft_s": percentiles(row.first_token_s),
        "token_s": percentiles(row.token_s),
        "e2e_s": percentiles(row.request_s),
        "embedding_s": percentiles(row.embed_s),
    }


def _read(row: Row) -> RowStatistics:
    return RowStatistics(
        model=row.model,
        revision=row.revision,
        finished=dict(row.finished),
        embedded=row.embedded,
        cancelled=row.cancelled,
        errors=dict(row.errors),
        prompt_tokens=row.prompt_tokens,
        generation_tokens=row.generation_tokens,
        first_token_s=row.first_token_s.read(),
        token_s=row.token_s.read(),
        request_s=row.request_s.read(),
        embed_s=row.embed_s.read(),
    )
