"""Limits: what is granted keeps to its rate, what is told as a wait is true, and what was not used comes back."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.errors import TooLarge
from node.requester import LOCAL, of_client
from node.web.caller import (
    ANONYMOUS,
    STRANGER,
    Limits,
    Need,
    Rate,
    need_of,
    of_address,
    of_signer,
    of_wallet,
    subnet_of,
)
from node.web.errors import Limited
from node.web.meter import RATES_MAX, Meter, named
from p2p.allowance import Buckets

LIMITS = Limits(requests=Rate(2.0, 10.0), tokens=Rate(5.0, 100.0), concurrent=2)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(0.0, 3.0), st.integers(0, 40), st.floats(0.0, 1.5)), max_size=60))
def test_tokens_granted_keep_to_the_rate_and_a_refund_is_no_more_than_the_charge(
    history: list[tuple[float, int, float]],
) -> None:
    buckets, now, kept = Buckets(rate_per_s=2.0, burst=30.0), 0.0, 0.0
    for wait_s, cost, share in history:
        now += wait_s
        wait_told = buckets.wait_s("a", now, cost)
        taken = buckets.take("a", now, cost)
        assert taken == (wait_told == 0)
        if taken:
            used = cost * share  # also more than was estimated
            buckets.settle("a", cost, used)
            kept += used
        assert kept <= 30 + 2.0 * now + 40 * 0.5 + 1e-6  # the last estimate may have been short, and is owed
        assert buckets.wait_s("a", now, 30.0) >= 0  # never above the burst
        assert buckets.wait_s("a", now, 30.1) == math.inf


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0.0, 2.0)), max_size=60))
def test_requests_keep_to_every_rate_and_waiting_as_told_is_enough(history: list[tuple[str, float]]) -> None:
    meter, now, granted = Meter(), 0.0, {"a": 0, "b": 0}
    for account, wait_s in history:
        now += wait_s
        taken = {("asks", account): Rate(1.0, 3.0), ("subnet", "n"): Rate(1.5, 4.0)}
        try:
            meter.request(taken, now)
        except Limited as exc:
            now += math.ceil(exc.retry_after_s or 0)  # as the header has it
            meter.request(taken, now)
        granted[account] += 1
        assert granted[account] <= 3 + 1.0 * now
        assert sum(granted.values()) <= 4 + 1.5 * now


def test_who_is_refused_by_one_rate_pays_at_none() -> None:
    meter = Meter()
    narrow, wide = {("asks", "a"): Rate(1.0, 1.0)}, {("subnet", "n"): Rate(1.0, 3.0)}
    meter.request({**narrow, **wide}, 0.0)
    for _ in range(9):
        with pytest.raises(Limited):
            meter.request({**narrow, **wide}, 0.0)
    meter.request(wide, 0.0)
    meter.request(wide, 0.0)
    with pytest.raises(Limited, match="the network n may ask 1 times a second") as caught:
        meter.request(wide, 0.0)
    assert caught.value.counter == "limited_subnet"


def test_answers_under_way_are_counted_and_so_are_their_tokens() -> None:
    meter, a = Meter(), {"a": LIMITS}
    meter.enter("a", a)
    meter.enter("a", a)
    with pytest.raises(Limited, match="2 requests under way"):
        meter.enter("a", a)
    meter.enter("b", {"b": LIMITS})
    charge = meter.charge("a", 60, 0.0)
    assert charge is not None
    with pytest.raises(Limited, match="wait 4 s"):
        meter.charge("a", 60, 0.0)
    with pytest.raises(TooLarge, match="300 a minute"):
        meter.charge("a", 101, 0.0)
    meter.settle(charge, 10)
    assert meter.charge("a", 60, 0.0) == charge
    meter.leave("a", a)
    meter.enter("a", a)
    meter.leave("a", a)
    meter.leave("a", a)
    assert meter.charge("a", 10**6, 0.0) is None  # nothing under way: it is no account of the gate


def test_who_shares_limits_is_refused_by_either_and_pays_at_both() -> None:
    wide = Limits(requests=Rate(2.0, 10.0), tokens=Rate(10.0, 150.0), concurrent=3)
    meter, limits = Meter(), {name: {name: LIMITS, "shared:192.0.2.1": wide} for name in "abcd"}
    for name in "abc":
        meter.enter(name, limits[name])
    with pytest.raises(Limited, match=r"whoever signs from 192\.0\.2\.1 has 3 requests under way"):
        meter.enter("d", limits["d"])
    first = meter.charge("a", 100, 0.0)
    assert first is not None
    with pytest.raises(Limited, match=r"whoever signs from 192\.0\.2\.1 has 600 tokens a minute"):
        meter.charge("b", 51, 0.0)
    second = meter.charge("b", 50, 0.0)
    assert second is not None
    meter.settle(first, 0)
    assert meter.charge("c", 100, 0.0) is not None
    for name in "abc":
        meter.leave(name, limits[name])
    assert not meter._running
    assert not meter._tokens


def test_rates_are_bounded() -> None:
    meter = Meter()
    for number in range(RATES_MAX + 50):
        meter.request({("account", "a"): Rate(1.0 + number, 5.0)}, 0.0)
    assert len(meter._buckets) == RATES_MAX


@pytest.mark.parametrize(
    ("method", "path", "need"),
    [
        ("GET", "/", Need.NOTHING),
        ("GET", "/healthz", Need.NOTHING),
        ("GET", "/static/chat.js", Need.NOTHING),
        ("GET", "/static", Need.ADMIN),
        ("POST", "/v1/chat/completions", Need.INFER),
        ("GET", "/v1/models/a/b", Need.INFER),
        ("POST", "/api/v1/model/inference", Need.INFER),
        ("POST", "/api/chat", Need.INFER),
        ("POST", "/api/v1/sealed", Need.INFER),
        ("GET", "/api/v1/peers/x/sealing-key", Need.INFER),
        ("GET", "/metrics", Need.METRICS),
        ("HEAD", "/api/v1/status", Need.METRICS),
        ("GET", "/api/v1/training", Need.METRICS),
        ("POST", "/api/v1/training/start", Need.TRAIN),
        ("DELETE", "/api/v1/status", Need.ADMIN),
        ("POST", "/api/v1/sessions", Need.ADMIN),
        ("POST", "/api/v1/session/challenge", Need.SESSION),
        ("POST", "/brand-new", Need.ADMIN),
        ("GET", "//v1/models", Need.ADMIN),
    ],
)
def test_what_each_path_wants(method: str, path: str, need: Need) -> None:
    assert need_of(method, path) is need


def test_accounts() -> None:
    assert of_address("127.0.0.1").limits is None
    assert of_address(None).account == of_address("::1").account == LOCAL
    assert of_address("203.0.113.9").limits == ANONYMOUS
    assert subnet_of("8.8.8.8") == subnet_of("::ffff:8.8.8.9") == "8.8.8.0/24"
    assert subnet_of("2606:4700:1:2ff::1") == "2606:4700:1:200::/56"
    assert [subnet_of(host) for host in ("192.168.1.5", "127.0.0.1", None, "/a/socket")] == [None] * 4
    signer, listed = of_signer("ab" * 32), of_wallet("0xAb", is_listed=True)
    assert signer.limits == STRANGER
    assert of_client(signer.account).priority > of_client(listed.account).priority == of_client(LOCAL).priority
    assert of_client(of_wallet("0xAb", is_listed=False).account).priority == of_client(signer.account).priority
    assert not signer.may(Need.TRAIN)
    assert not signer.may(Need.ADMIN)
    assert [named("", each.account) for each in (signer, listed)] == ["the key abababababababab...", "the wallet 0xAb"]
    assert [named("", account) for account in (LOCAL, "2001:db8::/64")] == ["this machine", "the address 2001:db8::/64"]
