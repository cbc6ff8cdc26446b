"""gossip/transfer.py: manifests, and histories of donors that lie, stall, leave and come back."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from crypto.canonical import encode
from crypto.digest import DIGEST_BYTES, digest
from crypto.identity import PeerId
from gossip.errors import RemoteProtocolError
from gossip.transfer import (
    CHUNK_BYTES_MIN,
    CHUNKS_MAX,
    DROPPED_MAX,
    LOOK_MAX,
    Ask,
    Drop,
    Effect,
    Finished,
    Manifest,
    Store,
    Transfer,
    TransferConfig,
    decode_manifest,
    manifest_of,
    verified,
)
from p2p.transport import FRAME_BYTES_MAX

CHUNK = CHUNK_BYTES_MIN
ALICE, BOB, EVE = PeerId("alice"), PeerId("bob"), PeerId("eve")
CONFIG = TransferConfig(asks_per_donor_max=2, asks_max=5, answer_s=10.0, lates_max=3)


def blob(count: int, last: int = CHUNK, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes((count - 1) * CHUNK + last)


def chunk(content: bytes, index: int) -> bytes:
    return content[index * CHUNK : (index + 1) * CHUNK]


def asks(effects: list[Effect]) -> list[Ask]:
    return [each for each in effects if isinstance(each, Ask)]


# ---- manifests ----


@pytest.mark.parametrize(("size", "count"), [(0, 0), (1, 1), (CHUNK, 1), (CHUNK + 1, 2), (5 * CHUNK, 5)])
def test_a_manifest_names_every_byte_once(size: int, count: int) -> None:
    content = random.Random(size).randbytes(size)
    manifest = manifest_of(content, CHUNK)
    raw = manifest.encode()
    assert decode_manifest(raw, digest(raw)) == manifest
    assert manifest.count == count
    spans = [manifest.span(index) for index in range(count)]
    assert b"".join(content[start : start + length] for start, length in spans) == content
    assert [digest(content[start : start + length]) for start, length in spans] == [
        manifest.digest_of(index) for index in range(count)
    ]


@given(st.integers(0, 6 * CHUNK), st.integers(0, 6 * CHUNK))
@example(1, 0)
@example(CHUNK, 0)
@settings(deadline=None)
def test_a_range_is_covered_by_the_chunks_that_hold_it(start: int, length: int) -> None:
    content = blob(5, 7)
    manifest = manifest_of(content, CHUNK)
    covering = manifest.covering(start, length)
    held = {at for index in covering for at in range(manifest.span(index)[0], sum(manifest.span(index)))}
    wanted = range(start, min(start + length, len(content)))
    assert held.issuperset(wanted)
    assert all(set(range(manifest.span(index)[0], sum(manifest.span(index)))) & set(wanted) for index in covering)


def test_a_range_before_the_blob_is_nowhere() -> None:
    assert list(manifest_of(blob(5, 7), CHUNK).covering(-5, 20)) == []


def test_bytes_that_are_not_the_manifest_are_refused() -> None:
    manifest = manifest_of(blob(3), CHUNK)
    raw = manifest.encode()
    with pytest.raises(RemoteProtocolError, match="not the manifest"):
        decode_manifest(raw, digest(raw + b"x"))
    fields = {"blob_bytes": 3 * CHUNK, "chunk_bytes": CHUNK, "chunks": bytes(3 * DIGEST_BYTES)}
    for change in (
        {"chunks": bytes(2 * DIGEST_BYTES)},
        {"chunks": bytes(3 * DIGEST_BYTES + 1)},
        {"blob_bytes": 3 * CHUNK + 1},
        {"blob_bytes": -1},
        {"blob_bytes": -1, "chunks": b""},
        {"blob_bytes": 3 * FRAME_BYTES_MAX, "chunk_bytes": FRAME_BYTES_MAX},
        {"blob_bytes": (CHUNKS_MAX + 1) * CHUNK, "chunks": bytes((CHUNKS_MAX + 1) * DIGEST_BYTES)},
        {"chunk_bytes": 0},
        {"chunk_bytes": FRAME_BYTES_MAX},
        {"more": 1},
    ):
        bad = encode({**fields, **change})
        with pytest.raises(RemoteProtocolError):
            decode_manifest(bad, digest(bad))
    assert decode_manifest(encode(fields), digest(encode(fields))).count == 3
    for garbage in (b"", b"\xc1", b"\x81\xa1a\x01"):
        with pytest.raises(RemoteProtocolError):
            decode_manifest(garbage, digest(garbage))


@pytest.mark.slow
def test_the_largest_manifest_fits_a_frame() -> None:
    largest = Manifest(blob_bytes=CHUNKS_MAX << 19, chunk_bytes=1 << 19, chunks=bytes(CHUNKS_MAX * DIGEST_BYTES))
    raw = largest.encode()
    assert len(raw) < FRAME_BYTES_MAX
    assert decode_manifest(raw, digest(raw)) == largest


def test_only_what_compares_equal_counts_as_stored() -> None:
    content = blob(3)
    manifest = manifest_of(content, CHUNK)
    found = [
        (0, chunk(content, 0)),
        (1, chunk(content, 0)),
        (2, chunk(content, 2)[:-1]),
        (3, b""),
        (-1, b""),
        (-2, chunk(content, 1)),
    ]
    assert verified(manifest, found) == {0}


# ---- fetching ----


def test_two_donors_share_the_work_and_each_has_few_asks() -> None:
    content = blob(12)
    transfer = Transfer(manifest_of(content, CHUNK), CONFIG)
    first = asks(transfer.joined(ALICE, 0.0))
    assert [each.index for each in first] == [0, 1]
    second = asks(transfer.joined(BOB, 0.0))
    assert [(each.donor, each.index) for each in second] == [(BOB, 2), (BOB, 3)]
    effects = transfer.received(ALICE, 0, chunk(content, 0), 1.0)
    assert effects[0] == Store(0, chunk(content, 0))
    assert asks(effects) == [Ask(ALICE, 4, 4 * CHUNK, CHUNK)]


@pytest.mark.parametrize("wrong", [b"", b"x", bytes(CHUNK), bytes(CHUNK + 1)])
def test_a_donor_that_sends_other_bytes_is_named_and_its_chunks_go_to_another(wrong: bytes) -> None:
    content = blob(4)
    transfer = Transfer(manifest_of(content, CHUNK), CONFIG)
    transfer.joined(EVE, 0.0)
    transfer.joined(BOB, 0.0)
    effects = transfer.received(EVE, 1, wrong, 1.0)
    assert isinstance(effects[0], Drop)
    assert (effects[0].donor, effects[0].lied) == (EVE, True)
    assert ("other bytes" in effects[0].reason) == (len(wrong) == CHUNK)  # the length is compared before hashing
    assert transfer.statistics().dropped.keys() == {EVE}
    assert transfer.joined(EVE, 2.0) == []
    assert transfer.received(EVE, 0, chunk(content, 0), 2.0) == []
    assert all(each.donor == BOB for each in asks(effects))


def test_what_was_not_asked_is_not_taken() -> None:
    content = blob(9)
    for act in (
        lambda each: each.received(EVE, 7, chunk(content, 7), 1.0),
        lambda each: each.received(EVE, 10**9, b"", 1.0),
    ):
        transfer = Transfer(manifest_of(content, CHUNK), CONFIG)
        transfer.joined(EVE, 0.0)
        (drop, *rest) = act(transfer)
        assert isinstance(drop, Drop)
        assert rest == []


def test_a_cut_transfer_goes_on_where_it_was() -> None:
    content = blob(5)
    manifest = manifest_of(content, CHUNK)
    transfer = Transfer(manifest, CONFIG, stored=[0, 1, 3])
    assert [each.index for each in asks(transfer.joined(ALICE, 0.0))] == [2, 4]
    transfer.received(ALICE, 2, chunk(content, 2), 1.0)
    assert transfer.received(ALICE, 4, chunk(content, 4), 1.0) == [Store(4, chunk(content, 4)), Finished()]
    assert Transfer(manifest, CONFIG, stored=range(5)).finished
    some = Transfer(manifest, CONFIG, wanted=manifest.covering(CHUNK, 2 * CHUNK), stored=[2])
    assert [each.index for each in asks(some.joined(ALICE, 0.0))] == [1]


def test_a_late_chunk_is_asked_of_another_and_is_still_welcome() -> None:
    content = blob(2)
    transfer = Transfer(manifest_of(content, CHUNK), CONFIG)
    transfer.joined(ALICE, 0.0)
    assert transfer.joined(BOB, 0.0) == []
    assert transfer.deadline() == 10.0
    again = asks(transfer.tick(10.0))
    assert [(each.donor, each.index) for each in again] == [(BOB, 0), (BOB, 1)]
    assert transfer.received(ALICE, 0, chunk(content, 0), 11.0)[0] == Store(0, chunk(content, 0))
    assert transfer.received(BOB, 0, chunk(content, 0), 12.0) == []
    assert transfer.received(BOB, 1, chunk(content, 1), 12.0) == [Store(1, chunk(content, 1)), Finished()]
    assert transfer.received(ALICE, 1, chunk(content, 1), 13.0) == []


def test_asks_are_few_in_all_late_ones_included() -> None:
    transfer = Transfer(manifest_of(blob(12), CHUNK), CONFIG)  # 2 for each donor, 5 in all
    assert [len(asks(transfer.joined(donor, 0.0))) for donor in (ALICE, BOB, EVE)] == [2, 2, 1]
    assert transfer.tick(10.0) == []
    assert transfer.joined(PeerId("carol"), 10.0) == []


def test_one_decision_looks_at_a_bounded_number_of_chunks() -> None:
    transfer = Transfer(manifest_of(blob(LOOK_MAX + 1, 9), CHUNK), CONFIG)
    assert transfer.joined(ALICE, 0.0, holds=[LOOK_MAX]) == []
    assert [each.index for each in asks(transfer.tick(0.0))] == [LOOK_MAX]


def test_a_late_chunk_is_missing_once_and_done_once() -> None:
    content = blob(2)
    transfer = Transfer(manifest_of(content, CHUNK), CONFIG)
    transfer.joined(ALICE, 0.0)
    assert transfer.tick(10.0) == []
    assert transfer.starved() == frozenset()  # she may still give them
    assert transfer.received(ALICE, 0, chunk(content, 0), 11.0) == [Store(0, chunk(content, 0))]
    assert transfer.statistics().missing == 1
    assert [each.index for each in asks(transfer.joined(BOB, 12.0))] == [1]
    assert transfer.left(ALICE, 13.0) == []  # what she was late with is BOB's
    assert (transfer.statistics().missing, transfer.statistics().asked) == (0, 1)


def test_what_a_liar_was_asked_for_is_asked_of_another_at_once() -> None:
    content = blob(2)
    transfer = Transfer(manifest_of(content, CHUNK), CONFIG)
    transfer.joined(EVE, 0.0)
    assert transfer.joined(BOB, 0.0) == []
    drop, *again = transfer.received(EVE, 0, bytes(CHUNK), 1.0)
    assert isinstance(drop, Drop)
    assert {(each.donor, each.index) for each in asks(again)} == {(BOB, 0), (BOB, 1)}


def test_a_donor_that_answers_late_each_time_is_kept() -> None:
    content = blob(4)
    transfer = Transfer(manifest_of(content, CHUNK), TransferConfig(asks_per_donor_max=1, answer_s=10.0, lates_max=3))
    assert [each.index for each in asks(transfer.joined(ALICE, 0.0))] == [0]
    for index in range(3):
        begin = 25.0 * index
        assert transfer.tick(begin + 10.0) == []
        assert transfer.tick(begin + 20.0) == []
        effects = transfer.received(ALICE, index, chunk(content, index), begin + 25.0)
        assert effects == [Store(index, chunk(content, index)), Ask(ALICE, index + 1, (index + 1) * CHUNK, CHUNK)]
    assert transfer.deadline() == 85.0


def test_a_donor_that_never_answers_is_dropped_without_being_called_a_liar() -> None:
    transfer = Transfer(manifest_of(blob(1), CHUNK), CONFIG)
    transfer.joined(ALICE, 0.0)
    effects: list[Effect] = []
    times = []
    while (now := transfer.deadline()) < 1000:
        effects += transfer.tick(now)
        times.append(now)
    assert times == [10.0, 20.0, 30.0]  # lates_max is 3
    assert [(each.donor, each.lied) for each in effects if isinstance(each, Drop)] == [(ALICE, False)]
    assert asks(effects) == []  # not of her again
    assert transfer.starved() == {0}


def test_a_donor_may_say_anew_what_it_holds_though_no_more_donors_are_let_in() -> None:
    content = blob(3)
    transfer = Transfer(manifest_of(content, CHUNK), TransferConfig(donors_max=1))
    assert transfer.joined(ALICE, 0.0, holds=[0]) == [Ask(ALICE, 0, 0, CHUNK)]
    assert transfer.starved() == {1, 2}
    assert [each.index for each in asks(transfer.joined(ALICE, 0.0, holds=[0, 2]))] == [2]
    assert transfer.starved() == {1}


def test_a_chunk_that_nobody_has_holds_up_no_other() -> None:
    content = blob(3000, 9)
    transfer = Transfer(manifest_of(content, CHUNK), CONFIG)
    assert transfer.joined(EVE, 0.0, holds=()) == []
    for _ in range(3):
        transfer.tick(0.0)
    (only,) = asks(transfer.joined(ALICE, 0.0, holds=[2999])) or asks(transfer.tick(0.0)) or asks(transfer.tick(0.0))
    assert (only.index, only.length) == (2999, 9)
    assert len(transfer.starved()) == 2999


def test_donors_are_bounded() -> None:
    transfer = Transfer(manifest_of(blob(3), CHUNK), TransferConfig(donors_max=2, asks_per_donor_max=1))
    assert transfer.joined(ALICE, 0.0)
    assert transfer.joined(BOB, 0.0)
    assert transfer.joined(EVE, 0.0) == []
    assert asks(transfer.left(BOB, 1.0)) == []
    assert transfer.joined(EVE, 1.0)
    transfer.left(EVE, 1.0)
    for number in range(DROPPED_MAX + 5):
        if transfer.joined(PeerId(f"liar {number}"), 2.0):
            transfer.received(PeerId(f"liar {number}"), -1, b"", 2.0)
    assert len(transfer.statistics().dropped) == DROPPED_MAX


def test_bad_bounds_are_refused() -> None:
    for name in ("donors_max", "asks_per_donor_max", "asks_max", "lates_max"):
        with pytest.raises(ValueError, match=name):
            TransferConfig(**{name: 0})  # type: ignore[arg-type]  # one field at a time
    with pytest.raises(ValueError, match="answer_s"):
        TransferConfig(answer_s=0.0)


Conduct = st.sampled_from(["honest", "liar", "silent", "partial", "empty"])
Step = st.tuples(st.sampled_from(["answer", "wait", "leave", "join", "tick"]), st.integers(0, 1000))


class History:
    """One transfer, its donors, and what must hold after every step."""

    def __init__(self, chunks: int, conducts: list[str]) -> None:
        self.content = blob(chunks, 17, seed=chunks)
        self.manifest = manifest_of(self.content, CHUNK)
        self.transfer = Transfer(self.manifest, CONFIG)
        self.conduct = {PeerId(f"{number} {how}"): how for number, how in enumerate(conducts)}
        self.open: list[Ask] = []
        self.stored: dict[int, bytes] = {}
        self.dropped: dict[PeerId, bool] = {}
        self.finished = 0
        self.now = 0.0

    def join(self, donor: PeerId) -> None:
        holds = {"partial": range(0, self.manifest.count, 2), "empty": ()}.get(self.conduct[donor])
        self.take(self.transfer.joined(donor, self.now, holds))

    def take(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Ask():
                    assert effect.donor not in self.dropped
                    assert effect.index not in self.stored, "asked for what is stored"
                    assert (effect.start, effect.length) == self.manifest.span(effect.index)
                    self.open.append(effect)
                case Store():
                    assert effect.index not in self.stored
                    self.stored[effect.index] = effect.content
                case Drop():
                    assert effect.lied == (self.conduct[effect.donor] == "liar") or not effect.lied
                    assert not (effect.lied and self.conduct[effect.donor] != "liar")
                    self.dropped[effect.donor] = effect.lied
                    self.open = [each for each in self.open if each.donor != effect.donor]
                case Finished():
                    self.finished += 1
        busy = Counter(each.donor for each in self.open)
        assert max(busy.values(), default=0) <= CONFIG.asks_per_donor_max
        assert len(self.open) <= CONFIG.asks_max
        counts = self.transfer.statistics()
        assert counts.done == len(self.stored)
        assert counts.done + counts.asked + counts.missing == self.manifest.count
        assert self.transfer.finished == (counts.done == self.manifest.count) == bool(self.finished)
        assert self.finished <= 1
        assert (counts.asked == 0) or self.transfer.deadline() < float("inf")

    def answer(self, which: int) -> None:
        able = [each for each in self.open if self.conduct[each.donor] != "silent"]
        if able:
            ask = able[which % len(able)]
            self.open.remove(ask)
            right = self.content[ask.start : ask.start + ask.length]
            lie = bytes([right[0] ^ 1]) + right[1:]
            liar = self.conduct[ask.donor] == "liar"
            self.take(self.transfer.received(ask.donor, ask.index, lie if liar else right, self.now))

    def step(self, what: str, number: int) -> None:
        donor = list(self.conduct)[number % len(self.conduct)]
        match what:
            case "answer":
                self.answer(number)
            case "wait":
                self.now += number / 50
            case "tick":
                self.take(self.transfer.tick(self.now))
            case "join":
                self.join(donor)
            case _:
                self.open = [each for each in self.open if each.donor != donor]
                self.take(self.transfer.left(donor, self.now))


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 12), st.lists(Conduct, min_size=1, max_size=5), st.lists(Step, max_size=60))
def test_histories(chunks: int, conducts: list[str], steps: list[tuple[str, int]]) -> None:
    history = History(chunks, [*conducts, "honest"])
    for donor in tuple(history.conduct):
        history.join(donor)
    for what, number in steps:
        history.step(what, number)
    helper = PeerId("helper")  # comes when all else was said, and stays
    history.conduct[helper] = "honest"
    history.join(helper)
    for _ in range(1000):
        if history.finished:
            break
        if [each for each in history.open if history.conduct[each.donor] != "silent"]:
            history.answer(0)
        else:
            history.now = max(history.now, min(history.transfer.deadline(), history.now + 1000))
            history.take(history.transfer.tick(history.now))
    assert history.finished == 1
    assert b"".join(history.stored[index] for index in range(chunks)) == history.content
    liars = {donor for donor, lied in history.dropped.items() if lied}
    assert all(history.conduct[donor] == "liar" for donor in liars)
