"""node/self_period.py, request_ended.py, training_merges.py: a period, news, quotas, what is told of requests."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from node.consciousness import Body, ConsciousnessState, Identity, Load, Recorded, Social
from node.consciousness_fields import FIELDS
from node.events import TEXT_CHARS_MAX, Inference, decode_body, encode_body
from node.request_ended import Ended, text_of, to_event
from node.self_period import HOUR_S, NOISE, Period, Quota, is_news
from node.training_merges import LOOKS_MAX, Merges
from node.training_round import RoundTold
from node.work import EmbedWork, GenerateWork, Message

ENDED = Ended(
    account="own", is_hidden=False, model="m", revision="r", prompt_tokens=3, answer_tokens=4, took_s=0.25, outcome="ok"
)


def test_a_periods_figures_are_means_and_absent_without_a_measurement() -> None:
    period = Period()
    assert period.figures() == {}
    period.looked(None, 2)
    period.looked(None, 4)
    assert period.figures() == {"live_peers": 3.0}
    period.looked(6, 3)
    period.answered(1.0)
    period.answered(3.0)
    period.held_out(2.5)
    assert period.figures() == {"live_peers": 3.0, "active_requests": 6.0, "latency_s": 2.0, "loss_nats": 2.5}


def test_clocks_and_noise_are_no_news() -> None:
    before = ConsciousnessState(
        identity=Identity(uptime_s=1.0, phase="running"),
        load=Load(loop_lag_ms=2.0, queue_length=0),
        body=Body(rss_bytes=100 << 20),
        social=Social(rtt_ms=20.0),
        memory=Recorded(entries=1, head_id=1),
    )
    quiet = replace(
        before,
        identity=Identity(uptime_s=99.0, phase="running"),
        load=Load(loop_lag_ms=9.0, queue_length=0),
        body=Body(rss_bytes=101 << 20),
        social=Social(rtt_ms=23.0),
        memory=Recorded(entries=7, head_id=9, head_hash="ab"),
    )
    assert not is_news(before, quiet)
    for change in (
        {"identity": Identity(uptime_s=1.0, phase="stopping")},
        {"load": Load(loop_lag_ms=2.0, queue_length=1)},
        {"load": Load(loop_lag_ms=60.0, queue_length=0)},
        {"body": Body(rss_bytes=150 << 20)},
        {"social": Social(rtt_ms=40.0)},
        {"social": Social()},
    ):
        assert is_news(before, replace(before, **change)), change  # type: ignore[arg-type]  # members by name


def test_the_table_of_noise_names_members() -> None:
    assert NOISE.keys() <= {row.path for row in FIELDS}


def test_a_quota_is_of_each_source_of_all_and_of_an_hour() -> None:
    quota = Quota(2, 3)
    assert [quota.takes("a", 0.0) for _ in range(3)] == [True, True, False]
    assert [quota.takes("b", 1.0) for _ in range(2)] == [True, False]
    assert quota.takes("a", HOUR_S)


def test_a_request_leaves_metadata_alone_and_a_hidden_one_nothing() -> None:
    event = to_event(ENDED, 5)
    assert event is not None
    assert event.body == Inference(
        subject="own", model="m", revision="r", prompt_tokens=3, answer_tokens=4, duration_ms=250, outcome="ok"
    )
    assert to_event(replace(ENDED, is_hidden=True, text="secret"), 5) is None


def test_whatever_is_told_of_a_request_its_event_can_be_kept() -> None:
    wild = replace(ENDED, account="\ud800" * 999, model="m" * 999, revision="\udfff", text="\ud800" * 99_999)
    event = to_event(replace(wild, prompt_tokens=1 << 60, took_s=-1.0), 5)
    assert event is not None
    assert decode_body("inference", encode_body(event.body)) == event.body


@pytest.mark.parametrize(
    ("work", "wanted"),
    [
        (GenerateWork(request_id="q", text="asked"), "asked\n\nsaid"),
        (GenerateWork(request_id="q", messages=(Message(role="user", content="hi"),)), "user: hi\n\nsaid"),
        (GenerateWork(request_id="q", tokens=(1, 2)), None),
        (EmbedWork(request_id="q", texts=("x",)), None),
    ],
)
def test_text_is_what_was_asked_and_said(work: GenerateWork | EmbedWork, wanted: str | None) -> None:
    assert text_of(work, "said") == wanted


def test_of_a_long_text_the_end_of_the_question_and_the_beginning_of_the_answer_stay() -> None:
    text = text_of(GenerateWork(request_id="q", text="a" * 20_000 + "z"), "s" + "t" * 20_000)
    assert text is not None
    assert len(text) <= TEXT_CHARS_MAX
    assert "az\n\nst" in text


# --- merges ---


@dataclass
class Told:
    """Implements node.training_merges.Rounds."""

    run: str = "r"
    rounds: list[RoundTold] = field(default_factory=list)


def told(number: int, loss: float | None) -> RoundTold:
    return RoundTold(
        round=number, revision="v", root="", contributed=("a", "b"), sat_out=(), missing=(),
        not_counted={"c": "too far", "d": "a copy"}, reasons={"c": "not finite", "d": "copy"}, rule="mean", why="",
        moved=1.0, seconds=1.0, held_out_before=3.0, held_out_loss=loss,
    )  # fmt: skip


def test_a_round_is_told_once_when_its_loss_is_known() -> None:
    merges, rounds = Merges(), Told(rounds=[told(0, None)])
    assert merges.since(rounds, is_last=False) == []
    rounds.rounds = [told(0, 2.5)]
    (merged,) = merges.since(rounds, is_last=False)
    assert (merged.round, merged.accepted, merged.rejected) == (0, 2, {"not_finite": 1, "copy": 1})
    assert (merged.loss_before_nats, merged.loss_after_nats) == (3.0, 2.5)
    assert merges.since(rounds, is_last=False) == []
    rounds.rounds += [told(1, None), told(2, None)]
    assert [each.round for each in merges.since(rounds, is_last=False)] == [1]  # a later one is there
    assert [each.round for each in merges.since(rounds, is_last=True)] == [2]


def test_a_round_without_a_loss_is_told_after_a_while_and_each_runs_rounds_are_its_own() -> None:
    merges, rounds = Merges(), Told(rounds=[told(4, None)])
    looks = [merges.since(rounds, is_last=False) for _ in range(LOOKS_MAX)]
    assert [len(each) for each in looks] == [0] * (LOOKS_MAX - 1) + [1]
    assert len(merges.since(Told(run="other", rounds=[told(0, 1.0)]), is_last=False)) == 1
