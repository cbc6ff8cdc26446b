"""What a run is: one encoding, one id, no contradiction, and an error in words for any other bytes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from crypto.canonical import Limits, decode_canonical, encode
from crypto.digest import digest
from crypto.identity import Identity
from gossip.errors import RemoteProtocolError
from model.codecs import CODECS
from model.rules import BY_ORDER, Rule
from node.training_plan import (
    ALLOWED_MAX,
    DENSE_ELEMENTS_MAX,
    PARTS,
    PLAN_BYTES_MAX,
    Adapters,
    Plan,
    default_codec,
    default_outer_rate,
    fault_of,
    in_order,
    plan_of,
)

PEERS = in_order(Identity.make().peer_id for _ in range(4))
FIELDS: dict[str, Any] = {
    "name": "tales",
    "network": "main",
    "model": "default",
    "revision": "sha256-0123456789ab",
    "layout": digest(b"layout"),
    "elements": 1_000,
    "start": digest(b"start"),
    "codec": "int4",
    "rule": "adaptive",
    "outer_rate": PARTS,
    "steps": 20,
    "rows": 2,
    "context": 128,
    "accumulation": 4,
    "rate": 300_000,
    "warmup_steps": 20,
    "founders": PEERS[:2],
    "probation": 3,
    "absent_max": 2,
    "created_ms": 1_800_000_000_000,
}
OTHERWISE: dict[str, Any] = {
    "adapters": Adapters(rank=4, alpha=8),
    "name": "fables",
    "network": "other",
    "model": "org/model",
    "revision": "r2",
    "layout": digest(b"another layout"),
    "elements": 1_001,
    "start": digest(b"another start"),
    "codec": "int8",
    "rule": "weighted",
    "outer_rate": PARTS // 2,
    "momentum": PARTS // 2,
    "steps": 21,
    "rows": 3,
    "context": 129,
    "accumulation": 5,
    "rate": 300_001,
    "warmup_steps": 0,
    "founders": PEERS[:1],
    "members": PEERS,
    "probation": 4,
    "absent_max": 3,
    "voters_max": 3,
    "created_ms": 1_800_000_000_001,
}


def plan(**changes: Any) -> Plan:
    return Plan(**{**FIELDS, **changes})


def test_a_plan_comes_back_from_its_bytes() -> None:
    for each in (plan(), plan(members=PEERS, momentum=PARTS - 1)):
        again = plan_of(each.raw)
        assert again == each
        assert again.raw == each.raw
        assert again.id == each.id
        assert len(each.id) == 32


def test_every_field_decides_the_id() -> None:
    assert set(OTHERWISE) == set(Plan.__struct_fields__) - {"v"}
    ids = {plan(**{name: value}).id for name, value in OTHERWISE.items()} | {plan().id}
    assert len(ids) == len(OTHERWISE) + 1
    assert all(plan_of(plan(**{name: value}).raw) for name, value in OTHERWISE.items())


def test_the_largest_plan_fits() -> None:
    peers = in_order(Identity.make().peer_id for _ in range(ALLOWED_MAX))
    largest = plan(founders=peers[:64], members=peers)
    assert len(largest.raw) <= PLAN_BYTES_MAX
    assert plan_of(largest.raw) == largest


def test_the_history_begins_with_the_founders_and_stands_on_the_plan() -> None:
    genesis = plan().genesis
    assert (genesis.run, genesis.round) == (plan().id, 0)
    assert genesis.electors.voters == PEERS[:2]
    assert genesis.base != plan(steps=21).genesis.base
    assert plan().revision_at(3, bytes(32)) == "tales-r3-000000000000"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"codec": "int5"}, "codec 'int5' is none of"),
        ({"rule": "best"}, "rule 'best' is none of"),
        *(({"codec": "ef64.2b", "rule": str(rule)}, "means nothing on ef64.2b") for rule in sorted(BY_ORDER)),
        ({"codec": "ef256.2b", "rule": "median"}, "means nothing on ef256.2b"),
        ({"outer_rate": 0}, "learns nothing"),
        ({"founders": PEERS[1::-1]}, "founders are not in order"),
        ({"founders": (PEERS[0], PEERS[0])}, "founders are not in order, each once"),
        ({"members": PEERS[::-1]}, "members are not in order"),
        ({"members": PEERS[1:]}, "a founder is no member"),
        ({"founders": ("nobody",)}, "one of its founders is no peer: the peer id nobody"),
        ({"members": in_order((*PEERS, "nobody"))}, "one of its members is no peer: the peer id nobody"),
        ({"voters_max": 1}, "2 founders and voters_max 1"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_plan_that_contradicts_itself_is_refused_with_a_sentence(changes: dict[str, Any], why: str) -> None:
    wrong = plan(**changes)
    assert why in fault_of(wrong)
    with pytest.raises(RemoteProtocolError, match="contradicts itself"):
        plan_of(wrong.raw)


def test_what_contradicts_nothing_has_no_fault() -> None:
    for codec in CODECS:
        for rule in Rule:
            if not (codec.startswith("ef") and rule in BY_ORDER):
                assert fault_of(plan(codec=codec, rule=str(rule))) == ""
    assert fault_of(plan(members=PEERS, voters_max=2)) == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "Tales"}, {"name": ""}, {"name": "x" * 33}, {"network": "a b"}, {"model": ""}, {"model": "x" * 201},
        {"layout": bytes(31)}, {"elements": 0}, {"elements": (1 << 32) + 1}, {"outer_rate": 16 * PARTS + 1},
        {"momentum": PARTS}, {"momentum": -1}, {"steps": 0}, {"rows": 0}, {"context": (1 << 20) + 1},
        {"rate": 0}, {"rate": 1_000_000_000}, {"founders": ()}, {"founders": ("",)},
        {"probation": 0}, {"absent_max": 0}, {"voters_max": 65}, {"created_ms": -1}, {"v": 2}, {"steps": 2.0},
    ],
    ids=str,
)  # fmt: skip
def test_a_field_out_of_its_range_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError, match="cannot be read"):
        plan_of(structs.replace(plan(), **changes).raw)


@given(st.binary(max_size=64))
def test_any_bytes_are_a_plan_or_an_error_in_words(raw: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        plan_of(raw)


@settings(deadline=None)  # the first example pays for what the others find made
@given(st.data())
def test_a_changed_byte_is_another_run_or_none(data: st.DataObject) -> None:
    raw = bytearray(plan(members=PEERS).raw)
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    try:
        found = plan_of(bytes(raw))
    except RemoteProtocolError:
        return
    assert found.raw == bytes(raw)
    assert found.id != plan(members=PEERS).id


def test_defaults_go_by_what_is_cheap() -> None:
    assert default_codec(DENSE_ELEMENTS_MAX) == "int4"
    assert default_codec(DENSE_ELEMENTS_MAX + 1) == "ef64.2b"
    assert default_outer_rate("ef256.2b") == PARTS // 2
    assert default_outer_rate("int4") == default_outer_rate("ef64.2b") == PARTS
    assert in_order(("b", "a", "b")) == ("a", "b")


@pytest.mark.parametrize(
    ("codec", "elements", "momentum", "every"),
    [
        ("int4", 5_000_000, 0, 1),
        ("ef64.2b", 3_000_000, 0, 1),
        ("ef64.2b", 10_000_000, 0, 4),
        ("ef64.2b", 25_500_000, 0, 8),
        ("ef64.2b", 25_500_000, PARTS // 2, 8),
        ("ef64.2b", 1_000_000_000, 0, 8),
        ("ef256.2b", 1_000_000_000, 0, 7),
        ("int4", 1_000_000_000, 0, 1),
        ("fp32", 25_500_000, 0, 1),
    ],
)
def test_weights_are_named_less_often_where_payloads_are_little_beside_them(
    codec: str, elements: int, momentum: int, every: int
) -> None:
    assert plan(codec=codec, elements=elements, momentum=momentum, rule="mean").named_every == every


def test_a_plan_that_leaves_out_what_has_a_default_is_refused() -> None:
    """Else one run had two ids."""
    fields = decode_canonical(plan().raw, Limits(bytes_max=PLAN_BYTES_MAX))
    assert isinstance(fields, dict)
    del fields["momentum"]
    with pytest.raises(RemoteProtocolError, match="another encoding"):
        plan_of(encode(fields))
