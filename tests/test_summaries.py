"""gossip/summaries.py: what is said of a node's own state stays within its bounds, and is said seldom."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import to_builtins
from msgspec.structs import fields, replace

from crypto.canonical import encode
from crypto.envelope import Envelope, open_envelope
from crypto.identity import Identity
from gossip.errors import LocalProtocolError, RemoteProtocolError
from gossip.flow import STRETCH_MAX
from gossip.messages import advert_topic
from gossip.summaries import (
    HEAD_BYTES,
    NATS_MAX,
    SECONDS_MAX,
    SHARE_STEP,
    SKILL_MIN,
    SUMMARY_BYTES_MAX,
    SUMMARY_DOMAIN,
    SUMMARY_EVERY_S,
    SUMMARY_JITTER,
    SUMMARY_LIFE_MS_MAX,
    SUMMARY_REFRESH_S,
    OwnSummary,
    SelfSummary,
    says_more,
    seal_summary,
    summary_of,
    summary_topic,
)

IDENTITY = Identity(bytes(32))
NOW_MS = 1_800_000_000_000
SUMMARY = SelfSummary(
    revision="sha256-0123456789ab", uptime_s=3600.5, boot_count=3, loop_lag_ms=1.5, busy=0.5, queued=0.25,
    first_token_s=0.2, entropy_nats=2.5, margin=0.25, calibration_error=0.1, latency_skill=-0.5, load_skill=0.5,
    success_mean=0.9, success_least=0.5, head_id=9, head_hash=bytes(range(HEAD_BYTES)),
)  # fmt: skip
LARGEST = SelfSummary(
    revision="r" * 96, uptime_s=SECONDS_MAX, boot_count=(1 << 53) - 1, loop_lag_ms=SECONDS_MAX, busy=1.0, queued=1.0,
    first_token_s=SECONDS_MAX, entropy_nats=NATS_MAX, margin=1.0, calibration_error=1.0, latency_skill=SKILL_MIN,
    load_skill=SKILL_MIN, success_mean=1.0, success_least=1.0, head_id=(1 << 53) - 1, head_hash=b"\xff" * HEAD_BYTES,
)  # fmt: skip


def envelope_of(body: bytes) -> Envelope:
    return Envelope(
        v=1, domain=SUMMARY_DOMAIN, network="main", sender=IDENTITY.peer_id, sequence=1, time_ms=NOW_MS,
        expires_ms=NOW_MS + 1, body=body,
    )  # fmt: skip


def sealed(summary: SelfSummary, network: str = "main", **changes: Any) -> bytes:
    return seal_summary(IDENTITY, summary, **{"network": network, "sequence": 1, "time_ms": NOW_MS, **changes})


@pytest.mark.parametrize("summary", [SUMMARY, LARGEST, SelfSummary()])
def test_what_is_sealed_is_what_is_read(summary: SelfSummary) -> None:
    raw = sealed(summary)
    assert summary_of(open_envelope(raw, domain=SUMMARY_DOMAIN, network="main", now_ms=NOW_MS)) == summary


def test_the_largest_summary_is_under_a_kibibyte() -> None:
    times = {"sequence": (1 << 63) - 1, "time_ms": (1 << 62), "life_ms": SUMMARY_LIFE_MS_MAX}
    raw = sealed(LARGEST, "n" * 64, **times)
    assert 600 < len(raw) <= SUMMARY_BYTES_MAX < 1024
    assert len(sealed(SelfSummary())) < 250


def test_the_topic_is_its_own() -> None:
    assert summary_topic("main") == "openagi/1/main/self"
    assert summary_topic("main") != advert_topic("main")


BAD: list[dict[str, Any]] = [
    {"busy": 1.01}, {"busy": -0.01}, {"queued": 2.0}, {"margin": -1.0}, {"calibration_error": 1.5},
    {"success_mean": 1.1}, {"success_least": -0.1}, {"latency_skill": 1.01}, {"load_skill": SKILL_MIN - 1},
    {"entropy_nats": NATS_MAX + 1}, {"entropy_nats": -0.1}, {"loop_lag_ms": -1.0}, {"loop_lag_ms": SECONDS_MAX * 2},
    {"first_token_s": -1.0}, {"uptime_s": SECONDS_MAX * 2}, {"boot_count": -1}, {"boot_count": 1 << 53},
    {"head_id": -1}, {"head_hash": bytes(31)}, {"head_hash": bytes(33)}, {"head_hash": None}, {"head_id": None},
    {"revision": ""}, {"revision": "r" * 97}, {"revision": "two words"}, {"revision": "r\n"}, {"revision": "é"},
]  # fmt: skip


@pytest.mark.parametrize("change", BAD, ids=str)
def test_what_is_out_of_bounds_is_neither_said_nor_taken(change: dict[str, Any]) -> None:
    with pytest.raises(LocalProtocolError):
        sealed(replace(SUMMARY, **change))
    value = {**to_builtins(SUMMARY, builtin_types=(bytes,)), **change}
    with pytest.raises(RemoteProtocolError):
        summary_of(envelope_of(encode(value)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [each.name for each in fields(SelfSummary)])
def test_no_figure_is_infinite_or_none_at_all(name: str, value: float) -> None:
    with pytest.raises(LocalProtocolError):
        sealed(replace(SUMMARY, **{name: value}))


@pytest.mark.parametrize(
    "body",
    [
        b"", b"\xc0", b"\x80\x80", encode([1]), encode({"mood": 1.0}), encode({"peers": ["a"]}),
        encode({"busy": "0.5"}), encode({"busy": True}), encode({"busy": [0.5]}),
        encode({f"x{n}": 0 for n in range(33)}),
        b"\x81\xa4busy\xca\x3f\x00\x00\x00", b"\x81\xa4busy\xcb\x7f\xf8" + bytes(6),
    ],
)  # fmt: skip
def test_no_other_body_is_taken(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        summary_of(envelope_of(body))


def test_no_member_is_a_text_but_the_revision() -> None:
    kinds = {each.name: str(each.type) for each in fields(SelfSummary)}
    assert [name for name, kind in kinds.items() if "str" in kind] == ["revision"]
    assert not [name for name in kinds if "peer" in name]


# --- when it is said ---


@pytest.mark.parametrize(
    "change",
    [
        {"revision": "r2"}, {"boot_count": 4}, {"busy": 0.51 + SHARE_STEP}, {"queued": None}, {"loop_lag_ms": 60.0},
        {"first_token_s": 0.4}, {"entropy_nats": 4.0}, {"calibration_error": 0.35}, {"latency_skill": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_what_peers_would_heed_says_more(change: dict[str, Any]) -> None:
    assert says_more(SUMMARY, replace(SUMMARY, **change))
    assert says_more(replace(SUMMARY, **change), SUMMARY)


@pytest.mark.parametrize(
    "change",
    [
        {}, {"uptime_s": 9e9}, {"head_id": 10, "head_hash": bytes(HEAD_BYTES)}, {"busy": 0.6}, {"loop_lag_ms": 40.0},
        {"first_token_s": 0.25}, {"entropy_nats": 2.6},
    ],
    ids=str,
)  # fmt: skip
def test_what_always_moves_says_nothing(change: dict[str, Any]) -> None:
    assert not says_more(SUMMARY, replace(SUMMARY, **change))


def test_nothing_is_said_before_there_is_something() -> None:
    own = OwnSummary(random.Random(1), 5)
    assert own.deadline() == math.inf
    own.withdraw()
    own.offer(SUMMARY, 0.0)
    assert own.deadline() == math.inf


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.0, 60.0), st.floats(0.0, 1.0)), min_size=1, max_size=60),
    st.integers(),
    st.floats(1.0, STRETCH_MAX),
)
def test_however_fast_it_changes_it_is_said_seldom_and_soon_enough(
    history: list[tuple[float, float]], seed: int, stretch: float
) -> None:
    own, now, said = OwnSummary(random.Random(seed), 5), 0.0, list[float]()
    sequences = [5]
    own.stretch = stretch
    for wait_s, busy in history:
        while own.deadline() <= now + wait_s:
            due = max(now, own.deadline())
            _, sequence = own.say(due, 3)  # the clock stands still in 1970
            sequences.append(sequence)
            said.append(due)
        now += wait_s
        own.offer(replace(SUMMARY, busy=busy), now)
    assert sequences == sorted(set(sequences))
    gaps = [after - before for before, after in pairwise(said)]
    assert all(SUMMARY_EVERY_S * stretch - 1e-6 <= gap <= SUMMARY_REFRESH_S * stretch + 1e-6 for gap in gaps)
    if said:
        assert said[0] <= history[0][0] + SUMMARY_EVERY_S
    assert own.deadline() <= now + SUMMARY_REFRESH_S * stretch


def test_an_idle_node_speaks_once_a_refresh() -> None:
    own, now = OwnSummary(random.Random(1), 5), 0.0
    own.offer(SUMMARY, now)
    for _ in range(100):
        now = own.deadline()
        own.say(now, NOW_MS)
        own.offer(replace(SUMMARY, uptime_s=now, head_id=own.sequence), now)
    assert own.said == 100
    assert 99 * SUMMARY_REFRESH_S * (1 - SUMMARY_JITTER) <= now <= 100 * SUMMARY_REFRESH_S


def test_a_life_never_passes_its_bound() -> None:
    own = OwnSummary(random.Random(1), 5)
    own.stretch = STRETCH_MAX + 1
    assert own.life_ms == SUMMARY_LIFE_MS_MAX
    assert own.life_ms > 2 * 1000 * SUMMARY_REFRESH_S * STRETCH_MAX
