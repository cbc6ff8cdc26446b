"""What is kept of the fixed probes, and how far later answers agree with it."""

from __future__ import annotations

import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crypto.errors import BadState
from node.errors import BadFigure
from node.self_probes import (
    ANSWER_TOKENS,
    FILE_BYTES_MAX,
    MODELS_MAX,
    PROMPTS,
    TEXTS,
    Agreement,
    Kept,
    ProbeKey,
    Round,
    agreement,
    decode,
    tokenizer_of,
)

ANSWERS = ((1, 2, 3, 4), (5, 6), (7,), (8, 9, 10))


def vector(*numbers: float) -> bytes:
    return struct.pack(f"<{len(numbers)}f", *numbers)


VECTORS = (vector(1.0, 0.0), vector(0.6, 0.8), vector(0.0, 1.0))


def key(model: str = "tale", **changes: object) -> ProbeKey:
    whole = ProbeKey(
        model=model, numbers="float32", context_tokens=512, encoder="", encoder_numbers="", tokenizer="a" * 64
    )
    return msgspec.structs.replace(whole, **changes)


def round_of(**changes: object) -> Round:
    return msgspec.structs.replace(Round(revision="r1", merges=3, answers=ANSWERS, vectors=VECTORS), **changes)


def test_the_same_again_agrees_wholly() -> None:
    assert agreement(round_of(), round_of()) == Agreement(rounds=0, answers=1.0, embeddings=1.0)


def test_rounds_are_those_merged_since() -> None:
    assert agreement(round_of(), round_of(merges=8)).rounds == 5
    assert agreement(round_of(), round_of(merges=0)).rounds == 0, "the memory that counted them was lost"


@pytest.mark.parametrize(
    ("answers", "share"),
    [
        (((1, 2, 3, 9), (5, 6), (7,), (8, 9, 10)), 9 / 10),
        (((9, 9, 9, 9), (9, 9), (9,), (9, 8, 7)), 0.0),
        (((1, 2, 3, 4, 4, 4), (5, 6), (7,), (8, 9, 10)), 10 / 12),
        (((2, 3, 4), (5, 6), (7,), (8, 9, 10)), 6 / 10),
        (((), (), (), ()), 0.0),
        ((), None),
    ],
    ids=["one other", "all other", "longer", "shifted", "empty", "none"],
)
def test_every_token_counts_alike(answers: tuple[tuple[int, ...], ...], share: float | None) -> None:
    assert agreement(round_of(), round_of(answers=answers)).answers == share


def test_nothing_kept_gives_nothing_to_compare() -> None:
    found = agreement(round_of(answers=(), vectors=()), round_of())
    assert (found.answers, found.embeddings) == (None, None)
    assert agreement(round_of(answers=((),) * 4), round_of(answers=((),) * 4)).answers is None


def test_embeddings_are_the_mean_of_cosines() -> None:
    turned = (vector(0.0, 1.0), VECTORS[1], vector(0.0, -2.0))
    assert agreement(round_of(), round_of(vectors=turned)).embeddings == pytest.approx((0.0 + 1.0 - 1.0) / 3)
    zero = (vector(0.0, 0.0), VECTORS[1], VECTORS[2])
    assert agreement(round_of(), round_of(vectors=zero)).embeddings == 1.0, "a vector of no direction has no cosine"
    assert agreement(round_of(), round_of(vectors=(vector(1.0),) * 3)).embeddings is None, "of other dimensions"
    with pytest.raises(BadFigure):
        agreement(round_of(), round_of(vectors=(vector(float("nan"), 0.0), *VECTORS[1:])))


@given(
    st.lists(st.lists(st.integers(0, 3), max_size=ANSWER_TOKENS), min_size=4, max_size=4),
    st.lists(st.lists(st.integers(0, 3), max_size=ANSWER_TOKENS), min_size=4, max_size=4),
)
def test_a_share_is_of_all_places(one: list[list[int]], other: list[list[int]]) -> None:
    first, now = (round_of(answers=tuple(map(tuple, each))) for each in (one, other))
    places = sum(max(len(a), len(b)) for a, b in zip(one, other, strict=True))
    equal = sum(x == y for a, b in zip(one, other, strict=True) for x, y in zip(a, b, strict=False))
    assert agreement(first, now).answers == (equal / places if places else None)


