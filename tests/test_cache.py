"""node/cache.py: bounded, the longest unused goes first, and nobody finds what another asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.step import Priority
from node.cache import CACHE_SHARE, ENTRY_BYTES, ENTRY_SHARE, Cache, Key, Shelf, key_of
from node.requester import OWN, Requester, account_of, of_client, of_peer
from node.work import Message, Sampling
from tests.fake_runtime import TALE

STRANGER, PEER = of_peer("12D3KooWa", is_good=False), of_peer("12D3KooWb", is_good=True)
MB = 1_000_000


def key(text: str, requester: Requester = OWN) -> Key:
    return key_of(TALE, requester, "embedding", text)


@given(
    st.lists(st.tuples(st.sampled_from("pf"), st.integers(0, 9), st.integers(0, 900)), max_size=60),
    st.integers(1, 6),
)
def test_a_shelf_is_within_its_bounds_and_keeps_the_latest_used(acts: list[tuple[str, int, int]], most: int) -> None:
    shelf = Shelf[int](8_000, most)
    used: dict[int, int] = {}  # number -> bytes, the longest unused first: what a shelf is
    for act, number, size in acts:
        if act == "f":
            found = shelf.find(key(str(number)))
            assert found == (number if number in used else None)
            if number in used:
                used[number] = used.pop(number)
            continue
        used.pop(number, None)
        evicted = shelf.put(key(str(number)), number, size)
        if size + ENTRY_BYTES > 8_000 * ENTRY_SHARE:
            assert evicted is None
            continue
        used[number] = size + ENTRY_BYTES
        count = 0
        while sum(used.values()) > 8_000 or len(used) > most:
            del used[next(iter(used))]
            count += 1
        assert evicted == count
        assert (shelf.bytes, len(shelf)) == (sum(used.values()), len(used))


def test_all_that_an_answer_depends_on_is_in_the_key() -> None:
    asked = ("hello", (Message(role="user", content="hi"),), Sampling())
    keys = {
        key_of(TALE, OWN, "completion", *asked),
        key_of(TALE, OWN, "embedding", *asked),
        key_of(TALE, STRANGER, "completion", *asked),
        key_of(TALE, PEER, "completion", *asked),
        *(
            key_of(replace(TALE, **{name: value}), OWN, "completion", *asked)  # type: ignore[arg-type]
            for name, value in (("revision", "r2"), ("dtype", "bfloat16"), ("name", "other"))
        ),
        *(key_of(TALE, OWN, "completion", *asked[:2], replace_sampling(name)) for name in Sampling.__struct_fields__),
        key_of(TALE, OWN, "completion", "hell", "o", *asked[1:]),
    }
    assert len(keys) == 7 + len(Sampling.__struct_fields__) + 1


def replace_sampling(name: str) -> Sampling:
    values: dict[str, object] = {"stop": ("x",), "logprobs": 1, "top_p": 0.5, "max_tokens": 7, "top_k": 7, "seed": 7}
    return Sampling(**{name: values.get(name, 0.25)})  # type: ignore[arg-type]  # one field, changed


def test_nobody_finds_what_another_asked() -> None:
    cache = Cache[str](MB)
    cache.put("embedding", OWN, key("secret"), "vector", 10)
    for other in (STRANGER, PEER, of_client("203.0.113.9"), Requester(OWN.name, Priority.PEER)):
        assert cache.find("embedding", other, key("secret", other)) is None
    assert cache.find("embedding", OWN, key("secret")) == "vector"


def test_a_flood_of_strangers_puts_out_nothing_of_others() -> None:
    cache = Cache[int](MB)
    cache.put("embedding", OWN, key("mine"), 1, 1_000)
    cache.put("embedding", PEER, key("theirs", PEER), 2, 1_000)
    for number in range(5_000):
        cache.put("embedding", STRANGER, key(str(number), STRANGER), number, 1_000)
    assert cache.find("embedding", OWN, key("mine")) == 1
    assert cache.find("embedding", PEER, key("theirs", PEER)) == 2
    figures = cache.statistics()
    assert figures.bytes <= MB * CACHE_SHARE[Priority.STRANGER] + 2 * (1_000 + ENTRY_BYTES)
    assert figures.evicted == 5_000 + 2 - figures.entries
    assert sum(CACHE_SHARE.values()) <= 1


def test_what_was_made_by_weights_that_are_gone_is_forgotten() -> None:
    cache, fresh = Cache[int](MB), replace(TALE, revision="r2")
    cache.put("embedding", OWN, key("a"), 1, 10)
    cache.put("embedding", OWN, key_of(fresh, OWN, "embedding", "a"), 2, 10)
    cache.forget((fresh,))
    assert cache.find("embedding", OWN, key("a")) is None
    assert cache.find("embedding", OWN, key_of(fresh, OWN, "embedding", "a")) == 2
    assert (cache.statistics().forgotten, cache.statistics().entries) == (1, 1)


def test_what_is_found_is_counted_by_kind() -> None:
    cache = Cache[int](MB)
    for _ in range(3):
        cache.find("embedding", OWN, key("a"))
        cache.put("embedding", OWN, key("a"), 1, 10)
    cache.find("completion", OWN, key("b"))
    figures = cache.statistics()
    assert (figures.queries, figures.hits) == ({"embedding": 3, "completion": 1}, {"embedding": 2, "completion": 0})
    assert figures.stored == {"embedding": 3}


def test_a_cache_of_no_bytes_keeps_nothing() -> None:
    cache = Cache[int](0)
    cache.put("embedding", OWN, key("a"), 1, 0)
    assert cache.find("embedding", OWN, key("a")) is None
    assert cache.statistics().stored == {"embedding": 0}


@pytest.mark.parametrize(
    ("host", "account"),
    [
        ("127.0.0.1", "own"),
        ("::1", "own"),
        ("::ffff:127.0.0.1", "own"),
        (None, "own"),
        ("203.0.113.9", "203.0.113.9"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("testclient", "testclient"),
    ],
)
def test_clients_on_this_machine_are_one_account_and_others_one_by_address(host: str | None, account: str) -> None:
    assert account_of(host) == account
