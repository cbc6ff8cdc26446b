"""gossip/finding.py: few are asked, each once; nobody asks many through us; an unknown name costs one search."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from crypto.canonical import encode
from crypto.identity import PeerId
from gossip.errors import RemoteProtocolError
from gossip.finding import (
    ASKED_AT_ONCE,
    FIND_ADVERTS_MAX,
    ONWARD_BURST,
    SEARCH_BURST,
    UNKNOWN_NAMES_MAX,
    UNKNOWN_S,
    Find,
    Search,
    Searches,
    find_of,
    find_to_wire,
)


@given(st.none() | st.text(min_size=1, max_size=200), st.integers(1, FIND_ADVERTS_MAX), st.booleans())
def test_a_question_survives_the_wire(model: str | None, limit: int, onward: bool) -> None:
    find = Find(model=model, limit=limit, onward=onward)
    assert find_of(find_to_wire(find)) == find


@given(st.binary(max_size=300))
@example(b"\x80")  # what is left out has its default; nobody signs a question, so it may be said in two ways
def test_other_bytes_are_refused(raw: bytes) -> None:
    try:
        find = find_of(raw)
    except RemoteProtocolError:
        return
    assert find_of(find_to_wire(find)) == find


@pytest.mark.parametrize(
    "fields",
    [
        {"limit": 0},
        {"limit": FIND_ADVERTS_MAX + 1},
        {"limit": 1.5},
        {"limit": True},
        {"model": ""},
        {"model": "x" * 201},
        {"model": 3},
        {"onward": 1},
        {"hops": 3},
    ],
)
def test_a_question_out_of_bounds_is_refused(fields: dict[str, object]) -> None:
    whole: dict[str, object] = {"model": None, "limit": 1, "onward": False}
    with pytest.raises(RemoteProtocolError):
        find_of(encode(whole | fields))  # type: ignore[arg-type]


def test_a_name_that_nobody_knew_is_believed_unknown_for_a_while() -> None:
    searches = Searches()
    assert searches.may_search("a", 0.0)
    searches.not_found("a", 1.0)
    assert not searches.may_search("a", 1.0 + UNKNOWN_S - 0.01)
    assert searches.may_search("b", 1.0)
    assert searches.may_search("a", 1.0 + UNKNOWN_S)


def test_searches_are_few_whatever_clients_ask_for() -> None:
    searches = Searches()
    assert sum(searches.may_search(f"m{n}", 0.0) for n in range(100)) == SEARCH_BURST
    assert searches.may_search("m", 1.0)
    assert not searches.may_search("n", 1.0)


def test_unknown_names_are_bounded() -> None:
    searches = Searches()
    for number in range(UNKNOWN_NAMES_MAX + 9):
        searches.not_found(f"m{number}", 0.0)
    assert len(searches._unknown) == UNKNOWN_NAMES_MAX
    assert not searches.may_search(f"m{UNKNOWN_NAMES_MAX + 8}", 1.0)


def test_others_can_have_us_ask_only_so_often() -> None:
    searches = Searches()
    assert sum(searches.may_ask_onward(0.0) for _ in range(100)) == ONWARD_BURST


@given(st.integers(0, 40), st.integers(0, 20), st.lists(st.booleans(), max_size=200), st.integers(0, 50))
def test_a_search_asks_each_once_a_few_at_a_time_and_ends(
    peers: int, limit: int, moves: list[bool], finder: int
) -> None:
    names = [PeerId(f"p{n}") for n in range(peers)]
    search, asked, waiting = Search(names, limit), list[PeerId](), list[PeerId]()
    for ask in [*moves, *[True, False] * (peers + 1)]:
        if ask and (peer := search.next()) is not None:
            asked.append(peer)
            waiting.append(peer)
        elif waiting:
            search.answered(is_found=waiting.pop(0) == f"p{finder}")
        assert len(waiting) <= ASKED_AT_ONCE
    assert asked == names[: len(asked)]
    assert len(asked) <= min(limit, peers)
    assert search.is_over
    assert search.is_found == (PeerId(f"p{finder}") in asked)
    if search.is_found:
        assert search.next() is None


def test_once_somebody_knows_nobody_else_is_asked() -> None:
    search = Search([PeerId("a"), PeerId("b")], 2)
    assert search.next() == "a"
    search.answered(is_found=True)
    assert search.next() is None
    assert search.is_over
