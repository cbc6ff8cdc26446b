"""The tallies of own clients' requests: each counts once, under a model that is known, for as long as is told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.tallies import OTHER, ROWS_MAX, WINDOW_S, Passage, Rates, RowStatistics, Tallies, model_rows
from node.work import TOKENS_MAX, Embedded, Finished, Piece, Started

END = Finished(reason="stop", prompt_tokens=5, completion_tokens=3)


def started(model: str = "tale", revision: str = "r1", *, cached: bool = False) -> Started:
    return Started(served_by="p", model=model, revision=revision, prompt_tokens=5, cached=cached)


def piece(tokens: int) -> Piece:
    return Piece(tokens=(7,) * tokens, text="")


def finish(tallies: Tallies, passage: Passage, now: float) -> None:
    tallies.take(passage, END, now)
    tallies.end(passage, "", is_whole=True, now=now)


def only(tallies: Tallies) -> RowStatistics:
    (row,) = tallies.statistics()
    return row


def test_an_answer_is_timed_from_its_arrival_and_token_by_token() -> None:
    tallies = Tallies(0.0)
    passage = tallies.enter("tale", 10.0)
    tallies.take(passage, started(), 10.1)
    tallies.take(passage, piece(1), 10.5)
    tallies.take(passage, piece(0), 10.6)  # no token came with it
    tallies.take(passage, piece(2), 10.9)
    finish(tallies, passage, 11.0)
    row = only(tallies)
    assert (row.model, row.revision, row.finished) == ("tale", "r1", {"stop": 1})
    assert (row.prompt_tokens, row.generation_tokens) == (5, 3)
    assert (row.first_token_s.count, row.first_token_s.sum) == (1, pytest.approx(0.5))
    assert (row.token_s.count, row.token_s.sum) == (2, pytest.approx(0.4))
    assert (row.request_s.count, row.request_s.sum) == (1, pytest.approx(1.0))


def test_the_speed_of_an_answer_that_was_kept_is_not_the_models() -> None:
    tallies = Tallies(0.0)
    passage = tallies.enter("tale", 0.0)
    tallies.take(passage, started(cached=True), 0.0)
    for _ in range(5):
        tallies.take(passage, piece(1), 0.001)
    finish(tallies, passage, 0.001)
    assert only(tallies).token_s.count == 0
    assert only(tallies).first_token_s.count == 1


def test_errors_and_leavers_count_at_the_model_that_answered_or_is_known_by_the_name() -> None:
    tallies = Tallies(0.0)
    tallies.know("tale", "r1")
    tallies.end(tallies.enter("tale", 1.0), "no_room", is_whole=False, now=1.0)
    tallies.end(tallies.enter("tale", 1.0), "", is_whole=False, now=2.0)
    tallies.end(tallies.enter("my secret", 1.0), "unknown_model", is_whole=False, now=1.0)
    tale, none = tallies.statistics()
    assert (tale.errors, tale.cancelled, tale.request_s.count) == ({"no_room": 1}, 1, 0)
    assert (none.model, none.errors) == ("", {"unknown_model": 1})


def test_names_that_strangers_send_make_no_more_rows_than_there_may_be() -> None:
    tallies = Tallies(0.0)
    for number in range(ROWS_MAX * 3):
        passage = tallies.enter(None, 0.0)
        tallies.take(passage, started(f"model-{number}"), 0.0)
        finish(tallies, passage, 1.0)
    tallies.know("own", "r1")
    rows = tallies.statistics()
    assert len(rows) == ROWS_MAX + 2
    assert {(row.model, row.revision): sum(row.finished.values()) for row in rows}[OTHER] == ROWS_MAX * 2
    assert sum(sum(row.finished.values()) for row in rows) == ROWS_MAX * 3


def test_the_rounds_of_a_run_are_one_row() -> None:
    tallies = Tallies(0.0)
    for number in range(50):
        passage = tallies.enter(None, 0.0)
        tallies.take(passage, started("tale", f"run-r{number}-{number:012x}-int8"), 0.0)
        finish(tallies, passage, 1.0)
    assert only(tallies).revision == "run-int8"


def test_a_peer_cannot_claim_more_tokens_than_a_prompt_can_have() -> None:
    tallies = Tallies(0.0)
    passage = tallies.enter(None, 0.0)
    tallies.take(passage, Started(served_by="p", model="m", revision="r", prompt_tokens=1 << 53), 0.0)
    tallies.end(passage, "", is_whole=False, now=0.0)
    assert only(tallies).prompt_tokens == TOKENS_MAX


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["enter", "start", "piece", "end", "fail", "leave"]), st.integers(0, 5), st.floats(0, 99)
    ),
    max_size=60,
)


@given(EVENTS)
def test_each_request_ends_once_in_the_tallies_and_each_token_is_timed(events: list[tuple[str, int, float]]) -> None:
    tallies, here, now, entered, tokens = Tallies(0.0), list[Passage](), 0.0, 0, 0
    for what, number, wait_s in events:
        now += wait_s
        if what == "enter":
            here.append(tallies.enter(None if number else "tale", now))
            entered += 1
            continue
        if not here:
            continue
        passage = here[number % len(here)]
        match what:
            case "start":
                tallies.take(passage, started(f"model-{number}"), now)
            case "piece":
                tallies.take(passage, piece(number), now)
                tokens += number
            case "end":
                finish(tallies, passage, now)
            case _:
                tallies.end(passage, "deadline" if what == "fail" else "", is_whole=False, now=now)
        if what in ("end", "fail", "leave"):
            here.remove(passage)
    rows = tallies.statistics()
    ended = [sum(row.finished.values()) + row.cancelled + sum(row.errors.values()) for row in rows]
    assert sum(ended) == entered - len(here)
    assert sum(row.generation_tokens for row in rows) == tokens
    assert sum(row.first_token_s.count + row.token_s.count for row in rows) <= max(tokens, 0)
    assert all(row.request_s.count == sum(row.finished.values()) for row in rows)
    assert all(value >= 0 for value in tallies.throughput(now).values())


def test_the_table_of_models() -> None:
    tallies = Tallies(0.0)
    passage = tallies.enter("tale", 0.0)
    tallies.take(passage, started(), 0.0)
    tallies.take(passage, piece(3), 0.25)
    finish(tallies, passage, 0.5)
    vectors = tallies.enter(None, 0.0)
    told = Embedded(served_by="p", model="tale", revision="r1", dimensions=1, vectors=(), truncated=(), prompt_tokens=4)
    tallies.embedded(vectors, told)
    tallies.end(vectors, "", is_whole=True, now=1.5)
    (row,) = model_rows(tallies.statistics())
    assert row["inference_count"] == 2
    assert row["average_latency_ms"] == 1000.0
    assert (row["error_count"], row["cancelled_count"], row["embeddings"]) == (0, 0, 1)
    assert (row["prompt_tokens"], row["generation_tokens"]) == (9, 3)
    assert 0.1 < row["ttft_s"]["p50"] <= 0.25
    assert row["token_s"] == {"p50": None, "p95": None, "p99": None, "count": 0}
    assert tallies.latency()["ttft_s"] == row["ttft_s"]


def test_rates_are_of_the_last_minute_or_of_the_time_since_start() -> None:
    rates = Rates(100.0)
    rates.note(100.5, requests=1, prompt=30, generation=10)
    assert rates.read(110.0) == {
        "window_s": 10.0,
        "requests_per_s": 0.1,
        "prompt_tok_s": 3.0,
        "generation_tok_s": 1.0,
        "errors_per_s": 0.0,
    }
    rates.note(150.0, errors=6)
    later = rates.read(175.0)
    assert (later["window_s"], later["requests_per_s"], later["errors_per_s"]) == (60.0, 0.0, 0.1)


def test_rates_keep_one_place_a_second() -> None:
    rates = Rates(0.0)
    for number in range(100_000):
        rates.note(number / 100, requests=1)
    assert len(rates._places) <= WINDOW_S
    assert rates.read(1000.0)["requests_per_s"] == pytest.approx(100.0, rel=0.03)
