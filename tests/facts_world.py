"""Facts of a node's life: one example of each that changes all it may, and strategies that draw any."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from node.averages import BIN_TOKENS_MAX, BINS, Bin, binned
from node.consciousness import NATS_MAX, Body, Load, Recorded, Social
from node.facts import (
    Fact,
    Generated,
    Happened,
    HeldOut,
    Merged,
    Predicted,
    Probed,
    Sampled,
    Started,
    Stopped,
    Stored,
)
from node.prediction import FORETOLD, Expected, Outcome, Prediction, Score


def _sampled(n: int) -> Sampled:
    return Sampled(
        peer_id=f"peer{n}",
        revision=f"rev{n}",
        phase=("loading", "running")[n % 2],
        training=("idle", "gathering")[n % 2],
        uptime_s=100.0 + n,
        load=Load(queue_length=n, active_requests=n + 1, tokens_s=n + 0.5, loop_lag_ms=n + 2.5),
        body=Body(rss_bytes=1000 + n, accelerator_bytes=2000 + n, disk_free_bytes=3000 + n),
        social=Social(
            live_peers=n, observed_peers=n + 1, success_mean=1 / (n + 1), success_least=1 / (n + 2), rtt_ms=n + 0.25
        ),
    )


def _happened(measured: float, *, is_inside: bool) -> Happened:
    one = Score(measured=measured, error=measured - 2.0, naive_error=0.5 - measured, is_inside=is_inside)
    return Happened(outcome=Outcome(prediction=7, figures=dict.fromkeys(FORETOLD, one)))


def _predicted(from_ms: int) -> Predicted:
    expected = Expected(value=2.0, naive=1.0, low=0.5, high=3.5)
    told = Prediction(from_ms=from_ms, to_ms=from_ms + 60_000, figures=dict.fromkeys(FORETOLD, expected))
    return Predicted(prediction=told)


def _held_out(nll_nats: float, confidence: float) -> HeldOut:
    return HeldOut(nll_nats=nll_nats, bins=binned([(confidence, True), (confidence, False), (0.15, False)]))


LIFE: tuple[Fact, ...] = (
    Started(boot_count=3, version="1", model="a", last_stop="kill"),
    _sampled(1),
    Generated(tokens=10, entropy_sum_nats=20.0, margin_sum=4.0),
    _held_out(3.0, 0.9),
    _held_out(4.0, 0.6),
    _held_out(4.5, 0.7),
    Probed(rounds=2, answers=0.75, embeddings=0.9),
    _predicted(1_000),
    _happened(4.0, is_inside=True),
    Merged(run="r", round=5, accepted=3, rejected={"late": 1}, loss_before_nats=3.0, loss_after_nats=2.5),
    Stored(memory=Recorded(entries=9, last_write_ms=1_000, head_id=9, head_hash="ab")),
)
"""A history in which every member is measured but why it stopped."""

CHANGES: tuple[Fact, ...] = (
    Started(boot_count=4, version="1", model="b", last_stop="order"),
    Stopped(reason="SIGTERM", uptime_s=321.0),
    _sampled(2),
    Generated(tokens=5, entropy_sum_nats=1.0, margin_sum=4.5),
    _held_out(9.0, 0.3),
    Probed(rounds=3, answers=0.5, embeddings=0.2),
    _predicted(61_000),
    _happened(9.0, is_inside=False),
    Merged(run="r", round=6, accepted=1, rejected={"norm": 2}, loss_before_nats=2.5, loss_after_nats=2.25),
    Stored(memory=Recorded(entries=10, last_write_ms=2_000, head_id=10, head_hash="cd")),
)
"""One more of each, which after LIFE changes every member that it may."""

# --- drawn ---

COUNTS = st.integers(0, (1 << 53) - 1)
AMOUNTS = st.one_of(st.floats(0, 1e6), st.floats(0, float((1 << 53) - 1)))
SHARES = st.floats(0, 1)
COSINES = st.floats(-1, 1)
NATS = st.floats(0, NATS_MAX)
WORDS = st.sampled_from(("a", "b", "running", "Ünicode\n"))
REASONS = st.dictionaries(
    st.sampled_from([f"why-{n}" for n in range(30)]), st.integers(0, 1 << 53).map(lambda n: n // 2)
)


def _maybe(inner: st.SearchStrategy[float]) -> st.SearchStrategy[float | None]:
    return st.none() | inner


_load = st.builds(
    Load,
    queue_length=_maybe(COUNTS), active_requests=_maybe(COUNTS), tokens_s=_maybe(AMOUNTS), loop_lag_ms=_maybe(AMOUNTS),
)  # fmt: skip
_body = st.builds(
    Body, rss_bytes=_maybe(COUNTS), accelerator_bytes=_maybe(COUNTS), disk_free_bytes=_maybe(COUNTS)
)  # fmt: skip
_social = st.builds(
    Social,
    live_peers=_maybe(COUNTS), observed_peers=_maybe(COUNTS), success_mean=_maybe(SHARES), success_least=_maybe(SHARES),
    rtt_ms=_maybe(AMOUNTS),
)  # fmt: skip
_bin = st.tuples(st.integers(0, 10_000) | st.integers(0, BIN_TOKENS_MAX), SHARES, SHARES).map(
    lambda t: Bin(tokens=t[0], confidence_sum=t[0] * t[1], correct=int(t[0] * t[2]))
)
_score = st.tuples(AMOUNTS, AMOUNTS, AMOUNTS, st.booleans()).map(
    lambda t: Score(measured=t[0], error=t[0] - t[1], naive_error=t[0] - t[2], is_inside=t[3])
)
_expected = st.builds(Expected, value=AMOUNTS, naive=AMOUNTS, low=AMOUNTS, high=AMOUNTS)
_names = st.sampled_from(FORETOLD)
facts: st.SearchStrategy[Fact] = st.one_of(
    st.builds(Started, boot_count=COUNTS, version=WORDS, model=st.sampled_from("ab"), last_stop=st.just("kill")),
    st.builds(Stopped, reason=WORDS, uptime_s=AMOUNTS),
    st.builds(
        Sampled,
        peer_id=st.none() | WORDS, revision=st.none() | WORDS, phase=st.none() | WORDS, training=st.none() | WORDS,
        uptime_s=_maybe(AMOUNTS), load=_load, body=_body, social=_social,
    ),
    st.tuples(st.integers(1, 1 << 40), NATS, SHARES).map(
        lambda t: Generated(tokens=t[0], entropy_sum_nats=t[0] * t[1], margin_sum=t[0] * t[2])
    ),
    st.builds(HeldOut, nll_nats=NATS, bins=st.none() | st.tuples(*[_bin] * BINS)),
    st.builds(Probed, rounds=st.integers(0, 100), answers=_maybe(SHARES), embeddings=_maybe(COSINES)),
    st.tuples(COUNTS, st.dictionaries(_names, _expected)).map(
        lambda t: Predicted(prediction=Prediction(from_ms=t[0] // 2, to_ms=t[0], figures=t[1]))
    ),
    st.builds(Outcome, prediction=COUNTS, figures=st.dictionaries(_names, _score)).map(
        lambda outcome: Happened(outcome=outcome)
    ),
    st.builds(
        Merged,
        run=WORDS, round=COUNTS, accepted=COUNTS, rejected=REASONS, loss_before_nats=_maybe(NATS),
        loss_after_nats=_maybe(NATS),
    ),
    st.builds(
        Recorded, entries=_maybe(COUNTS), last_write_ms=_maybe(COUNTS), head_id=_maybe(COUNTS),
        head_hash=st.none() | WORDS,
    ).map(lambda memory: Stored(memory=memory)),
)  # fmt: skip
histories = st.lists(facts, max_size=25)


def without_model_change(history: list[Fact]) -> list[Fact]:
    """The same life with one model."""
    return [replace(fact, model="a") if isinstance(fact, Started) else fact for fact in history]
