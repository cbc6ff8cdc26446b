"""`python -m bench.store`: what the node's memory costs: an append, a recall, forgetting and verifying at a million.

Rules: one thread, the data on the disk of the system's temporary folder (TMPDIR moves it), synchronous=FULL as in a
node. A million events (a hundred thousand with --quick): nine in ten are states, the rest inferences with a text of
some twenty words out of a thousand, and notes. Each kind of question is asked 50 times. Retention is due for half of
the states.
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
RETAIN_STEPS: Final = 20
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


def times_ms(ask: Callable[[], object]) -> tuple[float, float]:
    """Of QUESTIONS calls: the median, and the most CPU time, in which other processes do not count."""
    walls, cpus = list[float](), list[float]()
    for _ in range(QUESTIONS):
        wall, cpu = time.perf_counter(), time.thread_time()
        ask()
        walls.append((time.perf_counter() - wall) * 1000)
        cpus.append((time.thread_time() - cpu) * 1000)
    return statistics.median(walls), max(cpus)


def asked(name: str, ask: Callable[[], object], unit: str) -> list[Row]:
    """The two figures of one kind of question."""
    median, most = times_ms(ask)
    return [
        Row(figure=f"{name}_p50_ms", value=median, unit=unit, better="lower"),
        Row(figure=f"{name}_cpu_worst_ms", value=most, unit=unit, better="lower"),
    ]


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
    return [row for name, ask in figures.items() for row in asked(name, ask, f"ms, {size}")]


def vectors(store: Store, n: int) -> list[Row]:
    """Likeness, of VECTORS vectors."""
    count = min(VECTORS, n)
    x_ND = np.random.default_rng(0).standard_normal((count, DIMS), np.float32)
    first = n - count + 1
    put = seconds(lambda: [store.put_vector(first + at, x_ND[at].tolist()) for at in range(200)])
    rest = [(first + at, x_ND[at].tobytes()) for at in range(200, count)]
    store._run(lambda db: db.executemany("INSERT INTO vectors VALUES (?, ?)", rest), None)  # one flush is enough here
    like = x_ND[7].tolist()
    return [
        Row(figure="put_vector_ms", value=put / 200 * 1000, unit="ms, a flush each", better="lower"),
        *asked("nearest", lambda: store.nearest(like, 10), f"ms, of {count:,} x {DIMS}"),
    ]


def retention(store: Store, now_ms: int) -> list[Row]:
    """RETAIN_STEPS steps of what a node does once an hour."""
    removed, steps = 0, list[float]()
    for _ in range(RETAIN_STEPS):
        start = time.perf_counter()
        removed += store.retain(now_ms)
        steps.append(time.perf_counter() - start)
    return [
        Row(figure="retain_rate", value=removed / sum(steps), unit="events/s", better="higher"),
        Row(figure="retain_step_p50_s", value=statistics.median(steps), unit="s", better="lower"),
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
        rows.append(Row(figure="forget_s", value=seconds(lambda: store.forget("user10")), unit="s", better="lower"))
        rows += retention(store, T0_MS + n * 1000)
        rows += vectors(store, n)
        faults: list[object] = []
        count = store.statistics().entries
        verified_s = seconds(lambda: faults.append(store.verify()))
        rows.append(Row(figure="verify_rate", value=count / verified_s, unit="events/s", better="higher"))
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
