"""node/room.py: how many requests, of how many bytes; drawn histories keep the bounds, and use them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.step import QUEUE_SHARE, Priority
from node.errors import NoRoom, TooMany
from node.requester import OWN, Requester, of_client, of_peer
from node.room import REQUESTER_SHARE, Room, held_bytes
from node.work import EmbedWork, GenerateWork, Message

WHO = [
    OWN,
    of_client("203.0.113.9"),
    of_client("203.0.113.10"),
    *(of_peer(name, is_good=True) for name in "ab"),
    *(of_peer(name, is_good=False) for name in "cdef"),
]
SLOTS, QUEUE, BYTES = 1, 8, 1_000


def most(share: float) -> tuple[int, int]:
    return SLOTS + math.ceil(QUEUE * share), int(BYTES * share)


def fits(inside: list[tuple[Requester, int]], who: Requester, size: int) -> bool:
    then = [*inside, (who, size)]
    own = [each for each in then if each[0] == who]
    groups = [([each for each in then if each[0].priority >= p], QUEUE_SHARE[p]) for p in Priority if p <= who.priority]
    if who != OWN:
        groups.append((own, REQUESTER_SHARE))
    return all(
        len(group) <= most(share)[0] and sum(size for _, size in group) <= most(share)[1] for group, share in groups
    )


@given(st.lists(st.tuples(st.sampled_from(WHO), st.integers(0, 400), st.booleans()), max_size=60))
def test_bounds_hold_and_what_is_within_them_enters(history: list[tuple[Requester, int, bool]]) -> None:
    room, inside = Room("requests", BYTES), list[tuple[Requester, int]]()
    for who, size, leaves in history:
        if leaves and inside:
            room.leave(*inside.pop(0))
            continue
        may = fits(inside, who, size)
        if may:
            room.enter(who, size, slots=SLOTS, queue_max=QUEUE)
            inside.append((who, size))
        else:
            with pytest.raises(NoRoom) as caught:
                room.enter(who, size, slots=SLOTS, queue_max=QUEUE)
            assert caught.value.retry_after_s
        assert (len(room), room.bytes) == (len(inside), sum(size for _, size in inside))


def test_who_takes_all_that_one_may_is_told_so_and_others_are_served() -> None:
    room, greedy, other = Room("requests"), of_client("203.0.113.9"), of_client("203.0.113.10")
    for _ in range(SLOTS + QUEUE // 2):
        room.enter(greedy, 10, slots=SLOTS, queue_max=QUEUE)
    with pytest.raises(TooMany, match="5 requests of yours, of 50 bytes, are here and one requester may have 5"):
        room.enter(greedy, 10, slots=SLOTS, queue_max=QUEUE)
    room.enter(other, 10, slots=SLOTS, queue_max=QUEUE)


def test_this_machines_clients_may_take_all() -> None:
    room = Room("requests")
    for _ in range(SLOTS + QUEUE):
        room.enter(OWN, 10, slots=SLOTS, queue_max=QUEUE)
    with pytest.raises(NoRoom) as caught:
        room.enter(OWN, 10, slots=SLOTS, queue_max=QUEUE)
    assert type(caught.value) is NoRoom


def test_what_texts_take_is_counted_in_bytes() -> None:
    assert 1_000 <= held_bytes(GenerateWork(request_id="q", text="a" * 1_000)) <= 1_200
    assert 4_000 <= held_bytes(GenerateWork(request_id="q", text="\U0001f600" * 1_000)) <= 4_200
    assert held_bytes(GenerateWork(request_id="q", tokens=(1,) * 1_000, delivered=(2,) * 500)) >= 1_500 * 40
    assert held_bytes(GenerateWork(request_id="q", text="a", delivered_text="a" * 1_000)) >= 1_000
    chat = (Message(role="user", content="a" * 1_000),) * 3
    assert 3_000 <= held_bytes(GenerateWork(request_id="q", messages=chat)) <= 3_500
    assert 1_000 <= held_bytes(EmbedWork(request_id="q", texts=("a" * 500,) * 2)) <= 1_200
