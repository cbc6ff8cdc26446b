"""A run's member as numbers: equal weights from equal rounds, nothing lost that a round did not take, nothing left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from crypto.digest import Digest, digest
from model.codecs import codec_named
from model.config import RuntimeConfig, TrainConfig
from model.data import finish, text_of
from model.errors import BadInput, BadModel, BadState, BadText, BadUpdate, ComputeFailed, Diverged
from model.evaluate import SCORE_ROWS_MIN, held_out_loss, score
from model.gate import ONE
from model.load import Found, load
from model.merge import Contribution, OuterStep, merge
from model.participant import Course, Line, Participant, Payload, Settled, Shape, load_named, make_trainer
from model.rules import Rule
from model.runtime import Runtime
from model.train import Trainer
from tests.tiny_models import save_causal
from tests.toy_training import Toy, WholeDelta, batches

RUN, BASE = digest(b"a run of tests"), digest(b"its history so far")
PEERS = ("peer-a", "peer-b", "peer-c")


def member(peer: str = PEERS[0], *, codec: str = "int4", seed: int | None = None, **course: Any) -> Participant:
    """One of a run's: all start from the same weights, and each trains in an order of its own."""
    config = TrainConfig(seed=ord(peer[-1]) if seed is None else seed, rate=0.01, warmup_steps=0, autocast="off")
    fields = {"run": RUN, "rule": Rule.MEAN, **course}
    return Participant(Trainer(Toy(), batches(), config), Course(codec=codec_named(codec), **fields), peer)


def train(one: Participant, steps: int = 3) -> None:
    for _ in range(steps):
        one.step()


def written(one: Participant, number: int = 0, base: Digest = BASE) -> bytes:
    train(one)
    return one.write(number, base, steps=3, tokens=48)


def line(payload: Payload, weight: int = ONE, clip: int = ONE) -> Line:
    return Line(payload=payload, weight_parts=weight, clip_parts=clip)


def theta(one: Participant) -> torch.Tensor:
    """The weights that are trained on now."""
    return one.layout.flatten(one.trainer.named)


def unsent(one: Participant) -> torch.Tensor:
    return one._feedback.unsent_N.clone()


def played(members: list[Participant], number: int, absent: str = "") -> list[Settled]:
    """A whole round; every member reads all payloads but the absent one's."""
    raws = {one._peer: written(one, number) for one in members}
    told = []
    for one in members:
        lines = [line(one.read(raw, number, BASE, peer)) for peer, raw in sorted(raws.items()) if peer != absent]
        told.append(one.settle(lines, took_ours=one._peer != absent))
    return told


# rounds


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "int4", "ef64.2b", "ef256.2b"])
@pytest.mark.parametrize("rule", ["adaptive", "weighted", "mean"])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_members_with_the_same_lines_have_the_same_bits(codec: str, rule: str, momentum: float) -> None:
    members = [member(peer, codec=codec, rule=Rule(rule), momentum=momentum) for peer in PEERS]
    before = theta(members[0])
    for number in range(2):
        told = played(members, number)
        assert told[0] == told[1] == told[2]
        assert told[0].moved > 0
        assert members[0].state() == members[1].state() == members[2].state()
        assert all(torch.equal(theta(one), one.trainer.start_vector_N) for one in members)
    assert not torch.equal(theta(members[0]), before)


