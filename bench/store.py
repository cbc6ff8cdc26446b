"""`python -m bench.store`: what the node's memory costs: an append, a recall, forgetting and verifying at a million.

Rules: one thread, the data on the disk of the system's temporary folder (TMPDIR moves it), synchronous=FULL as in a
node. A million events (a hundred thousand with --quick): nine in ten are states, the rest inferences with a text of
some twenty words out of a thousand, and notes. A recall is the slowest of 50 questions of its kind, so that what is
not in the cache is in the figure. Retention keeps half of them raw.
Beside it: SELF.md's figures, measured before this code was written.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from bench.harness import Options, Row, options, report
from crypto.identity import Identity
from node.events import Event, Inference, Note, State
from node.retention import DAY_MS, Retention, Term
from node.store import Store

EVENTS: Final = 1_000_000
STATES: Final = 2_000  # SELF.md's rate reference
VECTORS: Final = 20_000
DIMS: Final = 384
QUESTIONS: Final = 50
T0_MS: Final = 1_800_000_000_000
WORDS: Final = tuple(f"word{n}" for n in range(1_000))


def state(rng: random.Random, ts_ms: int) -> Event:
    """As large as the vector of SELF.md: 30 figures and five words."""
    figures = {f"figure_{n}_ms": rng.random() for n in range(30)}
    words = {f"word_{n}": rng.choice(WORDS) for n in range(5)}
    return Event(ts_ms=ts_ms, body=State(figures=figures, words=words))


def other(rng: random.Random, ts_ms: int, number: int) -> Event:
    """An inference whose text was opted in, or a note."""
    text = " ".join(rng.choices(WORDS, k=20))
    subject = f"user{number % 1000}"
    if number % 20 == 0:
        return Event(ts_ms=ts_ms, body=Note(text=text, subject=subject))
    return Event(
        ts_ms=ts_ms,
        body=Inference(
            model="default", revision="r1", prompt_tokens=90, answer_tokens=40, duration_ms=800, outcome="ok",
            text=text, subject=subject,
        ),
    )  # fmt: skip


def worst_ms(ask: Callable[[], object]) -> float:
    """The slowest of QUESTIONS calls."""
    times = []
    for _ in range(QUESTIONS):
        start = time.perf_counter()
        ask()
        times.append(time.perf_counter() - start)
    return max(times) * 1000


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def appends(folder: Path, rng: random.Random) -> list[Row]:
    """One transaction each, and 64 in one."""
    events = [state(rng, T0_MS + n) for n in range(STATES)]
    store = Store(folder / "one.db", Identity.make())
    each = [seconds(lambda event=event: store.append([event])) for event in events]  # type: ignore[misc]  # a default
    store.close()
    store = Store(folder / "batches.db", Identity.make())
    batches = seconds(lambda: [store.append(events[n : n + 64]) for n in range(0, STATES, 64)])
    store.close()
    unit = "s, a flush each"
    return [
        Row(figure="states_2000_s", value=sum(each), unit=unit, better="lower", rival="SELF.md", rival_value=1.1),
        Row(figure="append_p50_ms", value=statistics.median(each) * 1000, unit="ms", better="lower"),
        Row(figure="append_p99_ms", value=statistics.quantiles(each, n=100)[98] * 1000, unit="ms", better="lower"),
        Row(figure="states_2000_by_64_s", value=batches, unit="s, a flush each 64", better="lower"),
    ]  # fmt: skip


def filled(path: Path, n: int, rng: random.Random) -> tuple[Store, Row]:
    """A memory of n events, a second apart; and how fast that was."""
    days = n / 86_400
    terms = {**Retention().terms, "state": Term(age_ms=round(days / 2 * DAY_MS), rows_max=n)}
    store = Store(path, Identity.make(), retention=Retention(terms=terms))
    spent, made = 0.0, 0
    while made < n:
        batch = [
            other(rng, T0_MS + number * 1000, number) if number % 10 == 0 else state(rng, T0_MS + number * 1000)
            for number in range(made, min(made + 1000, n))
        ]
        spent += seconds(lambda batch=batch: store.append(batch))  # type: ignore[misc]  # a default
        made += len(batch)
    return store, Row(figure="append_batched_rate", value=n / spent, unit="events/s", better="higher")


def recalls(store: Store, n: int, rng: random.Random) -> list[Row]:
    """The slowest of each kind of question."""
    size = f"of {n:,} events"
    figures: dict[str, Callable[[], object]] = {
        "recent": lambda: store.recent(rng.choice(["state", "inference", "note"]), 20),
        "search_one_word": lambda: store.search(rng.choice(WORDS), 20),
        "search_three_words": lambda: store.search(" ".join(rng.choices(WORDS, k=3)), 20),
        "search_everywhere": lambda: store.search("default", 20),
        "search_nowhere": lambda: store.search("unheard", 20),
        "by_subject": lambda: store.by_subject(f"user{rng.randrange(100) * 10}", 20),
        "statistics": store.statistics,
    }
    return [
        Row(figure=f"{name}_worst_ms", value=worst_ms(ask), unit=f"ms, {size}", better="lower")
        for name, ask in figures.items()
    ]


def vectors(store: Store, n: int) -> list[Row]:
    """Likeness, of VECTORS vectors."""
    count = min(VECTORS, n)
    x_ND = np.random.default_rng(0).standard_normal((count, DIMS), np.float32)
    first = n - count + 1
    put = seconds(lambda: [store.put_vector(first + at, x_ND[at].tolist()) for at in range(200)])
    rest = [(first + at, x_ND[at].tobytes()) for at in range(200, count)]
    store._run(lambda db: db.executemany("INSERT INTO vectors VALUES (?, ?)", rest), None)  # one flush is enough here
    asked = x_ND[7].tolist()
    worst, of = worst_ms(lambda: store.nearest(asked, 10)), f"ms, of {count:,} x {DIMS}"
    return [
        Row(figure="put_vector_ms", value=put / 200 * 1000, unit="ms, a flush each", better="lower"),
        Row(figure="nearest_worst_ms", value=worst, unit=of, better="lower"),
    ]


def measure(chosen: Options) -> list[Row]:
    """All figures."""
    n, rng = (EVENTS // 10 if chosen.quick else EVENTS), random.Random(0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows = appends(folder, rng)
        store, rate = filled(folder / "memory.db", n, rng)
        rows += [rate, Row(figure="bytes", value=store.statistics().bytes, unit=f"B, {n:,} events", better="lower")]
        rows += recalls(store, n, rng)
        faults: list[object] = []
        rows.append(
            Row(figure="verify_s", value=seconds(lambda: faults.append(store.verify())), unit="s", better="lower")
        )
        walk = store.verification()
        rows.append(Row(figure="verify_step_worst_ms", value=worst_ms(walk.step), unit="ms", better="lower"))
        rows.append(Row(figure="forget_s", value=seconds(lambda: store.forget("user10")), unit="s", better="lower"))
        now_ms, steps = T0_MS + n * 1000, list[float]()
        while True:
            start = time.perf_counter()
            removed = store.retain(now_ms)
            if not removed:
                break
            steps.append(time.perf_counter() - start)
        rows += [
            Row(figure="retain_s", value=sum(steps), unit="s, 45 % of the events go", better="lower"),
            Row(figure="retain_step_worst_s", value=max(steps), unit="s, 5,000 events", better="lower"),
            Row(figure="entries_retained", value=store.statistics().entries, unit="events", better="lower"),
            Row(figure="bytes_retained", value=store.statistics().bytes, unit="B", better="lower"),
        ]
        faults.append(store.verify())
        rows += vectors(store, n)
        store.close()
        start = time.perf_counter()
        store = Store(folder / "memory.db", store._identity)
        rows.append(Row(figure="open_s", value=time.perf_counter() - start, unit="s", better="lower"))
        store.close()
        if any(faults):
            raise SystemExit(f"the memory does not verify: {faults}")
    return rows


def main() -> None:
    """Measure and report."""
    chosen = options(__doc__)
    report("store", measure(chosen), chosen)


if __name__ == "__main__":
    main()