@given(st.lists(st.floats(-1.0, 1.0, width=32), min_size=1, max_size=50))
def test_the_same_vectors_agree_exactly(numbers: list[float]) -> None:
    """Whatever their cosine rounds to."""
    same = round_of(vectors=(vector(*numbers),) * 3)
    assert agreement(same, same).embeddings == 1.0


def test_it_comes_back_as_it_was_written() -> None:
    kept = Kept()
    for name in ("one", "two"):
        assert kept.put(key(name), round_of(revision=name)) is None
    back = decode(kept.encode())
    assert back.find(key("one")) == round_of(revision="one")
    assert back.find(key("two")) == round_of(revision="two")
    assert back.find(key("three")) is None


@pytest.mark.parametrize(
    "change",
    [
        {"numbers": "int8"}, {"context_tokens": 256}, {"encoder": "minilm"}, {"encoder_numbers": "bfloat16"},
        {"tokenizer": "b" * 64}, {"model": "other"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_what_is_asked_otherwise_is_not_compared(change: dict[str, object]) -> None:
    kept = Kept([(key(), round_of())])
    assert kept.find(key()) is not None
    assert kept.find(key(**change)) is None  # type: ignore[arg-type]  # one of them is the model


def test_a_kept_round_is_never_replaced() -> None:
    kept = Kept([(key(), round_of())])
    with pytest.raises(AssertionError, match="not replaced"):
        kept.put(key(), round_of(revision="r2"))


def test_the_longest_unused_makes_room_and_is_named() -> None:
    kept = Kept()
    for n in range(MODELS_MAX):
        assert kept.put(key(f"m{n}"), round_of()) is None
    assert kept.find(key("m0")) is not None
    assert kept.put(key("more"), round_of()) == key("m1"), "m0 was used since"
    assert kept.find(key("m1")) is None
    assert decode(kept.encode()).find(key("m0")) is not None


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"\xc1", b"\x80", msgspec.msgpack.encode({"entries": [{}]}),
        msgspec.msgpack.encode({"entries": [], "more": 1}),
        Kept([(key(), round_of(vectors=(b"12345",)))]).encode(),
        Kept([(key(tokenizer="short"), round_of())]).encode(),
        Kept([(key(), round_of(answers=((-1,),)))]).encode(),
        Kept([(key(), round_of(merges=-1))]).encode(),
    ],
    ids=["empty", "none", "no entries", "no key", "unknown", "half a number", "tokenizer", "token", "merges"],
)  # fmt: skip
def test_what_is_no_file_of_probes_is_refused(raw: bytes) -> None:
    with pytest.raises(BadState):
        decode(raw)


def test_two_rounds_of_one_model_are_refused() -> None:
    one = msgspec.msgpack.decode(Kept([(key(), round_of())]).encode())
    with pytest.raises(BadState, match="two rounds"):
        decode(msgspec.msgpack.encode({"entries": one["entries"] * 2}))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_file_or_refused(raw: bytes) -> None:
    try:
        decode(raw)
    except BadState:
        return


def test_the_largest_file_that_is_written_is_read_back() -> None:
    kept = Kept()
    for n in range(MODELS_MAX):
        first = Round(
            revision="r" * 1024,
            merges=1 << 50,
            answers=((1 << 30,) * ANSWER_TOKENS,) * len(PROMPTS),
            vectors=(bytes(4 * 65_536),) * len(TEXTS),
        )
        kept.put(key(f"{n}" * 1024, numbers="n" * 1024, encoder="e" * 1024, encoder_numbers="m" * 1024), first)
    assert len(kept.encode()) <= FILE_BYTES_MAX
    decode(kept.encode())


def test_a_tokenizers_name_is_of_the_ids_and_where_each_text_ends() -> None:
    assert tokenizer_of([(1, 2), (3,)]) == tokenizer_of([(1, 2), (3,)])
    assert len({tokenizer_of(ids) for ids in ([(1, 2), (3,)], [(1,), (2, 3)], [(1, 2, 3)], [(1, 2), (4,)])}) == 4