def test_the_outer_step_is_that_of_the_run() -> None:
    one, other = member(), member(PEERS[1])
    start = theta(one)
    payloads = [one.read(written(each), 0, BASE, each._peer) for each in (one, other)]
    weights, clips = (ONE, ONE // 2), (ONE // 4, ONE)
    lines = [line(*parts) for parts in zip(payloads, weights, clips, strict=True)]
    one.course = Course(run=RUN, codec=one.course.codec, rule=Rule.WEIGHTED)
    one._outer = OuterStep(0.5)
    told = one.settle(lines, took_ours=True)
    contributions = [
        Contribution(delta=payload.delta, weight_parts=weight, clip_parts=clip)
        for payload, weight, clip in zip(payloads, weights, clips, strict=True)
    ]
    expected = start - merge(contributions, Rule.WEIGHTED).update * 0.5
    assert torch.equal(theta(one), expected)
    assert told.rule == "weighted"
    assert told.moved == pytest.approx(float((expected - start).norm()))


def test_what_a_round_took_leaves_the_feedback_and_what_it_did_not_take_is_sent_next_time() -> None:
    members = [member(peer, codec="ef64.2b") for peer in PEERS]
    played(members, 0, absent=PEERS[0])
    trained = unsent(members[0])
    left = unsent(members[1])
    assert trained.norm() > left.norm()  # nothing was taken, and of the other what was sent is gone
    assert members[0].state() == members[1].state()
    raw = members[0].write(1, BASE, steps=1, tokens=16)  # without a step: what is left over from the round before
    sent = members[1].read(raw, 1, BASE, PEERS[0]).delta
    strongest = trained.abs().topk(8).indices
    assert torch.equal(sent.dense(0, sent.n)[strongest].sign(), trained[strongest].sign())


def test_a_round_that_makes_no_update_leaves_the_weights_and_the_feedback() -> None:
    one, other = member(rule=Rule.MULTI_KRUM), member(PEERS[1], rule=Rule.MULTI_KRUM)
    before = bytes(one.state())
    payload = one.read(written(one), 0, BASE, PEERS[0])
    other.read(written(other), 0, BASE, PEERS[1])
    kept = unsent(one)
    for each in (one, other):
        told = each.settle([line(payload)], took_ours=each is one)
        assert told.rule == "none"
        assert told.why.startswith("the weights stay: ")
        assert told.moved == 0.0
        assert each.state() == before
    assert torch.equal(unsent(one), kept)
    assert torch.equal(theta(one), one.trainer.start_vector_N)  # training begins anew from the round's weights


def test_a_round_of_nobody_changes_nothing() -> None:
    one = member()
    before = bytes(one.state())
    assert one.settle([], took_ours=False).rule == "none"
    assert one.state() == before


def test_unfinished_training_is_carried_over() -> None:
    one, other = member(), member(PEERS[1])
    raw = written(other)
    train(one, 2)
    done = one.trainer.delta()
    one.settle([line(one.read(raw, 0, BASE, PEERS[1]))], took_ours=False)
    assert torch.equal(unsent(one), done)
    assert torch.equal(theta(one), one.trainer.start_vector_N)


def test_training_counts_once() -> None:
    one = member()
    written(one)
    before = unsent(one)
    assert one.is_written
    assert one.write(0, BASE, steps=3, tokens=48)  # said again: the same
    assert torch.equal(unsent(one), before)
    one.settle([], took_ours=False)
    assert torch.equal(unsent(one), before)
    assert not one.is_written
    one.step()


# training that goes on after the update was written


def went_on(one: Participant, steps: int = 2) -> tuple[torch.Tensor, torch.Tensor, Payload]:
    """What it trained for its update, what after it, and the update."""
    train(one)
    told = one.trainer.delta()
    payload = one.read(one.write(0, BASE, steps=3, tokens=48), 0, BASE, one._peer)
    at = theta(one)
    train(one, steps)
    return told, at - theta(one), payload


each_codec = pytest.mark.parametrize("codec", ["fp32", "int4", "ef64.2b"])


@each_codec
@pytest.mark.parametrize("took_ours", [True, False])
def test_what_is_trained_after_the_update_is_carried_and_counts_once(codec: str, took_ours: bool) -> None:
    one = member(codec=codec)
    told, after, payload = went_on(one)
    sent = payload.delta.dense(0, payload.delta.n)
    assert after.norm() > 0
    assert torch.equal(unsent(one), told)  # it is no part of the update, nor of the feedback, before the round is over
    one.settle([line(payload)] if took_ours else [], took_ours=took_ours)
    carried = told + after - sent if took_ours else told + after
    assert torch.equal(unsent(one), carried)
    assert torch.equal(theta(one), one.trainer.start_vector_N)
    assert one._written_N is None
    train(one, 1)
    last = one.trainer.delta()
    raw = one.write(1, BASE, steps=1, tokens=16)
    assert torch.equal(unsent(one), carried * 0.95 + last)  # it fades once a round, like what was left of the update
    again = one.read(raw, 1, BASE, PEERS[0]).delta.dense(0, len(last))
    one.settle([line(one.read(raw, 1, BASE, PEERS[0]))], took_ours=True)
    assert torch.equal(unsent(one), carried * 0.95 + last - again)


def test_the_announced_update_and_the_state_stay_while_training_goes_on() -> None:
    one, other = member(), member()
    before = bytes(one.state())
    for each in (one, other):
        train(each)
    raws = [each.write(0, BASE, steps=3, tokens=48) for each in (one, other)]
    one.step()
    assert raws[0] == raws[1]
    assert one.state() == before
    with pytest.raises(AssertionError, match="stays as it is"):
        one.write(0, BASE, steps=4, tokens=64)
    payload = one.read(raws[0], 0, BASE, PEERS[0])
    for each in (one, other):
        each.settle([line(payload)], took_ours=True)
    assert one.state() == other.state()


def test_training_that_goes_on_takes_memory_only_then() -> None:
    one = member()
    written(one)
    assert one._written_N is None
    one.step()
    held = one._written_N
    one.step()
    assert held is one._written_N is not None
    one.settle([], took_ours=False)
    assert one._written_N is None


def test_micro_batches_that_made_no_step_are_not_carried() -> None:
    config = TrainConfig(seed=1, rate=0.01, warmup_steps=0, autocast="off", accumulation=2)
    one = Participant(
        Trainer(Toy(), batches(), config), Course(run=RUN, codec=codec_named("fp32"), rule=Rule.MEAN), PEERS[0]
    )
    train(one, 2)
    one.write(0, BASE, steps=1, tokens=32)
    before = unsent(one)
    one.step()
    one.settle([], took_ours=False)
    assert torch.equal(unsent(one), before)
    assert one._written_N is None


def test_what_is_trained_after_the_update_survives_a_state_that_is_adopted() -> None:
    one, other = member(), member(PEERS[1])
    played([other], 0)
    told, after, _ = went_on(one)
    one.adopt(other.state())
    assert torch.equal(unsent(one), told + after)
    assert one.state() == other.state()
    assert one._written_N is None


@each_codec
def test_what_a_round_took_is_not_sent_again_after_a_state_is_adopted(codec: str) -> None:
    left = {}
    for took_ours in (False, True):
        one, other = member(codec=codec), member(PEERS[1], codec=codec)
        train(one)
        one.write(0, BASE, steps=1, tokens=32)
        before, sent = unsent(one), one.own(steps=1, tokens=32).delta
        played([other], 0)
        one.adopt(other.state(), took_ours=took_ours)
        left[took_ours] = unsent(one)
    assert torch.equal(left[False], before)
    assert torch.equal(left[True], before - sent.dense(0, sent.n))


@each_codec
def test_what_is_trained_after_the_update_outlives_a_restart(codec: str) -> None:
    one, again = member(codec=codec), member(codec=codec)
    told, after, payload = went_on(one)
    kept = one.unsent()
    assert torch.equal(unsent(one), told)  # keeping it changes nothing
    again.restore_unsent(kept)
    assert torch.equal(unsent(again), told + after - payload.delta.dense(0, payload.delta.n))
    one.settle([line(payload)], took_ours=True)
    assert torch.equal(unsent(one), unsent(again))


def test_looking_at_updates_between_does_not_count_as_training() -> None:
    one = member()
    payload = one.read(written(member(PEERS[1])), 0, BASE, PEERS[1])
    rows = one.trainer.held_out(SCORE_ROWS_MIN)
    train(one)
    told = one.trainer.delta()
    one.write(0, BASE, steps=3, tokens=48)
    finish(one.judge(rows))
    at = theta(one)
    one.step()
    finish(one.score(payload, rows, None))
    one.step()
    after = at - theta(one)
    one.settle([], took_ours=False)
    assert torch.equal(unsent(one), told + after)


def test_numbers_that_are_not_finite_are_not_noted_after_the_update_either() -> None:
    one = member()
    told, _, _ = went_on(one)
    with torch.no_grad():
        next(iter(one.trainer.named.values())).fill_(float("nan"))
    with pytest.raises(ComputeFailed, match="diverged"):
        one.settle([], took_ours=False)
    assert torch.equal(unsent(one), told)


def test_numbers_that_are_not_finite_are_not_written_and_not_noted() -> None:
    one = member()
    train(one)
    with torch.no_grad():
        next(iter(one.trainer.named.values())).fill_(float("nan"))
    with pytest.raises(ComputeFailed, match="diverged"):
        one.write(0, BASE, steps=3, tokens=48)
    assert not one.is_written
    assert unsent(one).abs().max() == 0


# what came


def test_a_payload_says_what_it_is() -> None:
    one, other = member(), member(PEERS[1])
    raw = written(other)
    payload = one.read(raw, 0, BASE, PEERS[1])
    assert (payload.steps, payload.tokens) == (3, 48)
    assert payload.norm == pytest.approx(float(payload.delta.dense(0, payload.delta.n).norm()), rel=1e-5)
    assert len(raw) <= one.payload_bytes_max


@pytest.mark.parametrize(
    ("number", "base", "peer"),
    [(1, BASE, PEERS[1]), (0, digest(b"another history"), PEERS[1]), (0, BASE, PEERS[2])],
    ids=["round", "base", "peer"],
)
def test_a_payload_of_somewhere_else_is_refused(number: int, base: Digest, peer: str) -> None:
    with pytest.raises(BadUpdate, match="another run or round"):
        member().read(written(member(PEERS[1])), number, base, peer)


def test_a_payload_of_another_run_codec_or_length_is_refused() -> None:
    one = member()
    with pytest.raises(BadUpdate, match="says run"):
        one.read(written(member(PEERS[1], run=digest(b"another"))), 0, BASE, PEERS[1])
    raw = written(member(PEERS[1], codec="int8"))
    for wrong in (raw, b"", bytes(one.payload_bytes_max)):
        with pytest.raises(BadUpdate):
            one.read(wrong, 0, BASE, PEERS[1])


def test_numbers_no_member_can_have_are_refused() -> None:
    one, other = member(codec="fp32"), member(PEERS[1], codec="fp32")
    raw = written(other)
    largest = other.read(raw, 0, BASE, PEERS[1]).delta
    at = raw.index(largest.dense(0, 1).numpy().tobytes())
    for number in (float("nan"), float("inf"), 1e30):
        spoilt = raw[:at] + torch.tensor(number).numpy().tobytes() + raw[at + 4 :]
        with pytest.raises(BadUpdate):
            one.read(spoilt, 0, BASE, PEERS[1])


def test_a_norm_that_overflows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.participant.norm", lambda _delta: float("nan"))
    with pytest.raises(BadUpdate, match="not finite"):
        member().read(written(member(PEERS[1])), 0, BASE, PEERS[1])


def test_a_copy_overlaps_and_dense_payloads_never_do() -> None:
    one = member(codec="ef64.2b")
    payload = one.read(written(one), 0, BASE, PEERS[0])
    assert one.overlaps(payload, [payload] * 2) == [1.0, 1.0]
    dense = member()
    payload = dense.read(written(dense), 0, BASE, PEERS[0])
    assert dense.overlaps(payload, [payload]) == [0.0]


def test_a_codec_whose_payload_would_be_too_large_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.update.PAYLOAD_BYTES_MAX", 10)
    with pytest.raises(BadInput, match=r"choose ef64\.2b"):
        member()


# looking at payloads


def test_judging_is_the_loss_of_the_weights_that_the_round_began_with() -> None:
    one = member()
    rows = one.trainer.held_out(SCORE_ROWS_MIN)
    start = finish(held_out_loss(one.trainer.model, rows)).nats_per_token
    train(one)
    before = theta(one)
    assert finish(one.judge(rows)) == start
    assert torch.equal(theta(one), before)
    assert one.trainer.model.training


def test_a_score_is_the_fall_of_the_loss_and_knows_a_loss_that_was_judged_before() -> None:
    one, other = member(), member(PEERS[1])
    rows = one.trainer.held_out(SCORE_ROWS_MIN)
    payload = one.read(written(other), 0, BASE, PEERS[1])
    train(one)
    fall = finish(one.score(payload, rows, None))
    assert fall == score(one.trainer, payload.delta, rows).fall_nats > 0
    assert finish(one.score(payload, rows, finish(one.judge(rows)))) == fall
    harm = Payload(delta=WholeDelta(-100 * payload.delta.dense(0, payload.delta.n)), norm=1.0, steps=1, tokens=1)
    assert finish(one.score(harm, rows, None)) < 0


def test_too_few_rows_give_no_score() -> None:
    one = member()
    payload = one.read(written(member(PEERS[1])), 0, BASE, PEERS[1])
    assert finish(one.score(payload, one.trainer.held_out(SCORE_ROWS_MIN - 1), None)) is None


def test_weights_without_a_finite_loss_give_no_score() -> None:
    one = member()
    payload = one.read(written(member(PEERS[1])), 0, BASE, PEERS[1])
    with pytest.raises(Diverged):
        finish(one.score(payload, one.trainer.held_out(SCORE_ROWS_MIN), 100.0))
    assert one.trainer.model.training


@pytest.mark.parametrize("hops", [1, 5, SCORE_ROWS_MIN + 3])
@pytest.mark.parametrize("what", ["judge", "score"])
def test_looking_that_is_left_halfway_leaves_the_trainer_as_it_was(what: str, hops: int) -> None:
    one, untouched = member(), member()
    payload = one.read(written(member(PEERS[1])), 0, BASE, PEERS[1])
    for each in (one, untouched):
        train(each)
    rows = one.trainer.held_out(SCORE_ROWS_MIN)
    work = one.judge(rows) if what == "judge" else one.score(payload, rows, None)
    for _ in range(hops):
        if next(work, "ended") == "ended":
            break
    assert what == "judge" or not torch.equal(theta(one), theta(untouched))
    work.close()
    assert torch.equal(theta(one), theta(untouched))
    assert one.trainer.model.training
    train(one)
    train(untouched)
    assert torch.equal(theta(one), theta(untouched))


# states


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_state_is_adopted_to_the_bit_and_the_next_round_is_the_same(momentum: float) -> None:
    members = [member(peer, momentum=momentum) for peer in PEERS[:2]]
    fresh = member(PEERS[2], momentum=momentum)
    assert len(fresh.state()) == fresh.state_bytes == 4 * fresh.layout.size * (2 if momentum else 1)
    played(members, 0)
    fresh.adopt(members[0].state())
    assert fresh.state() == members[0].state()
    assert torch.equal(theta(fresh), theta(members[0]))
    played([*members, fresh], 1)
    assert fresh.state() == members[0].state() == members[1].state()


def test_what_was_trained_before_a_state_came_is_not_lost() -> None:
    one, other = member(), member(PEERS[1])
    played([other], 0)
    train(one)
    done = one.trainer.delta()
    one.adopt(other.state())
    assert torch.equal(unsent(one), done)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_state_that_is_none_changes_nothing(momentum: float) -> None:
    one = member(momentum=momentum)
    train(one)
    before, own, left = bytes(one.state()), theta(one), unsent(one)
    spoilt = bytearray(before)
    spoilt[4:8] = torch.tensor(float("nan")).numpy().tobytes()
    for wrong, why in ((b"", "bytes came"), (before[:-4], "bytes came"), (before + bytes(4), "bytes came"),
                       (bytes(spoilt), "not finite")):  # fmt: skip
        with pytest.raises(BadState, match=why):
            one.adopt(wrong)
    assert one.state() == before
    assert torch.equal(theta(one), own)
    assert torch.equal(unsent(one), left)


def test_what_was_not_sent_outlives_a_restart() -> None:
    one, again = member(codec="ef64.2b"), member(codec="ef64.2b")
    raw = written(one)
    one.settle([line(one.read(raw, 0, BASE, PEERS[0]))], took_ours=True)
    again.restore_unsent(one.unsent())
    assert torch.equal(unsent(again), unsent(one))
    assert unsent(one).norm() > 0


def test_training_under_way_is_kept_and_keeping_it_changes_nothing() -> None:
    one, again = member(), member()
    train(one)
    again.restore_unsent(one.unsent())
    assert torch.equal(unsent(again), one.trainer.delta())
    assert unsent(one).norm() == 0  # and is taken up once, when the round ends here
    train(one)
    done = one.trainer.delta()
    one.settle([], took_ours=False)
    assert torch.equal(unsent(one), done)


def test_what_was_sent_counts_as_sent_after_a_restart() -> None:
    one, again = member(), member()
    raw = written(one)
    sent = one.read(raw, 0, BASE, PEERS[0]).delta
    again.restore_unsent(one.unsent())
    assert torch.equal(unsent(again), unsent(one) - sent.dense(0, sent.n))
    assert unsent(one).norm() > unsent(again).norm()


def test_feedback_of_another_layout_is_a_bad_state() -> None:
    one = member()
    train(one)
    one._note()
    before = unsent(one)
    for wrong in (b"nonsense", one._feedback.save(digest(b"another layout"))):
        with pytest.raises(BadState):
            one.restore_unsent(wrong)
    assert torch.equal(unsent(one), before)


def test_a_text_that_is_too_short_makes_no_trainer(tmp_path: Path) -> None:
    save_causal(tmp_path)
    loaded = load(Found("tiny", tmp_path, tmp_path), device="cpu")
    text = text_of(torch.zeros(100, dtype=torch.int32), text_bytes=100, documents=1)
    with pytest.raises(BadText, match="are needed"):
        make_trainer(loaded, text, Shape(context=16, rows=2), TrainConfig(seed=1))


# weights that serve


def test_weights_are_written_into_a_model_of_another_number_type(tmp_path: Path) -> None:
    save_causal(tmp_path)
    loaded = load(Found("tiny", tmp_path, tmp_path), device="cpu", dtype="bfloat16")
    named = {name: torch.randn(p.shape) for name, p in loaded.model.named_parameters()}
    load_named(loaded.model, named)
    for name, parameter in loaded.model.named_parameters():
        assert parameter.dtype is torch.bfloat16
        assert torch.equal(parameter, named[name].bfloat16())


def test_tied_weights_stay_tied() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    load_named(model, {"0.weight": torch.ones(5, 3)})
    assert model[1].weight is model[0].weight
    assert torch.equal(model[1].weight, torch.ones(5, 3))


@pytest.mark.parametrize(
    ("name", "shape"), [("2.weight", (5, 3)), ("0.weight", (3, 5))], ids=["missing", "another shape"]
)
def test_weights_that_do_not_fit_change_nothing(name: str, shape: tuple[int, ...]) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(BadModel, match=f"no {name}"):
        load_named(model, {"1.weight": torch.zeros(5, 3), name: torch.zeros(shape)})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def prepared(runtime: Runtime, weights: object) -> object:
    """What `adopt` takes."""
    preparing = runtime.preparing(weights)
    try:
        while True:
            next(preparing)
    except StopIteration as end:
        return end.value


def test_a_runtime_goes_on_under_other_weights_and_their_name(tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "other")):
        save_causal(tmp_path / name, seed=seed)
    one, other = (Runtime.load(str(tmp_path / name), RuntimeConfig(threads=1)) for name in ("one", "other"))
    text = "Once upon a time"
    assert one.embed([text]).vectors != other.embed([text]).vectors
    path = tmp_path / "other"
    plain = load(Found("other", path, path), device="cpu", dtype="float32").model
    one.adopt(prepared(one, dict(plain.named_parameters())), "tale-r1-abc")
    assert one.embed([text]).vectors == other.embed([text]).vectors
    assert one.facts.revision == one.embedding_facts.revision == "tale-r1-abc"
    assert [facts.revision for facts in one.all_facts()] == ["tale-r1-abc"]
    assert one.embed([text]).facts.revision == "tale-r1-abc"
    with pytest.raises(BadModel):
        prepared(one, {"nothing": torch.zeros(1)})
    assert one.facts.revision == "tale-r1-abc"
