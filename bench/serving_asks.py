"""What a serving benchmark asks, what it is told, and the lines over which a rival in a process of its own is asked.

Rules: nothing but the standard library, for a rival runs under a Python of its own. Prompts are random ids, new ones in
each turn, so that no cache knows them; answers have the length that was asked for. A due time is seconds from the start
of a load: who is late makes the user wait, and the wait counts from there. On the lines: one JSON object each way.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, NamedTuple

IDS_FROM: Final = 5  # below it tokenizers keep their special ones
PROMPT_TOKENS, NEW_TOKENS = 64, 32  # MEASURE.md
MIXED_PROMPT, MIXED_NEW, MIXED_NEW_MEAN = (32, 96), (8, 128), 41  # SERVING.md, "The number that matters"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama's sizes. Heads have as many keys and values as queries."""

    width: int = 512
    inner: int = 1376
    layers: int = 8
    heads: int = 8
    vocabulary: int = 32_000
    context: int = 2048


SHAPES: Final = {"60m": Shape(), "tiny": Shape(width=64, inner=160, layers=2, heads=4, vocabulary=1_000)}


class Ask(NamedTuple):
    """One request: when it is due, its prompt, and how many tokens its answer has."""

    due_s: float
    prompt: tuple[int, ...]
    new: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a load took. cpu_s: of the process that did the work, all its threads. decode_*: of the passes in which all
    requests decoded, 0 where that is not known. first_s: from when a request was due to its first token, by request."""

    tokens: int
    wall_s: float
    cpu_s: float
    decode_tokens: int = 0
    decode_wall_s: float = 0.0
    decode_cpu_s: float = 0.0
    first_s: tuple[float, ...] = field(default=())

    @property
    def tok_per_cpu_s(self) -> float:
        """End to end."""
        return self.tokens / self.cpu_s

    @property
    def tok_per_s(self) -> float:
        """End to end, by the wall's clock."""
        return self.tokens / self.wall_s

    @property
    def decode_tok_per_cpu_s(self) -> float:
        """Of the decoding alone; 0 when it is not known."""
        return self.decode_tokens / self.decode_cpu_s if self.decode_cpu_s else 0.0


def ids(rng: random.Random, count: int, shape: Shape) -> tuple[int, ...]:
    """So many random tokens."""
    return tuple(rng.randrange(IDS_FROM, shape.vocabulary) for _ in range(count))


def together(rng: random.Random, size: int, shape: Shape) -> list[Ask]:
    """A batch, all due at once, equal lengths."""
    return [Ask(0.0, ids(rng, PROMPT_TOKENS, shape), NEW_TOKENS) for _ in range(size)]


def mixed(rng: random.Random, due_s: float, shape: Shape) -> Ask:
    """One of a served load: the answer's length is exponential, within bounds."""
    new = round(rng.expovariate(1 / MIXED_NEW_MEAN))
    return Ask(due_s, ids(rng, rng.randint(*MIXED_PROMPT), shape), min(max(new, MIXED_NEW[0]), MIXED_NEW[1]))


def poisson(rng: random.Random, count: int, gap_s: float, shape: Shape) -> list[Ask]:
    """A served load: gaps between arrivals are exponential with this mean."""
    asks, due_s = [], 0.0
    for _ in range(count):
        asks.append(mixed(rng, due_s, shape))
        due_s += rng.expovariate(1 / gap_s)
    return asks


def to_line(path: str, asks: Sequence[Ask]) -> str:
    """What a rival is asked."""
    return json.dumps({"path": path, "asks": asks}) + "\n"


def told_of(line: str) -> Told:
    """What a rival says. Raises ValueError, TypeError for anything else."""
    fields = json.loads(line)
    return Told(**{**fields, "first_s": tuple(fields["first_s"])})


def answer_lines(answer: Callable[[str, list[Ask]], Told], **ready: Any) -> None:
    """A rival's whole life: say what it is, then answer line by line until there are no more.

    What others print to the output goes to the errors, so that the lines stay lines.
    """
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        for made in _answers(answer, ready):
            out.write(json.dumps(made) + "\n")
            out.flush()


def _answers(answer: Callable[[str, list[Ask]], Told], ready: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield ready
    for line in sys.stdin:
        asked = json.loads(line)
        yield asdict(answer(asked["path"], [Ask(due, tuple(prompt), new) for due, prompt, new in asked["asks"]]))
