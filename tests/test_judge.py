"""node/judge.py: how long a peer's silence is borne, and what each failure means."""

from __future__ import annotations

import pytest

from crypto.identity import PeerId
from gossip.messages import Capacity
from gossip.standing import Fault
from node.errors import BadRequest, NoRoom, PeerFailed
from node.judge import ACCEPT_S, STALL_S, Judge, LetDown, judged
from node.work import GenerateWork, Piece, Progress, Sampling, Started
from p2p.errors import LocalProtocolError, P2PError, Refused, RemoteError, RemoteProtocolError, Unreachable

PEER = PeerId("12D3KooWpeer")
FAST = Capacity(decode_tok_s=50.0, prefill_tok_s=1000.0, slots_total=1, slots_free=1)


def judge(remaining_ms: int = 120_000) -> Judge:
    work = GenerateWork(request_id="q", tokens=(1, 2), sampling=Sampling(max_tokens=9), remaining_ms=remaining_ms)
    return Judge(PEER, FAST, work, 100.0)


def started() -> Started:
    return Started(served_by=PEER, model="tale", revision="r1", prompt_tokens=2)


def test_silence_is_borne_shortly_until_the_first_token_and_longer_after_it() -> None:
    judging = judge()
    assert judging.waits_until(100.0) == 100.0 + ACCEPT_S
    assert "for 2 s" in judging.late(100.0 + ACCEPT_S).message
    assert not isinstance(judging.late(100.0 + ACCEPT_S), LetDown), "it never said that it had the request"
    judging.waited(0.5)
    judging.take(started(), 100.5)
    assert judging.waits_until(100.5) == 100.5 + ACCEPT_S
    assert isinstance(judging.late(103.0), LetDown)
    judging.take(Piece(tokens=(7,), text="w7 "), 101.0)
    assert judging.waits_until(101.0) == 101.0 + STALL_S
    assert judging.first_token_s == 1.0
    assert "for 5 s" in judging.late(106.0).message


def test_only_waiting_uses_up_the_patience_and_only_work_gives_it_back() -> None:
    judging = judge()
    judging.take(started(), 100.0)
    judging.take(Progress(engine_steps=1, prefilled_tokens=1, queue_position=0), 100.0)
    judging.waited(1.5)
    assert not judging.take(Progress(engine_steps=1, prefilled_tokens=1, queue_position=0), 101.5), "the same again"
    judging = judge(remaining_ms=86_400_000)
    judging.take(started(), 100.0)
    judging.waited(1.5)
    assert judging.waits_until(5000.0) == pytest.approx(5000.0 + ACCEPT_S - 1.5), "our own client's slowness is free"


def test_a_share_of_the_time_is_kept_for_another_peer() -> None:
    judging = judge(remaining_ms=2000)
    assert judging.waits_until(100.0) == 101.5
    assert "75%" in judging.late(101.5).message


@pytest.mark.parametrize(
    ("failure", "kind", "reason", "fault"),
    [
        (RemoteError("no_room", "full", retryable=True), NoRoom, "no_room", None),
        (RemoteError("busy", "full", retryable=True), NoRoom, "busy", None),
        (RemoteError("strange", "?", retryable=True), PeerFailed, "another_word", None),
        (RemoteProtocolError("lies"), PeerFailed, "protocol", Fault.MALFORMED),
        (LocalProtocolError("too large"), BadRequest, "bad_request", None),
        (Refused("no such protocol"), NoRoom, "busy", None),
        (Unreachable("gone"), PeerFailed, "unreachable", None),
        (PeerFailed("silent"), PeerFailed, "stalled", None),
        (LetDown("stopped"), PeerFailed, "stalled", Fault.TIMEOUT),
    ],
    ids=lambda value: getattr(value, "code", None) or str(getattr(value, "__name__", value)),
)
def test_what_a_failure_means(
    failure: P2PError | PeerFailed, kind: type[Exception], reason: str, fault: Fault | None
) -> None:
    verdict = judged(failure, PEER)
    assert (type(verdict.error), verdict.reason, verdict.fault) == (kind, reason, fault)
    assert PEER in str(verdict.error) or kind is BadRequest
